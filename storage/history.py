"""What is known of a run at one moment, and the two rules that follow from it: who is alive, and where the run is.

    a worker's heartbeat --is_alive--> does it give signs of life?
    History, and what a user asked --status_of--> queued | running | pausing | paused | cancelling | cancelled | ...

Page, terminal, report, SQL rows and maintenance all ask these; nobody has a rule of their own.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asyncopd.records import Failure, Heartbeat, Rewind, RunState
from asyncopd.types import Evaluation, TrainStep
from storage.runs import StateRequest

RunStatus = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]
SILENT_S, STARTING_S = 30.0, 120.0
"""Without a sign of life for so long, a run's processes count as gone; longer where its roles may just be starting."""
STEP, FINISHED, NUM_TOKENS = "step", "finished", "num_tokens"
"""Columns that every step has. Metrics have a slash in their names, so that these cannot be one."""


def is_alive(beat: Heartbeat, *, lease_s: float, now: float) -> bool:
    """Does this worker give signs of life? It did not retire, and its last heartbeat is younger than the run's lease,
    after which others may take its work over. `now` is Unix time, seconds."""
    return not beat.retired and now - beat.beaten < lease_s


def status_of(history: History, num_steps: int, request: StateRequest | None, now: float | None = None) -> RunStatus:
    """The state of a run: what its flow recorded, what a user asked since, and whether anything works on it still.

    Args:
        num_steps: planned.
        request: what a user last asked of the run.
        now: Unix time, seconds.
    """
    state = history.states[-1] if history.states else None
    if state is None:
        # A replay has no flow of its own that would record its state.
        return "succeeded" if history.is_trained(num_steps) else "running" if history.steps else "queued"
    if state.state == "completed":
        return "succeeded"
    asked = request.state if request is not None and request.recorded > state.recorded else None
    # A flow that died with its machine records nothing more: what was asked of it counts as done.
    is_gone = state.ended or is_silent(history, None if asked == "running" else request, now)
    if asked == "running" and is_gone:
        return "queued"  # resumed, and its flow has not begun
    if state.state == "failed":
        return "failed"
    if state.state == "stopped":
        return "paused" if request is not None and request.state == "paused" else "cancelled"
    if asked in (None, "running"):
        return "running"
    if asked == "paused":
        return "paused" if is_gone else "pausing"
    return "cancelled" if is_gone else "cancelling"


def is_silent(history: History, request: StateRequest | None = None, now: float | None = None) -> bool:
    """Was there no sign of life for so long that the processes must be gone? A request gives them time to follow it."""
    beats = history.beats.values()
    signs = [*(state.recorded for state in history.states[-1:]), *(beat.beaten for beat in beats)]
    signs += [request.recorded] if request is not None else []
    patience_s = SILENT_S if any(not beat.retired for beat in beats) else STARTING_S
    return (time.time() if now is None else now) - max(signs, default=0.0) > patience_s


def role_of(beat: Heartbeat) -> str:
    """The role of a worker: as it says itself, else as its name begins."""
    return beat.status.role or beat.worker.partition("-")[0]


class Columns:
    """Values of the first `num` steps of a lineage. Appended in place: an older value of this class is a prefix."""

    def __init__(self, columns: dict[str, array[float]] | None = None, num: int = 0) -> None:
        self._columns = {} if columns is None else columns
        self.num = num

    def extended(self, steps: Sequence[TrainStep], num_kept: int) -> Columns:
        """The columns of `steps`, of which the first `num_kept` are in these. One caller at a time."""
        # What a rewind took away may still be read by somebody: that needs columns of its own.
        columns = self._columns if num_kept == self.num else {n: c[:num_kept] for n, c in self._columns.items()}
        for place, step in enumerate(steps[num_kept:], start=num_kept):
            own = {STEP: step.step, FINISHED: step.finished, NUM_TOKENS: step.num_tokens}
            for name, value in {**own, **step.metrics}.items():
                column = columns.setdefault(name, array("d"))
                del column[place:]  # left by a look that failed halfway
                column.extend([math.nan] * (place - len(column)))
                column.append(value)
        return Columns(columns, len(steps))

    def metrics(self) -> list[str]:
        """Names of the metrics, sorted."""
        return sorted(name for name in list(self._columns) if name not in (STEP, FINISHED, NUM_TOKENS))

    def values(self, name: str) -> NDArray[np.float64]:
        """One value a step, NaN where a step has none; a copy."""
        found = np.full(self.num, np.nan)
        stored = self._columns[name][: self.num] if name in self._columns else array("d")
        found[: len(stored)] = stored
        return found


@dataclass(frozen=True)
class History:
    """What storage said about a run at one moment."""

    states: Sequence[RunState] = ()
    """Read first: everything else is at least as new, so nothing from before the last state is missing."""
    rewinds: Sequence[Rewind] = ()
    steps: Sequence[TrainStep] = ()
    """Of the surviving lineage, in order."""
    evaluations: Sequence[Evaluation] = ()
    """Of the surviving lineage, by version."""
    failures: Sequence[Failure] = ()
    """Oldest first."""
    beats: Mapping[str, Heartbeat] = field(default_factory=dict)
    """By worker."""
    columns: Columns = field(default_factory=Columns)
    """The numbers of `steps`."""

    @property
    def counters(self) -> tuple[int, ...]:
        """Changes exactly when something happened; heartbeats are not something."""
        return tuple(map(len, (self.states, self.rewinds, self.steps, self.evaluations, self.failures)))

    @property
    def is_over(self) -> bool:
        """Has the flow recorded the end of the run?"""
        return bool(self.states) and self.states[-1].state != "running"

    @property
    def first_step(self) -> int:
        """Number of its first step: not 0 in a replay that begins later."""
        return self.steps[0].step if self.steps else 0

    def is_trained(self, num_steps: int) -> bool:
        """Is every planned step trained?"""
        return bool(self.steps) and self.steps[-1].step + 1 >= num_steps
