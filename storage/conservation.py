"""Conservation: every index of a run is in exactly one state (asyncopd/ledger.py), and the records of it agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from asyncopd.config import RunConfig
from asyncopd.ledger import Ledger
from asyncopd.types import IndexRange, Manifest, TrainStep
from storage.findings import Finding, Mend
from storage.layout import parse_shard
from storage.ledger import events_of_snapshot
from storage.snapshot import Snapshot

Shards = Mapping[IndexRange, Manifest]


def check_conservation(snapshot: Snapshot, config: RunConfig | None, mend: Mend) -> list[Finding]:
    """Shards that overlap, scores without trajectories, indices trained twice or without data, counts that differ."""
    trajectories = _shards(snapshot.records["trajectories"])
    by_teacher: dict[str, dict[IndexRange, Manifest]] = {}
    for key, manifest in snapshot.records["scores"].items():
        by_teacher.setdefault(snapshot.layout.parse_teacher(key), {}).update(_shards({key: manifest}))
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


def _overlaps(snapshot: Snapshot, folder: str, shards: Shards, mend: Mend) -> Iterator[Finding]:
    last: IndexRange | None = None
    for shard in sorted(shards):
        if last is not None and shard.start < last.stop:
            key = snapshot.layout.shard_manifest(folder, shard)
            found = f"a second shard for indices from {shard.start}, beside {last.name}"
            yield Finding("overlap", key, "one shard for every index", found, mend.quarantine(key))
        last = shard if last is None or shard.stop > last.stop else last


def _scores_fit(snapshot: Snapshot, folder: str, scores: Shards, trajectories: Shards, mend: Mend) -> Iterator[Finding]:
    """Scores belong to a stored shard, count its tokens, and come from one teacher."""
    digests = sorted({tuple(manifest.facts.get("teacher_digests", ())) for manifest in scores.values()} - {()})
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
        counts = [tuple(m.facts.get(name) for name in ("num_rows", "num_tokens")) for m in (rolled_out, manifest)]
        if counts[0][0] == counts[1][0] and counts[0] != counts[1]:
            expected = f"scores of the {counts[0][1]} tokens of {trajectories_key}"
            yield Finding("mismatch", key, expected, f"scores of {counts[1][1]}", mend.quarantine(key))
        own = tuple(manifest.facts.get("teacher_digests", ()))
        if own and own != digests[0]:
            expected = f"scores by teacher {digests[0]}, as in other shards"
            yield Finding("mismatch", key, expected, f"scores by teacher {own}", mend.quarantine(key))


def _trained_once(snapshot: Snapshot, steps: Iterable[TrainStep], mend: Mend) -> Iterator[Finding]:
    owner: dict[int, int] = {}
    for step in steps:
        taken = [index for index in step.indices.indices if index in owner]
        if taken:
            key = snapshot.layout.step(step.step, step.rewind)
            found = f"index {taken[0]} and {len(taken) - 1} more, which step {owner[taken[0]]} had before"
            yield Finding("overlap", key, "indices that no other step decided about", found, mend.quarantine(key))
        owner.update(dict.fromkeys(step.indices.indices, step.step))


def _impossible_moves(snapshot: Snapshot, teacher: str | None, mend: Mend) -> Iterator[Finding]:
    """What the ledger refuses: trained and dropped, trained without having been scored, and whatever else cannot be."""
    if snapshot.broken:
        return  # what a broken record said is missing from the ledger, and the record is a finding already
    for violation in Ledger.fold(events_of_snapshot(snapshot, teacher)).violations():
        expected = "moves that asyncopd/ledger.py draws"
        yield Finding("ledger", snapshot.layout.root, expected, str(violation), mend.resume())


def _has_data(
    snapshot: Snapshot,
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
    snapshot: Snapshot, steps: Iterable[TrainStep], scores: Shards, config: RunConfig, mend: Mend
) -> Iterator[Finding]:
    """Index order: step s trains [s·B, (s+1)·B), all tokens of it, none staler than τ."""
    plan = config.plan
    for step in steps:
        key = snapshot.layout.step(step.step, step.rewind)
        ages, total = step.staleness_tokens, sum(step.staleness_tokens.values())
        counted = [scores[shard].facts.get("num_tokens") for shard in plan.shards_of_step(step.step) if shard in scores]
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
