"""What an audit checks.

objects       data against the manifests that promise it: presence, size, sha256, rows, indices, tokens
lineage       rewinds, versions, steps, checkpoints and evaluations agree with each other
conservation  every index is in exactly one state (storage/maintain/ledger.py), and the records of it agree
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from asyncopd.config import RunConfig
from asyncopd.errors import AsyncOPDError, StorageError
from asyncopd.records import Manifest
from asyncopd.types import IndexRange, PolicyVersion, TrainStep
from storage.layout import parse, parse_shard, parse_version
from storage.learner_log import possible_rewinds
from storage.maintain.findings import Finding, Mend
from storage.maintain.ledger import Ledger, events_of
from storage.manifests import find_manifest, sha256
from storage.parquet import decode_scores, decode_trajectories
from storage.run_log import check_rows
from storage.run_view import RunView
from storage.stores.base import ObjectStore

if TYPE_CHECKING:
    from storage.maintain.audit import Progress


_READERS = 4
"""Objects read and hashed at once; hashlib lets go of the interpreter lock."""


class DataChecks:
    """Verifies data objects, each once however often the run is looked at."""

    def __init__(self, store: ObjectStore, mend: Mend, on_progress: Progress) -> None:
        self._store, self._mend, self._on_progress = store, mend, on_progress
        self._verified: dict[tuple[Any, ...], list[Finding]] = {}

    @property
    def num_verified(self) -> int:
        return len(self._verified)

    def check(self, snapshot: RunView) -> list[Finding]:
        """Everything that a manifest of the run promises."""
        findings = [
            finding
            for key, manifest in snapshot.manifests.items()
            for finding in _check_promises(self._mend, key, manifest)
        ]
        promised = sorted(snapshot.references.items())
        with ThreadPoolExecutor(_READERS) as readers:
            results = readers.map(lambda item: self._check_data(snapshot, *item), promised)
            for done, ((key, _), found) in enumerate(zip(promised, results, strict=True), start=1):
                self._on_progress(done, len(promised), key)
                findings += found
        return findings

    def check_manifest(self, manifest_key: str) -> list[Finding]:
        """What one manifest outside the run promises, if there is such a manifest."""
        try:
            manifest = find_manifest(self._store, manifest_key)
        except StorageError as error:
            mend = self._mend.quarantine(manifest_key)
            return [Finding("corrupt", manifest_key, "a manifest that can be read", str(error), mend)]
        findings: list[Finding] = []
        for key, promise in manifest.objects.items() if manifest else ():
            findings += self._check_body(key, self._store.find(key), manifest_key, promise)
        return findings

    def _check_data(self, snapshot: RunView, key: str, manifest_keys: list[str]) -> list[Finding]:
        manifests = {name: m for name in manifest_keys if (m := snapshot.manifests.get(name)) is not None}
        entry = snapshot.entries.get(key)
        promises = tuple((name, m.objects[key]["sha256"]) for name, m in manifests.items())
        seen = (key, entry, promises)
        if entry is None or seen not in self._verified:
            body = self._store.find(key)
            findings = []
            for manifest_key, manifest in manifests.items():
                bad = self._check_body(key, body, manifest_key, manifest.objects[key])
                findings += bad
                if body is not None and not bad and manifest.kind in ("trajectories", "scores"):
                    findings += self._check_rows(key, body, manifest_key, manifest)
            if entry is None:
                return findings  # came after the listing, or is gone: nothing to remember
            self._verified[seen] = findings
        return self._verified[seen]

    def _check_body(self, key: str, body: bytes | None, manifest_key: str, promise: Mapping[str, Any]) -> list[Finding]:
        mend = self._mend.quarantine(manifest_key)
        expected = f"{promise['size_bytes']} bytes with sha256 {promise['sha256'][:12]} (promised by {manifest_key})"
        if body is None:
            return [Finding("missing", key, expected, "no such object", mend)]
        found = f"{len(body)} bytes with sha256 {(digest := sha256(body))[:12]}"
        if len(body) != promise["size_bytes"] or digest != promise["sha256"]:
            return [Finding("corrupt", key, expected, found, mend)]
        return []

    def _check_rows(self, key: str, body: bytes, manifest_key: str, manifest: Manifest) -> Iterator[Finding]:
        """Rows, indices and tokens of a shard whose bytes are the promised ones."""
        shard = parse_shard(manifest_key)
        assert shard is not None
        decode = decode_trajectories if manifest.kind == "trajectories" else decode_scores
        try:
            rows: list[Any] = list(decode(body, key))
            check_rows(manifest_key, manifest, shard, [row.index for row in rows])
        except AsyncOPDError as error:
            yield Finding(
                "corrupt", manifest_key, f"the rows of {shard.name}", str(error), self._mend.quarantine(manifest_key)
            )
            return
        lengths = [len(row.response_ids if manifest.kind == "trajectories" else row.sampled_logprobs_T) for row in rows]
        promised = manifest.facts.num_tokens
        if promised is not None and sum(lengths) != promised:
            mend = self._mend.quarantine(manifest_key)
            yield Finding("mismatch", manifest_key, f"{promised} response tokens", f"{sum(lengths)}", mend)


def _check_promises(mend: Mend, key: str, manifest: Manifest) -> Iterator[Finding]:
    """Does the manifest name as many objects as its kind has?"""
    if manifest.kind in ("trajectories", "scores"):
        expected = 0 if manifest.facts.removed else 1
        if len(manifest.objects) != expected:
            found = f"{len(manifest.objects)} data objects"
            yield Finding("mismatch", key, f"{expected} data objects", found, mend.quarantine(key))
    elif not manifest.objects:
        yield Finding("mismatch", key, "at least one data object", "none", mend.quarantine(key))


def check_lineage(snapshot: RunView, config: RunConfig | None, mend: Mend) -> list[Finding]:
    """Findings about the surviving lineage; `config` is None when the run's record cannot be read."""
    findings = [*_check_rewinds(snapshot, mend), *_check_versions(snapshot, mend), *_check_steps(snapshot, mend)]
    findings += _check_digests(snapshot, mend)
    if config is not None:
        findings += _check_due(snapshot, config, mend)
    return findings


def _check_rewinds(snapshot: RunView, mend: Mend) -> Iterator[Finding]:
    """Rewinds are numbered without gaps, and nothing is published under one that is not recorded."""
    recorded = {rewind.number for rewind in snapshot.records["rewind"].values()}
    used = {
        version.rewind
        for kind in ("policy", "step", "checkpoint")
        for key in snapshot.records[kind]
        if (version := parse_version(key)) is not None
    }
    for number in range(1, max(recorded | used, default=0) + 1):
        key = snapshot.layout.key("rewind", number=number)
        if number not in recorded and key not in snapshot.broken:
            found = f"no such object, but objects of rewind {max(recorded | used)}"
            yield Finding("missing", key, f"the record of rewind {number}", found, mend.quarantine(key))


def _check_versions(snapshot: RunView, mend: Mend) -> Iterator[Finding]:
    """Every version up to the newest is there, unless it was removed on purpose."""
    present = {version.number for version in snapshot.states("policy")}
    unreadable = _versions(snapshot.broken, snapshot.layout.folder("policy"))
    removed = _versions(snapshot.removed_keys, snapshot.layout.folder("policy"))
    made_by = {step.step + 1: step for step in snapshot.steps()}
    newest = max({*present, *made_by}, default=-1)
    for number in sorted(set(range(newest + 1)) - present - unreadable - removed):
        step = made_by.get(number)
        rewind = step.rewind if step else next(possible_rewinds(number, snapshot.rewinds))
        key = snapshot.layout.key("policy", state=PolicyVersion(number, rewind))
        evidence = f"step {step.step} made it" if step else f"version {newest} came after it"
        yield Finding("missing", key, f"version {number}: {evidence}", "no such object", mend.quarantine(key))
    for step in made_by.values():
        if step.version != PolicyVersion(step.step + 1, step.rewind):
            key = snapshot.layout.step(step.step, step.rewind)
            expected = f"version {step.step + 1} of rewind {step.rewind}"
            yield Finding("mismatch", key, expected, str(step.version), mend.quarantine(key))


def _check_steps(snapshot: RunView, mend: Mend) -> Iterator[Finding]:
    """Every step that something later proves has its record."""
    trained = {step.step for step in snapshot.steps()}
    unreadable = _versions(snapshot.broken, snapshot.layout.folder("step"))
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


def _check_digests(snapshot: RunView, mend: Mend) -> Iterator[Finding]:
    """A checkpoint's weights are those its version published."""
    checkpoints: dict[str, Manifest] = snapshot.records["checkpoint"]
    for key, checkpoint in checkpoints.items():
        version = parse_version(key)
        assert version is not None
        policy = snapshot.records["policy"].get(snapshot.layout.key("policy", state=version))
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


def _check_due(snapshot: RunView, config: RunConfig, mend: Mend) -> Iterator[Finding]:
    """What the configuration asks for by now: architecture, checkpoints, evaluations."""
    layout = snapshot.layout
    if snapshot.records["policy"] and layout.key("architecture") not in snapshot.entries:
        expected = "the student's architecture, which is stored before version 0"
        yield Finding("missing", layout.key("architecture"), expected, "no such object", mend.resume())
    checkpoints = {state.number: state for state in snapshot.states("checkpoint")}
    excused = _versions({*snapshot.removed_keys, *snapshot.broken}, layout.folder("checkpoint"))
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
    seen = _versions({*snapshot.records["evaluation"], *snapshot.broken}, layout.folder("evaluation"))
    for number in range(0, max(evaluated, default=0), every) if every else ():
        if number not in seen:
            key = layout.key("evaluation", state=PolicyVersion(number, 0))
            mending = mend.deployment("evaluate")
            yield Finding("missing", key, f"an evaluation of version {number}", "no such object", mending)


def _versions(keys: Iterable[str], folder: str) -> set[int]:
    """The numbers of those `keys` that lie in `folder`."""
    return {v.number for key in keys if key.startswith(f"{folder}/") and (v := parse_version(key)) is not None}


Shards = Mapping[IndexRange, Manifest]


def check_conservation(snapshot: RunView, config: RunConfig | None, mend: Mend) -> list[Finding]:
    """Shards that overlap, scores without trajectories, indices trained twice or without data, counts that differ."""
    trajectories = _shards(snapshot.records["trajectories"])
    by_teacher: dict[str, dict[IndexRange, Manifest]] = {}
    for key, manifest in snapshot.records["scores"].items():
        by_teacher.setdefault(parse(key).fields["teacher"], {}).update(_shards({key: manifest}))
    findings = [*_overlaps(snapshot, snapshot.layout.trajectories, trajectories, mend)]
    for teacher, scores in by_teacher.items():
        folder = snapshot.layout.scores(teacher)
        findings += _overlaps(snapshot, folder, scores, mend)
        findings += _scores_fit(snapshot, folder, scores, trajectories, mend)
    steps = snapshot.steps()
    findings += _trained_once(snapshot, steps, mend)
    findings += _has_data(snapshot, snapshot.layout.trajectories, trajectories, steps, config, mend)
    teacher_of_run = config.teacher.name if config else next(iter(by_teacher), None)
    if teacher_of_run is not None:
        scores = by_teacher.get(teacher_of_run, {})
        findings += _has_data(snapshot, snapshot.layout.scores(teacher_of_run), scores, steps, config, mend)
        if config is not None and config.staleness.order == "index":
            findings += _follows_the_plan(snapshot, steps, scores, config, mend)
    if not findings:
        # Last, because whatever else is wrong shows in the ledger too, without saying how to mend it.
        findings += _impossible_moves(snapshot, teacher_of_run, mend)
    return findings


def _shards(manifests: Mapping[str, Manifest]) -> dict[IndexRange, Manifest]:
    return {shard: manifest for key, manifest in manifests.items() if (shard := parse_shard(key)) is not None}


def _overlaps(snapshot: RunView, folder: str, shards: Shards, mend: Mend) -> Iterator[Finding]:
    last: IndexRange | None = None
    for shard in sorted(shards):
        if last is not None and shard.start < last.stop:
            key = snapshot.layout.shard_manifest(folder, shard)
            found = f"a second shard for indices from {shard.start}, beside {last.name}"
            yield Finding("overlap", key, "one shard for every index", found, mend.quarantine(key))
        last = shard if last is None or shard.stop > last.stop else last


def _scores_fit(snapshot: RunView, folder: str, scores: Shards, trajectories: Shards, mend: Mend) -> Iterator[Finding]:
    """Scores belong to a stored shard, count its tokens, and come from one teacher."""
    digests = sorted({manifest.facts.teacher_digests for manifest in scores.values()} - {()})
    for shard, manifest in sorted(scores.items()):
        key = snapshot.layout.shard_manifest(folder, shard)
        rolled_out = trajectories.get(shard)
        trajectories_key = snapshot.layout.shard_manifest(snapshot.layout.trajectories, shard)
        if rolled_out is None:
            if trajectories_key not in snapshot.broken:
                found = "no such object, but scores of it"
                yield Finding(
                    "missing",
                    trajectories_key,
                    f"trajectories of {shard.name}",
                    found,
                    mend.quarantine(trajectories_key),
                )
            continue
        counts = [(m.facts.num_rows, m.facts.num_tokens) for m in (rolled_out, manifest)]
        if counts[0][0] == counts[1][0] and counts[0] != counts[1]:
            expected = f"scores of the {counts[0][1]} tokens of {trajectories_key}"
            yield Finding("mismatch", key, expected, f"scores of {counts[1][1]}", mend.quarantine(key))
        own = manifest.facts.teacher_digests
        if own and own != digests[0]:
            expected = f"scores by teacher {digests[0]}, as in other shards"
            yield Finding("mismatch", key, expected, f"scores by teacher {own}", mend.quarantine(key))


def _trained_once(snapshot: RunView, steps: Iterable[TrainStep], mend: Mend) -> Iterator[Finding]:
    owner: dict[int, int] = {}
    for step in steps:
        taken = [index for index in step.indices.indices if index in owner]
        if taken:
            key = snapshot.layout.step(step.step, step.rewind)
            found = f"index {taken[0]} and {len(taken) - 1} more, which step {owner[taken[0]]} had before"
            yield Finding("overlap", key, "indices that no other step decided about", found, mend.quarantine(key))
        owner.update(dict.fromkeys(step.indices.indices, step.step))


def _impossible_moves(snapshot: RunView, teacher: str | None, mend: Mend) -> Iterator[Finding]:
    """What the ledger refuses: trained and dropped, trained without having been scored, and whatever else cannot be."""
    if snapshot.broken:
        return  # what a broken record said is missing from the ledger, and the record is a finding already
    for violation in Ledger.fold(events_of(snapshot, teacher)).violations():
        expected = "moves that storage/maintain/ledger.py draws"
        yield Finding("ledger", snapshot.layout.root, expected, str(violation), mend.resume())


def _has_data(
    snapshot: RunView,
    folder: str,
    shards: Shards,
    steps: Iterable[TrainStep],
    config: RunConfig | None,
    mend: Mend,
) -> Iterator[Finding]:
    """Every trained index lies in a shard, if only one whose data was removed on purpose."""
    there = {index for shard in shards for index in shard.indices}
    there |= {i for key in snapshot.broken if key.startswith(f"{folder}/") for i in _indices(key)}
    trained = {index: step.step for step in steps for index in step.indices.indices if index not in step.dropped}
    size = config.rollout.shard_size if config else 1
    for number in sorted({index // size for index in trained.keys() - there}):
        shard = IndexRange(number * size, (number + 1) * size)
        key = snapshot.layout.shard_manifest(folder, shard)
        step = next(trained[index] for index in shard.indices if index in trained)
        expected = f"the data of {shard.name}, which step {step} trained"
        rolled_out = snapshot.layout.shard_manifest(snapshot.layout.trajectories, shard)
        # Scores can be made again from trajectories that are there; trajectories cannot be made again.
        can_score = folder != snapshot.layout.trajectories and rolled_out in snapshot.records["trajectories"]
        advice = mend.deployment("score") if can_score else mend.quarantine(key)
        yield Finding("missing", key, expected, "no such object", advice)


def _indices(key: str) -> Iterable[int]:
    shard = parse_shard(key)
    return shard.indices if shard else ()


def _follows_the_plan(
    snapshot: RunView, steps: Iterable[TrainStep], scores: Shards, config: RunConfig, mend: Mend
) -> Iterator[Finding]:
    """Index order: step s trains [s·B, (s+1)·B), all tokens of it, none staler than τ."""
    plan = config.plan
    for step in steps:
        key = snapshot.layout.step(step.step, step.rewind)
        ages, total = step.staleness_tokens, sum(step.staleness_tokens.values())
        counted = [scores[shard].facts.num_tokens for shard in plan.shards_of_step(step.step) if shard in scores]
        counts: list[int] = [count for count in counted if count is not None]
        is_whole = len(counts) == len(plan.shards_of_step(step.step)) and not step.dropped
        stored = sum(counts) if is_whole else step.num_tokens
        for expected, found in (
            (f"indices {plan.step(step.step).name}", f"indices {step.indices.name}"),
            (f"{step.num_tokens} tokens", f"{total} tokens"),
            (f"{stored} tokens in its shards", f"{step.num_tokens} tokens in its shards"),
        ):
            if expected != found:
                yield Finding("mismatch", key, expected, found, mend.quarantine(key))
        if ages and not 0 <= min(ages) <= max(ages) <= plan.max_staleness:
            expected = f"staleness from 0 to {plan.max_staleness} versions"
            found = f"from {min(ages)} to {max(ages)}"
            yield Finding("mismatch", key, expected, found, mend.quarantine(key))
