"""What an audit finds in the records of a run, and the command that mends each.

lineage       rewinds, versions, steps, checkpoints and evaluations agree with each other
conservation  every index is in exactly one state (storage/maintain/ledger.py), and the records of it agree
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from asyncopd.config import RunConfig
from asyncopd.records import Manifest
from asyncopd.types import IndexRange, PolicyVersion, TrainStep
from storage.events import possible_rewinds
from storage.layout import parse, parse_shard
from storage.maintain.ledger import Ledger, events_of
from storage.run_view import RunView


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    problem: str
    """`corrupt`, `missing`, `mismatch`, `overlap`, `ledger`, `orphan` or `temporary`."""
    key: str
    """The object it is about; of something missing, the key it should have."""
    expected: str
    found: str
    mend: str
    """The exact command, or what to do when there is none."""


@dataclass(frozen=True)
class Mend:
    """The commands that mend a run, spelled out for its storage root."""

    root: str
    run_id: str

    def finding(self, problem: str, key: str, expected: str, found: str) -> Finding:
        """A finding that setting `key` aside mends."""
        return Finding(problem, key, expected, found, self.quarantine(key))

    def quarantine(self, key: str) -> str:
        return self._command("asyncopd maintain quarantine", key)

    def collect(self) -> str:
        return self._command("asyncopd maintain collect", self.run_id)

    def deployment(self, name: str) -> str:
        """Start one more role process, which does what is missing."""
        return f"prefect deployment run {name}/worker -p run_id={self.run_id} -p root={shlex.quote(self.root)}"

    def resume(self) -> str:
        return self._command("asyncopd train --run-id", self.run_id)

    def _command(self, command: str, argument: str) -> str:
        option = "" if self.root == "runs" else f" --root {shlex.quote(self.root)}"
        return f"{command} {shlex.quote(argument)}{option}"


def check_lineage(view: RunView, config: RunConfig | None, mend: Mend) -> list[Finding]:
    """Findings about the surviving lineage; `config` is None when the run's record cannot be read."""
    checks = (_check_rewinds, _check_versions, _check_steps, _check_digests)
    findings = [finding for check in checks for finding in check(view, mend)]
    return findings if config is None else [*findings, *_check_due(view, config, mend)]


def _check_rewinds(view: RunView, mend: Mend) -> Iterator[Finding]:
    """Rewinds are numbered without gaps, and nothing is published under one that is not recorded."""
    recorded = {rewind.number for rewind in view.records["rewind"].values()}
    kinds = ("policy", "step", "checkpoint")
    used = {parse(key).fields["state"].rewind for kind in kinds for key in view.records[kind]}
    newest = max(recorded | used, default=0)
    for number in range(1, newest + 1):
        key = view.layout.key("rewind", number=number)
        if number not in recorded and key not in view.broken:
            found = f"no such object, but objects of rewind {newest}"
            yield mend.finding("missing", key, f"the record of rewind {number}", found)


def _check_versions(view: RunView, mend: Mend) -> Iterator[Finding]:
    """Every version up to the newest is there, unless it was removed on purpose."""
    excused = _numbers("policy", [*view.broken, *view.removed_keys])
    present = {version.number for version in view.states("policy")}
    made_by = {step.step + 1: step for step in view.steps()}
    newest = max({*present, *made_by}, default=-1)
    for number in sorted(set(range(newest + 1)) - present - excused):
        step = made_by.get(number)
        rewind = step.rewind if step else next(possible_rewinds(number, view.rewinds))
        key = view.layout.key("policy", state=PolicyVersion(number, rewind))
        evidence = f"step {step.step} made it" if step else f"version {newest} came after it"
        yield mend.finding("missing", key, f"version {number}: {evidence}", "no such object")
    for step in made_by.values():
        if step.version != PolicyVersion(step.step + 1, step.rewind):
            key = view.layout.step(step.step, step.rewind)
            expected = f"version {step.step + 1} of rewind {step.rewind}"
            yield mend.finding("mismatch", key, expected, str(step.version))


def _check_steps(view: RunView, mend: Mend) -> Iterator[Finding]:
    """Every step that something later proves has its record."""
    trained = {step.step for step in view.steps()}
    # A version is published just before its step's record: the newest one proves only the steps before its own.
    evidence = {
        "checkpoint": max((state.number for state in view.states("checkpoint")), default=0),
        "step": max(trained, default=-1) + 1,
        "version": max((state.number for state in view.states("policy")), default=0) - 1,
    }
    rewinds = {state.number: state.rewind for kind in ("policy", "checkpoint") for state in view.states(kind)}
    noun, number = max(evidence.items(), key=lambda item: item[1])
    for step in sorted(set(range(number)) - trained - _numbers("step", view.broken)):
        rewind = rewinds.get(step + 1, next(possible_rewinds(step + 1, view.rewinds)))
        found = f"no such object, but a {noun} that came after it"
        yield mend.finding("missing", view.layout.step(step, rewind), f"the record of step {step}", found)


def _check_digests(view: RunView, mend: Mend) -> Iterator[Finding]:
    """A checkpoint's weights are those its version published."""
    for key, checkpoint in view.records["checkpoint"].items():
        version: PolicyVersion = parse(key).fields["state"]
        policy = view.records["policy"].get(view.layout.key("policy", state=version))
        # None when it was published as a difference to another version.
        published = _digests(policy, ".safetensors") if policy else set()
        stored = _digests(checkpoint, "/model.safetensors")
        if published and stored and published != stored:
            expected = f"the weights of version {version.number}, sha256 {min(published)[:12]}"
            yield mend.finding("mismatch", key, expected, f"sha256 {min(stored)[:12]}")


def _digests(manifest: Manifest, ending: str) -> set[str]:
    return {promise["sha256"] for key, promise in manifest.objects.items() if key.endswith(ending)}


def _check_due(view: RunView, config: RunConfig, mend: Mend) -> Iterator[Finding]:
    """What the configuration asks for by now: architecture, checkpoints, evaluations."""
    layout = view.layout
    if view.records["policy"] and layout.key("architecture") not in view.entries:
        expected = "the student's architecture, which is stored before version 0"
        yield Finding("missing", layout.key("architecture"), expected, "no such object", mend.resume())
    checkpoints = {state.number for state in view.states("checkpoint")}
    checkpoints |= _numbers("checkpoint", [*view.removed_keys, *view.broken])
    for step in view.steps()[:-1]:  # the newest step's checkpoint may be on its way
        number = step.step + 1
        if number % config.learner.checkpoint_every == 0 and number not in checkpoints:
            key = layout.checkpoint_manifest(number, step.rewind)
            yield mend.finding("missing", key, f"the checkpoint after step {step.step}", "no such object")
    every = config.evaluate.every
    newest = max((state.number for state in view.states("evaluation")), default=0)
    # An evaluator goes on with the next version when the learner goes back, so a superseded evaluation excuses one.
    seen = _numbers("evaluation", [*view.records["evaluation"], *view.broken])
    for number in range(0, newest, every) if every else ():
        if number not in seen:
            key, advice = layout.key("evaluation", state=PolicyVersion(number, 0)), mend.deployment("evaluate")
            yield Finding("missing", key, f"an evaluation of version {number}", "no such object", advice)


def _numbers(kind: str, keys: Iterable[str]) -> set[int]:
    """The numbers of the states whose records of `kind` are among `keys`."""
    return {parsed.fields["state"].number for key in keys if (parsed := parse(key)).kind == kind}


Shards = Mapping[IndexRange, Manifest]


def check_conservation(view: RunView, config: RunConfig | None, mend: Mend) -> list[Finding]:
    """Shards that overlap, scores without trajectories, indices trained twice or without data, counts that differ."""
    layout, trajectories, steps = view.layout, view.trajectories(), view.steps()
    findings = [*_overlaps(view, layout.trajectories, trajectories, mend)]
    for teacher in view.teachers():
        folder, scores = layout.scores(teacher), view.scores(teacher)
        findings += _overlaps(view, folder, scores, mend)
        findings += _scores_fit(view, folder, scores, trajectories, mend)
    findings += _trained_once(view, steps, mend)
    findings += _has_data(view, layout.trajectories, trajectories, config, mend)
    teacher_of_run = config.teacher.name if config else next(iter(view.teachers()), None)
    if teacher_of_run is not None:
        scores = view.scores(teacher_of_run)
        findings += _has_data(view, layout.scores(teacher_of_run), scores, config, mend)
        if config is not None and config.staleness.order == "index":
            findings += _follows_the_plan(view, steps, scores, config, mend)
    # Last, because whatever else is wrong shows in the ledger too, without saying how to mend it; and what a broken
    # record said is missing from the ledger, and the record is a finding already.
    if not findings and not view.broken:
        # Trained and dropped, trained without having been scored, and whatever else cannot be.
        violations = Ledger.fold(events_of(view, teacher_of_run)).violations()
        expected = "moves that storage/maintain/ledger.py draws"
        findings += [Finding("ledger", layout.root, expected, str(found), mend.resume()) for found in violations]
    return findings


def _overlaps(view: RunView, folder: str, shards: Shards, mend: Mend) -> Iterator[Finding]:
    last: IndexRange | None = None
    for shard in sorted(shards):
        if last is not None and shard.start < last.stop:
            found = f"a second shard for indices from {shard.start}, beside {last.name}"
            yield mend.finding("overlap", view.layout.shard_manifest(folder, shard), "one shard for every index", found)
        last = shard if last is None or shard.stop > last.stop else last


def _scores_fit(view: RunView, folder: str, scores: Shards, trajectories: Shards, mend: Mend) -> Iterator[Finding]:
    """Scores belong to a stored shard, count its tokens, and come from one teacher."""
    digests = sorted({manifest.facts.teacher_digests for manifest in scores.values()} - {()})
    for shard, manifest in sorted(scores.items()):
        key, facts = view.layout.shard_manifest(folder, shard), manifest.facts
        source = view.layout.shard_manifest(view.layout.trajectories, shard)
        if shard not in trajectories:
            if source not in view.broken:
                found = "no such object, but scores of it"
                yield mend.finding("missing", source, f"trajectories of {shard.name}", found)
            continue
        rolled_out = trajectories[shard].facts
        if rolled_out.num_rows == facts.num_rows and rolled_out.num_tokens != facts.num_tokens:
            expected = f"scores of the {rolled_out.num_tokens} tokens of {source}"
            yield mend.finding("mismatch", key, expected, f"scores of {facts.num_tokens}")
        own = facts.teacher_digests
        if own and own != digests[0]:
            expected = f"scores by teacher {digests[0]}, as in other shards"
            yield mend.finding("mismatch", key, expected, f"scores by teacher {own}")


def _trained_once(view: RunView, steps: Iterable[TrainStep], mend: Mend) -> Iterator[Finding]:
    owner: dict[int, int] = {}
    for step in steps:
        taken = [index for index in step.indices.indices if index in owner]
        if taken:
            key = view.layout.step(step.step, step.rewind)
            found = f"index {taken[0]} and {len(taken) - 1} more, which step {owner[taken[0]]} had before"
            yield mend.finding("overlap", key, "indices that no other step decided about", found)
        owner.update(dict.fromkeys(step.indices.indices, step.step))


def _has_data(view: RunView, folder: str, shards: Shards, config: RunConfig | None, mend: Mend) -> Iterator[Finding]:
    """Every trained index lies in a shard, if only one whose data was removed on purpose."""
    unreadable = [parse_shard(key) for key in view.broken if key.startswith(f"{folder}/")]
    there = {index for shard in [*shards, *unreadable] if shard is not None for index in shard.indices}
    trained = {index: step.step for step in view.steps() for index in step.indices.indices if index not in step.dropped}
    size = config.rollout.shard_size if config else 1
    for number in sorted({index // size for index in trained.keys() - there}):
        shard = IndexRange(number * size, (number + 1) * size)
        key = view.layout.shard_manifest(folder, shard)
        step = next(trained[index] for index in shard.indices if index in trained)
        expected = f"the data of {shard.name}, which step {step} trained"
        rolled_out = view.layout.shard_manifest(view.layout.trajectories, shard)
        # Scores can be made again from trajectories that are there; trajectories cannot be made again.
        can_score = folder != view.layout.trajectories and rolled_out in view.records["trajectories"]
        advice = mend.deployment("score") if can_score else mend.quarantine(key)
        yield Finding("missing", key, expected, "no such object", advice)


def _follows_the_plan(
    view: RunView, steps: Iterable[TrainStep], scores: Shards, config: RunConfig, mend: Mend
) -> Iterator[Finding]:
    """Index order: step s trains [s·B, (s+1)·B), all tokens of it, none staler than τ."""
    plan = config.plan
    for step in steps:
        key, staleness = view.layout.step(step.step, step.rewind), step.staleness_tokens
        shards = plan.shards_of_step(step.step)
        counts = [n for shard in shards if shard in scores and (n := scores[shard].facts.num_tokens) is not None]
        is_whole = len(counts) == len(shards) and not step.dropped
        stored = sum(counts) if is_whole else step.num_tokens
        for expected, found in (
            (f"indices {plan.step(step.step).name}", f"indices {step.indices.name}"),
            (f"{step.num_tokens} tokens", f"{sum(staleness.values())} tokens"),
            (f"{stored} tokens in its shards", f"{step.num_tokens} tokens in its shards"),
        ):
            if expected != found:
                yield mend.finding("mismatch", key, expected, found)
        if staleness and not 0 <= min(staleness) <= max(staleness) <= plan.max_staleness:
            expected = f"staleness from 0 to {plan.max_staleness} versions"
            yield mend.finding("mismatch", key, expected, f"from {min(staleness)} to {max(staleness)}")
