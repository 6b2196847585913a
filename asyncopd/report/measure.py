"""From what was observed to the figures of a Summary: pure arithmetic on values in memory, without matplotlib."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncopd.config import RunConfig
from asyncopd.report.summary import (
    Incidents,
    Lengths,
    Orchestration,
    Quality,
    RoleTime,
    StalenessFigures,
    Summary,
    Tokens,
)
from asyncopd.types import Evaluation, Example, IntArray, Span, TrainStep

PIPELINE = ("rollout", "score", "learn")
"""The roles whose overlap is the point of the platform."""
STANDSTILL_S = 30.0
"""A stretch this long without any span is a pause of the run, and the report says so."""

Interval = tuple[float, float]
"""Start and end, Unix seconds."""
WAIT = "wait:"
ORCHESTRATE = "orchestrate:"


# -- what is measured ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Responses:
    """Lengths of the responses in the shards that were read."""

    lengths_B: IntArray
    """[B] response tokens, EOS included, in index order."""
    stopped_B: NDArray[np.bool_]
    """[B] ended with EOS rather than at the limit."""
    num_shards_read: int
    num_shards: int
    problems: tuple[str, ...]
    """Why shards that should have been read were not."""


@dataclass(frozen=True)
class Observations:
    """One run, read at one moment; `flows.report.observe` reads it."""

    run_id: str
    steps: Sequence[TrainStep]
    """Of the surviving lineage, in order."""
    evaluations: Sequence[Evaluation]
    """The same, by version."""
    spans: Sequence[Span]
    """Of all workers, by start."""
    failures: tuple[str, ...]
    """`role: reason`, oldest first."""
    num_rewinds: int
    workers: Mapping[str, int]
    """Role -> processes that ever gave a sign of life."""
    tokens_generated: int
    tokens_scored: int
    responses: Responses

    @functools.cached_property
    def work(self) -> Sequence[Span]:
        """The spans in which rollout, score or learn were busy."""
        return [span for span in self.spans if span.role in PIPELINE and is_busy(span)]

    @functools.cached_property
    def epoch(self) -> float:
        """Unix time at which the pipeline began to work: zero of every wall-time axis. 0 when nothing happened."""
        moments = [span.start for span in self.work] or [step.finished for step in self.steps]
        return min(moments, default=0.0)

    def published_s(self, version: int) -> float | None:
        """Seconds from `epoch` to the end of the step that made `version`; None when that step is not known."""
        if version == 0:
            return 0.0
        return next((step.finished - self.epoch for step in self.steps if step.version.number == version), None)


def measure(seen: Observations, config: RunConfig) -> Summary:
    """The figures of what was observed of a run."""
    work, wall_s = seen.work, None
    if work:
        wall_s = max(span.end for span in work) - min(span.start for span in work) - _paused_s(work)
    trained = sum(step.num_tokens for step in seen.steps)
    names = sorted({span.role for span in seen.spans}, key=lambda r: (PIPELINE.index(r) if r in PIPELINE else 9, r))
    roles = {role: _role_time([span for span in seen.spans if span.role == role], wall_s) for role in names}
    busy_s = sum(roles[role].busy_s for role in PIPELINE if role in roles)
    configured = {"rollout": config.rollout.workers, "score": config.score.workers}
    qualities = [_quality(evaluation) for evaluation in seen.evaluations]
    return Summary(
        run_id=seen.run_id,
        num_steps=len(seen.steps),
        num_steps_planned=config.learner.num_steps,
        max_staleness=config.staleness.max_staleness,
        wall_s=wall_s,
        overlap=busy_s / wall_s if wall_s else None,
        first=qualities[0] if qualities else None,
        last=qualities[-1] if qualities else None,
        tokens=Tokens(seen.tokens_generated, seen.tokens_scored, trained, trained / wall_s if wall_s else None),
        roles=roles,
        orchestration=_orchestration(seen.spans, roles),
        staleness=staleness_of(seen.steps),
        lengths=_lengths(seen.responses),
        incidents=Incidents(
            failures=seen.failures,
            num_extra_workers=sum(max(0, num - configured.get(role, 1)) for role, num in seen.workers.items()),
            num_rewinds=seen.num_rewinds,
            dropped=dict(Counter(reason for step in seen.steps for reason in step.dropped.values())),
            held=dict(Counter(reason for step in seen.steps for reason in step.held.values())),
        ),
        notes=tuple(_notes(seen, config)),
        order=config.staleness.order,
        on_stale=config.staleness.on_stale,
        examples=_examples(seen.evaluations),
    )


def _examples(evaluations: Sequence[Evaluation]) -> tuple[tuple[Example, Example | None], ...]:
    first, last = (evaluations[0].examples, evaluations[-1].examples) if evaluations else ((), ())
    return tuple(zip(first, last if len(evaluations) > 1 else itertools.repeat(None), strict=False))


def trained_per_s(steps: Sequence[TrainStep]) -> float | None:
    """Response tokens trained per second between the end of the first of `steps` and that of the last; None for fewer
    than two. The report's throughput is over wall time instead, which leaves out the pauses of a run."""
    seconds = steps[-1].finished - steps[0].finished if steps else 0.0
    return sum(step.num_tokens for step in steps[1:]) / seconds if seconds > 0 else None


def staleness_of(steps: Sequence[TrainStep]) -> StalenessFigures:
    """How old the tokens of `steps` were; the mean is over tokens, not over steps."""
    tokens: Counter[int] = Counter()
    for step in steps:
        tokens.update(step.staleness_tokens)
    total = sum(tokens.values())
    return StalenessFigures(
        tokens=dict(sorted(tokens.items())),
        mean_versions=sum(s * n for s, n in tokens.items()) / total if total else None,
        max_versions=max(tokens, default=None),
    )


# -- quality ------------------------------------------------------------------------------------------------------
def accuracy_standard_error(evaluation: Evaluation) -> float:
    """Binomial standard error of the accuracy, fraction; NaN without a verifier."""
    return math.sqrt(evaluation.accuracy * (1 - evaluation.accuracy) / evaluation.num_prompts)


def _quality(evaluation: Evaluation) -> Quality:
    return Quality(
        version=evaluation.version.number,
        num_prompts=evaluation.num_prompts,
        accuracy=_known(evaluation.accuracy),
        accuracy_standard_error=_known(accuracy_standard_error(evaluation)),
        accuracy_by_group={g: v for g, v in evaluation.accuracy_by_group.items() if math.isfinite(v)},
        kl_nats=_known(evaluation.kl_nats),
        kl_standard_error_nats=_known(evaluation.kl_standard_error_nats),
        mean_response_tokens=_known(evaluation.mean_response_tokens),
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- time ---------------------------------------------------------------------------------------------------------
def _role_time(spans: Sequence[Span], wall_s: float | None) -> RoleTime:
    busy_s, alive_s = 0.0, 0.0
    waiting_s: dict[str, float] = {}
    workers = by_worker(spans)
    for own in workers.values():
        busy = covered_by(filter(is_busy, own))
        busy_s += length_s(busy)
        alive_s += max(span.end for span in own) - min(span.start for span in own)
        for what in sorted({kind(span) for span in own if is_wait(span)}):
            waits = covered_by(span for span in own if is_wait(span) and kind(span) == what)
            waiting_s[what] = waiting_s.get(what, 0.0) + length_s(difference(waits, busy))
    return RoleTime(len(workers), alive_s, busy_s, busy_s / wall_s if wall_s else None, waiting_s)


def _orchestration(spans: Sequence[Span], roles: Mapping[str, RoleTime]) -> Orchestration:
    alive_s = sum(roles[role].alive_s for role in PIPELINE if role in roles)
    if not alive_s:
        return Orchestration(share=None, share_by_kind={}, exposed_share=None)
    seconds: dict[str, float] = {}
    exposed_s = 0.0
    for own in by_worker(span for span in spans if span.role in PIPELINE).values():
        overhead = [span for span in own if is_orchestration(span)]
        for span in overhead:
            seconds[kind(span)] = seconds.get(kind(span), 0.0) + span.end - span.start
        exposed_s += length_s(difference(covered_by(overhead), covered_by(filter(is_busy, own))))
    return Orchestration(
        share=sum(seconds.values()) / alive_s,
        share_by_kind={name: seconds[name] / alive_s for name in sorted(seconds, key=lambda n: -seconds[n])},
        exposed_share=exposed_s / alive_s,
    )


# -- tokens -------------------------------------------------------------------------------------------------------
def _lengths(responses: Responses) -> Lengths:
    lengths_B, num_shards_read, num_shards = responses.lengths_B, responses.num_shards_read, responses.num_shards
    if not len(lengths_B):
        return Lengths(0, num_shards_read, num_shards)
    return Lengths(
        num_responses=len(lengths_B),
        num_shards_read=num_shards_read,
        num_shards=num_shards,
        mean_tokens=float(lengths_B.mean()),
        p99_tokens=float(np.percentile(lengths_B, 99)),
        max_tokens=int(lengths_B.max()),
        stopped_fraction=float(responses.stopped_B.mean()),
    )


# -- what the reader must know ------------------------------------------------------------------------------------
def _notes(seen: Observations, config: RunConfig) -> list[str]:
    notes = list(config.caveats)
    planned = config.learner.num_steps
    if len(seen.steps) < planned:
        notes.append(
            f"The run stopped after {len(seen.steps)} of {planned} steps; everything below is about what was done. "
            f"`prefect deployment run asyncopd/train -p run_id={seen.run_id}` goes on with it."
        )
    if not seen.evaluations:
        why = "evaluate.every is 0" if config.evaluate.every == 0 else "the run ended before the first was finished"
        notes.append(f"There are no evaluations ({why}), so accuracy and held-out KL are not known.")
    elif len(seen.evaluations) == 1:
        notes.append(f"Only version {seen.evaluations[0].version.number} was evaluated: there is no before and after.")
    elif seen.evaluations[-1].version.number < planned:
        notes.append(f"The last evaluated version is {seen.evaluations[-1].version.number}, not {planned}.")
    if seen.evaluations and not math.isfinite(seen.evaluations[-1].accuracy):
        notes.append("The task has no verifier, so accuracy is not known.")
    if not seen.work:
        notes.append("No timeline was stored, so wall time, throughput and overlap are not known.")
    elif (paused_s := _paused_s(seen.spans)) > 0:
        notes.append(
            f"Nothing ran for {paused_s:.0f} s in pauses of more than {STANDSTILL_S:.0f} s (a stop and a later "
            "resumption). Wall time, throughput and overlap leave them out."
        )
    read, total = seen.responses.num_shards_read, seen.responses.num_shards
    if not total:
        notes.append("No trajectory shard was published, so response lengths are not known.")
    elif read < total:
        notes.append(f"Response lengths are from {read} of {total} shards, spread evenly over the run.")
    return notes + [f"A shard could not be read: {problem}" for problem in seen.responses.problems]


def _paused_s(spans: Sequence[Span]) -> float:
    covered = covered_by(span for span in spans if span.role in PIPELINE)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(covered)]
    return sum(gap for gap in gaps if gap > STANDSTILL_S)


# -- sets of wall time: sorted, disjoint intervals, and the spans they come from --------------------------------------
def is_busy(span: Span) -> bool:
    """Is this span the role's own work, rather than waiting or overhead?"""
    return not span.activity.startswith((WAIT, ORCHESTRATE))


def is_wait(span: Span) -> bool:
    return span.activity.startswith(WAIT)


def is_orchestration(span: Span) -> bool:
    return span.activity.startswith(ORCHESTRATE)


def kind(span: Span) -> str:
    """`scores` of `wait:scores`, `prefect` of `orchestrate:prefect`, `train` of `train`."""
    return span.activity.partition(":")[2] or span.activity


def union(intervals: Iterable[Interval], gap_s: float = 0.0) -> list[Interval]:
    """The time covered by any of `intervals`, sorted and disjoint; those at most `gap_s` apart are made one."""
    covered: list[Interval] = []
    for start, end in sorted(intervals):
        if covered and start - covered[-1][1] <= gap_s:
            covered[-1] = (covered[-1][0], max(end, covered[-1][1]))
        elif end > start:
            covered.append((start, end))
    return covered


def difference(kept: Iterable[Interval], removed: Iterable[Interval]) -> list[Interval]:
    """The time covered by `kept` but not by `removed`."""
    left: list[Interval] = []
    holes = union(removed)
    first = 0
    for start, end in union(kept):
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        at = first
        while at < len(holes) and holes[at][0] < end:
            if holes[at][0] > start:
                left.append((start, holes[at][0]))
            start = max(start, holes[at][1])
            at += 1
        if start < end:
            left.append((start, end))
    return left


def length_s(intervals: Iterable[Interval]) -> float:
    """Σ of the lengths; the intervals may overlap and then count twice."""
    return sum(end - start for start, end in intervals)


def covered_by(spans: Iterable[Span]) -> list[Interval]:
    """The time in which any of `spans` ran."""
    return union((span.start, span.end) for span in spans)


def by_worker(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Spans of each worker, workers in order of their first span."""
    grouped: dict[str, list[Span]] = {}
    for span in spans:
        grouped.setdefault(span.worker, []).append(span)
    return grouped


def packed(spans: Sequence[Span]) -> list[list[Span]]:
    """`spans` on as few tracks as first fit finds, so that no two on one track overlap."""
    tracks: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: s.start):
        for track in tracks:
            if track[-1].end <= span.start:
                track.append(span)
                break
        else:
            tracks.append([span])
    return tracks
