"""Sets of wall time as sorted, disjoint (start, end) pairs: union, difference, length; and the spans they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncopd.types import Span

Interval = tuple[float, float]
"""Start and end, Unix seconds."""
WAIT = "wait:"
ORCHESTRATE = "orchestrate:"


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
