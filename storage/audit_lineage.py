"""The learner's side of a run: do rewinds, versions, steps, checkpoints and evaluations tell one story?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from asyncopd.config import RunConfig
from asyncopd.types import Manifest, PolicyVersion
from storage.findings import Finding, Mend
from storage.layout import parse_version
from storage.lineage import possible_rewinds
from storage.snapshot import Snapshot


def check_lineage(snapshot: Snapshot, config: RunConfig | None, mend: Mend) -> list[Finding]:
    """Findings about the surviving lineage; `config` is None when the run's record cannot be read."""
    findings = [*_check_rewinds(snapshot, mend), *_check_versions(snapshot, mend), *_check_steps(snapshot, mend)]
    findings += _check_digests(snapshot, mend)
    if config is not None:
        findings += _check_due(snapshot, config, mend)
    return findings


def _check_rewinds(snapshot: Snapshot, mend: Mend) -> Iterator[Finding]:
    """Rewinds are numbered without gaps, and nothing is published under one that is not recorded."""
    recorded = {rewind.number for rewind in snapshot.records["rewind"].values()}
    used = {
        version.rewind
        for kind in ("policy", "step", "checkpoint")
        for key in snapshot.records[kind]
        if (version := parse_version(key)) is not None
    }
    for number in range(1, max(recorded | used, default=0) + 1):
        key = snapshot.layout.rewind(number)
        if number not in recorded and key not in snapshot.broken:
            found = f"no such object, but objects of rewind {max(recorded | used)}"
            yield Finding("missing", key, f"the record of rewind {number}", found, mend.quarantine(key))


def _check_versions(snapshot: Snapshot, mend: Mend) -> Iterator[Finding]:
    """Every version up to the newest is there, unless it was removed on purpose."""
    present = {version.number for version in snapshot.states("policy")}
    unreadable = _versions(snapshot.broken, snapshot.layout.policies)
    removed = _versions(snapshot.removed_keys, snapshot.layout.policies)
    made_by = {step.step + 1: step for step in snapshot.steps()}
    newest = max({*present, *made_by}, default=-1)
    for number in sorted(set(range(newest + 1)) - present - unreadable - removed):
        step = made_by.get(number)
        rewind = step.rewind if step else next(possible_rewinds(number, snapshot.rewinds))
        key = snapshot.layout.policy_manifest(PolicyVersion(number, rewind))
        evidence = f"step {step.step} made it" if step else f"version {newest} came after it"
        yield Finding("missing", key, f"version {number}: {evidence}", "no such object", mend.quarantine(key))
    for step in made_by.values():
        if step.version != PolicyVersion(step.step + 1, step.rewind):
            key = snapshot.layout.step(step.step, step.rewind)
            expected = f"version {step.step + 1} of rewind {step.rewind}"
            yield Finding("mismatch", key, expected, str(step.version), mend.quarantine(key))


def _check_steps(snapshot: Snapshot, mend: Mend) -> Iterator[Finding]:
    """Every step that something later proves has its record."""
    trained = {step.step for step in snapshot.steps()}
    unreadable = _versions(snapshot.broken, snapshot.layout.steps)
    # A version is published just before its step's record: the newest one proves only the steps before its own.
    evidence = {
        "checkpoint": max((state.number for state in snapshot.states("checkpoint")), default=0),
        "step": max(trained, default=-1) + 1,
        "version": max((state.number for state in snapshot.states("policy")), default=0) - 1,
    }
    rewinds = {state.number: state.rewind for kind in ("policy", "checkpoint") for state in snapshot.states(kind)}
    noun, number = max(evidence.items(), key=lambda item: item[1])
    for step in sorted(set(range(number)) - trained - unreadable):
        rewind = rewinds.get(step + 1, next(possible_rewinds(step + 1, snapshot.rewinds)))
        key = snapshot.layout.step(step, rewind)
        found = f"no such object, but a {noun} that came after it"
        yield Finding("missing", key, f"the record of step {step}", found, mend.quarantine(key))


def _check_digests(snapshot: Snapshot, mend: Mend) -> Iterator[Finding]:
    """A checkpoint's weights are those its version published."""
    checkpoints: dict[str, Manifest] = snapshot.records["checkpoint"]
    for key, checkpoint in checkpoints.items():
        version = parse_version(key)
        assert version is not None
        policy = snapshot.records["policy"].get(snapshot.layout.policy_manifest(version))
        published = _full_weights(policy) if policy else set()
        stored = {
            promise["sha256"] for name, promise in checkpoint.objects.items() if name.endswith("/model.safetensors")
        }
        if published and stored and published != stored:
            expected = f"the weights of version {version.number}, sha256 {min(published)[:12]}"
            yield Finding("mismatch", key, expected, f"sha256 {min(stored)[:12]}", mend.quarantine(key))


def _full_weights(policy: Manifest) -> set[str]:
    """sha256 of a version's weights; empty when it was published as a difference to another one."""
    return {promise["sha256"] for key, promise in policy.objects.items() if key.endswith(".safetensors")}


def _check_due(snapshot: Snapshot, config: RunConfig, mend: Mend) -> Iterator[Finding]:
    """What the configuration asks for by now: architecture, checkpoints, evaluations."""
    layout = snapshot.layout
    if snapshot.records["policy"] and layout.architecture_manifest not in snapshot.entries:
        expected = "the student's architecture, which is stored before version 0"
        yield Finding("missing", layout.architecture_manifest, expected, "no such object", mend.resume())
    checkpoints = {state.number: state for state in snapshot.states("checkpoint")}
    excused = _versions({*snapshot.removed_keys, *snapshot.broken}, layout.checkpoints)
    steps = snapshot.steps()
    for step in steps[:-1]:  # the newest step's checkpoint may be on its way
        number = step.step + 1
        if number % config.learner.checkpoint_every == 0 and number not in {*checkpoints, *excused}:
            key = layout.checkpoint_manifest(number, step.rewind)
            mending = mend.quarantine(key)
            yield Finding("missing", key, f"the checkpoint after step {step.step}", "no such object", mending)
    every = config.evaluate.every
    evaluated = {state.number for state in snapshot.states("evaluation")}
    # An evaluator goes on with the next version when the learner goes back, so a superseded evaluation excuses one.
    seen = {e.version.number for e in snapshot.evaluations()} | _versions(snapshot.broken, layout.evaluations)
    for number in range(0, max(evaluated, default=0), every) if every else ():
        if number not in seen:
            key = layout.evaluation(PolicyVersion(number, 0))
            mending = mend.deployment("evaluate")
            yield Finding("missing", key, f"an evaluation of version {number}", "no such object", mending)


def _versions(keys: Iterable[str], folder: str) -> set[int]:
    """The numbers of those `keys` that lie in `folder`."""
    return {v.number for key in keys if key.startswith(f"{folder}/") and (v := parse_version(key)) is not None}
