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
from storage.layout import parse, parse_shard
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
        self.verified: dict[tuple[Any, ...], list[Finding]] = {}
        """(key, its entry, what promises it) -> what was found, of every data object that was read."""

    def check(self, view: RunView) -> list[Finding]:
        """Everything that a manifest of the run promises."""
        findings = [finding for key, m in view.manifests.items() for finding in self._check_promises(key, m)]
        promised = sorted(view.references.items())
        with ThreadPoolExecutor(_READERS) as readers:
            results = readers.map(lambda item: self._check_data(view, *item), promised)
            for done, ((key, _), found) in enumerate(zip(promised, results, strict=True), start=1):
                self._on_progress(done, len(promised), key)
                findings += found
        return findings

    def check_manifest(self, manifest_key: str) -> list[Finding]:
        """What one manifest outside the run promises, if there is such a manifest."""
        try:
            manifest = find_manifest(self._store, manifest_key)
        except StorageError as error:
            return [self._mend.finding("corrupt", manifest_key, "a manifest that can be read", str(error))]
        promises = manifest.objects if manifest else {}
        return [
            finding
            for key, promise in promises.items()
            for finding in self._check_body(key, self._store.find(key), manifest_key, promise)
        ]

    def _check_promises(self, key: str, manifest: Manifest) -> Iterator[Finding]:
        """Does the manifest name as many objects as its kind has?"""
        if manifest.kind in ("trajectories", "scores"):
            expected = 0 if manifest.facts.removed else 1
            if (found := len(manifest.objects)) != expected:
                yield self._mend.finding("mismatch", key, f"{expected} data objects", f"{found} data objects")
        elif not manifest.objects:
            yield self._mend.finding("mismatch", key, "at least one data object", "none")

    def _check_data(self, view: RunView, key: str, manifest_keys: list[str]) -> list[Finding]:
        manifests = {name: m for name in manifest_keys if (m := view.manifests.get(name)) is not None}
        entry = view.entries.get(key)
        seen = (key, entry, tuple((name, m.objects[key]["sha256"]) for name, m in manifests.items()))
        if seen in self.verified:
            return self.verified[seen]
        body = self._store.find(key)
        findings: list[Finding] = []
        for manifest_key, manifest in manifests.items():
            bad = self._check_body(key, body, manifest_key, manifest.objects[key])
            findings += bad
            if body is not None and not bad and manifest.kind in ("trajectories", "scores"):
                findings += self._check_rows(key, body, manifest_key, manifest)
        if entry is not None:  # else it came after the listing, or is gone: nothing to remember
            self.verified[seen] = findings
        return findings

    def _check_body(self, key: str, body: bytes | None, manifest_key: str, promise: Mapping[str, Any]) -> list[Finding]:
        mend = self._mend.quarantine(manifest_key)
        expected = f"{promise['size_bytes']} bytes with sha256 {promise['sha256'][:12]} (promised by {manifest_key})"
        if body is None:
            return [Finding("missing", key, expected, "no such object", mend)]
        digest = sha256(body)
        if len(body) == promise["size_bytes"] and digest == promise["sha256"]:
            return []
        return [Finding("corrupt", key, expected, f"{len(body)} bytes with sha256 {digest[:12]}", mend)]

    def _check_rows(self, key: str, body: bytes, manifest_key: str, manifest: Manifest) -> Iterator[Finding]:
        """Rows, indices and tokens of a shard whose bytes are the promised ones."""
        shard: IndexRange = parse(manifest_key).fields["shard"]
        decode = decode_trajectories if manifest.kind == "trajectories" else decode_scores
        try:
            rows: list[Any] = list(decode(body, key))
            check_rows(manifest_key, manifest, shard, [row.index for row in rows])
        except AsyncOPDError as error:
            yield self._mend.finding("corrupt", manifest_key, f"the rows of {shard.name}", str(error))
            return
        lengths = [len(row.response_ids if manifest.kind == "trajectories" else row.sampled_logprobs_T) for row in rows]
        promised = manifest.facts.num_tokens
        if promised is not None and sum(lengths) != promised:
            yield self._mend.finding("mismatch", manifest_key, f"{promised} response tokens", f"{sum(lengths)}")


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
            key, expected = (
                layout.key("evaluation", state=PolicyVersion(number, 0)),
                f"an evaluation of version {number}",
            )
            yield Finding("missing", key, expected, "no such object", mend.deployment("evaluate"))


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
