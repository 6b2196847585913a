"""The timeline of the roles: one lane per worker over wall time, and a few seconds from the middle enlarged.

A dark bar is work, in the colour of the role that does it. A light bar is waiting, in the light colour of the role
that is waited for. The thin strip below each lane is overhead of the platform, which often runs beside the work.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from asyncopd.report.measure import (
    PIPELINE,
    Interval,
    Observations,
    by_worker,
    covered_by,
    difference,
    is_busy,
    is_orchestration,
    is_wait,
    kind,
    union,
)
from asyncopd.report.plots import INK, Page, missing, role_colour, styled, tint
from asyncopd.types import Span, TrainStep

LANES = ("rollout", "score", "learn", "evaluate")
"""Top to bottom. Pre-training is over before the others begin and would only squeeze them; the trace has it."""
MAX_WORKERS = 6
"""Lanes of one role; of more workers the first are drawn. The trace has all."""
_WAITED_FOR = {"version": ("learn", "a policy version"), "scores": ("score", "scores"), "shard": ("rollout", "a shard")}
"""What a wait names -> the role that makes it, and what the legend calls it."""
_HEIGHT, _STRIP = 0.62, 0.13


@dataclass(frozen=True)
class Lane:
    """One worker's row."""

    role: str
    label: str
    spans: Sequence[Span]


@styled
def plot_timeline(seen: Observations) -> bytes:
    """What every worker did, over the whole run and enlarged."""
    lanes = lanes_of(seen.spans)
    page = Page(2, 1, width=14, height=2.6 + 1.0 * len(lanes), sharey=True)
    above, below = page.axes
    if not lanes:
        missing(above, "no timeline was stored")
        missing(below, "")
        return page.png()
    shown = [span for lane in lanes for span in lane.spans]
    _draw(above, lanes, (min(s.start for s in shown), max(s.end for s in shown)), seen.epoch, labels=False)
    above.set_title("Who worked when, whole run")
    window = middle_window(shown, seen.steps)
    _draw(below, lanes, window, seen.epoch, labels=True)
    below.set_title(f"{window[1] - window[0]:.1f} s from the middle")
    below.set_xlabel("wall time since the pipeline began, s")
    above.axvspan(window[0] - seen.epoch, window[1] - seen.epoch, color="#D9D9D9", linewidth=0, zorder=0)
    page.figure.legend(handles=_legend(shown), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return page.png()


def lanes_of(spans: Sequence[Span]) -> list[Lane]:
    """One lane per worker, roles in pipeline order, workers by their first span."""
    lanes = []
    for role in LANES:
        workers = by_worker(span for span in spans if span.role == role)
        for number, own in enumerate(list(workers.values())[:MAX_WORKERS]):
            lanes.append(Lane(role, role if len(workers) == 1 else f"{role} {number}", own))
    return lanes


def middle_window(spans: Sequence[Span], steps: Sequence[TrainStep]) -> Interval:
    """About four learner steps from the middle of the run, at least 2 s and at most 30 s long."""
    busy = [span for span in spans if span.role in PIPELINE and is_busy(span)] or list(spans)
    start, end = min(span.start for span in busy), max(span.end for span in busy)
    moments = [step.finished for step in steps]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    width = min(max(4 * statistics.median(gaps) if gaps else 5.0, 2.0), 30.0, max(end - start, 1e-3))
    middle = moments[len(moments) // 2] if moments and start < moments[len(moments) // 2] < end else (start + end) / 2
    left = min(max(middle - width / 2, start), end - width)
    return left, left + width


def _draw(axes: Axes, lanes: Sequence[Lane], window: Interval, epoch: float, *, labels: bool) -> None:
    # Half a pixel: a gap that cannot be seen is not drawn.
    invisible_s = (window[1] - window[0]) / 2600
    for row, lane in enumerate(lanes):
        spans = [span for span in lane.spans if span.end > window[0] and span.start < window[1]]
        busy = covered_by(filter(is_busy, spans))
        waits = [span for span in spans if is_wait(span)]
        for what in {kind(span) for span in waits}:
            idle = difference(covered_by(span for span in waits if kind(span) == what), busy)
            _bars(axes, idle, row - _HEIGHT / 2, _HEIGHT, tint(waited_for_colour(what)), epoch)
        _bars(axes, union(busy, invisible_s), row - _HEIGHT / 2, _HEIGHT, role_colour(lane.role), epoch)
        overhead = union(covered_by(filter(is_orchestration, spans)), invisible_s)
        _bars(axes, overhead, row + _HEIGHT / 2 + 0.03, _STRIP, "#555555", epoch)
        if labels:
            _label(axes, [*filter(is_busy, spans), *waits], busy, row, window, epoch)
    axes.set_xlim(window[0] - epoch, window[1] - epoch)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(lanes)), [lane.label for lane in lanes])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _bars(
    axes: Axes, intervals: Iterable[Interval], bottom: float, height: float, colour: object, epoch: float
) -> None:
    # Unsnapped: what is narrower than a pixel shows as a paler pixel, rather than as a full one or not at all.
    pieces = [(start - epoch, end - start) for start, end in intervals]
    axes.broken_barh(pieces, (bottom, height), facecolors=colour, linewidth=0, snap=False)


def _label(
    axes: Axes, spans: Sequence[Span], busy: Sequence[Interval], row: int, window: Interval, epoch: float
) -> None:
    """Write into bars what they are, where there is room."""
    seconds_per_letter = (window[1] - window[0]) / 190
    for span in spans:
        waits = is_wait(span)
        if not waits and span.role != "learn":
            continue
        what = span.detail.partition(" (")[0].partition(" to be ")[0]
        texts = (f"waits for {what}", what, kind(span)) if waits else (what, what.removeprefix("step "))
        free = difference([(span.start, span.end)], busy) if waits else [(span.start, span.end)]
        visible = [(max(start, window[0]), min(end, window[1])) for start, end in free]
        start, end = max(visible, key=lambda piece: piece[1] - piece[0], default=(0.0, 0.0))
        text = next((text for text in texts if end - start > seconds_per_letter * (len(text) + 1)), "")
        colour = INK if waits else "white"
        axes.text((start + end) / 2 - epoch, row, text, ha="center", va="center", fontsize=8, color=colour)


def waited_for_colour(what: str) -> str:
    """Colour of the role that makes `what`."""
    return role_colour(_WAITED_FOR[what][0] if what in _WAITED_FOR else "")


def _legend(spans: Sequence[Span]) -> list[Patch]:
    roles = [role for role in LANES if any(span.role == role and is_busy(span) for span in spans)]
    names = {what: f"{name} ({role})" for what, (role, name) in _WAITED_FOR.items()}
    waits = sorted({kind(span) for span in spans if is_wait(span)})
    handles = [Patch(color=role_colour(role), label=f"{role} works") for role in roles]
    handles += [
        Patch(color=tint(waited_for_colour(what)), label=f"waits for {names.get(what, what)}") for what in waits
    ]
    if any(map(is_orchestration, spans)):
        handles.append(Patch(color="#555555", label="overhead (strip below)"))
    return handles
