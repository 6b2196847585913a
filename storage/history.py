"""What is known of a run at one moment, and the rules that follow from it: who is alive, and where the run is.

    a worker's heartbeat --is_alive--> does it give signs of life?  --activity--> what it does, in words
    History --eta_s--> time left
    History, and what a user asked --status_of--> queued | running | pausing | paused | cancelling | cancelled | ...

Page, terminal, report, SQL rows and maintenance all ask these; nobody has a rule of their own.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asyncopd.records import Failure, Heartbeat, Rewind, RunState, WorkerStatus
from asyncopd.schedule import Plan
from asyncopd.types import Evaluation, TrainStep
from storage.runs import StateRequest

RunStatus = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]
SILENT_S, STARTING_S = 30.0, 120.0
"""Without a sign of life for so long, a run's processes count as gone; longer where its roles may just be starting."""
RECENT_STEPS = 20
"""Page and terminal show throughput and staleness of this many last steps; the report, of all of them."""
_PLACES = {"pretrain": 0, "rollout": 1, "score": 2, "learn": 3, "evaluate": 4}
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


def activity(status: WorkerStatus) -> str:
    """What a worker does, in words; what its next piece of work waits for is not among them."""
    done = f"{status.num_trajectories or 0:,} responses done"
    told = [status.doing] if status.doing else []
    match status.role:
        case "rollout" if status.version is not None:
            told.append(f"samples with version {status.version}, {done}")
        case "score" if status.teacher is not None:
            told.append(f"scores with {status.teacher}, {done}")
        case "learn" if status.step is not None:
            told.append(f"{status.step} of {status.num_steps} steps done")
        case "evaluate" if status.version is not None:
            told.append(f"version {status.version} evaluated")
        case "pretrain" if status.model is not None:
            told.append(f"makes the {status.model}, step {status.step or 0:,} of {status.num_steps or 0:,}")
    if status.num_begun or status.num_tokens_in_flight:
        told.append(f"{status.num_begun or 0:,} responses begun, {status.num_tokens_in_flight or 0:,} tokens in flight")
    if status.tokens_per_s is not None and status.role in ("rollout", "score"):
        told.append(f"{pace(status.tokens_per_s)} tokens/s")
    return "; ".join(told) or "starting"


def doing(beat: Heartbeat) -> str:
    """The role of a worker, what it does and what it waits for, in words."""
    waits = f", waits for {beat.status.waiting_for}" if beat.status.waiting_for else ""
    return f"{role_of(beat)} {activity(beat.status)}{waits}"


def pace(tokens_per_s: float | None) -> str:
    """A rate as people read it: never 0, a dash while it is not known."""
    if tokens_per_s is None:
        return "–"
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 9.5 else f"{tokens_per_s:.2g}"


def eta_s(history: History, plan: Plan) -> float | None:
    """Seconds until the last step, by the time the last steps took; None while nothing is known of it.

    Before two steps are trained: what the first finished shard says of the length of responses, times those that are
    missing, at the rate of the slowest of sampling, scoring and training.
    """
    recent = history.steps[-RECENT_STEPS:]
    left = plan.num_steps - 1 - recent[-1].step if recent else plan.num_steps
    if left <= 0:
        return 0.0
    if gaps := [after.finished - before.finished for before, after in itertools.pairwise(recent)]:
        # The median, because a resumed run has one gap that is hours long.
        return left * statistics.median(gaps)
    beats = list(history.beats.values())

    def total(role: str, *names: str) -> int:
        return sum(getattr(beat.status, name) or 0 for beat in beats if role_of(beat) == role for name in names)

    num_responses = total("rollout", "num_trajectories")
    if not num_responses:
        return None
    length = total("rollout", "num_tokens") / num_responses
    missing = left * plan.batch_size * length + sum(step.num_tokens for step in recent)
    found = []
    for role, *done in (
        ("rollout", "num_tokens", "num_tokens_in_flight"),
        ("score", "num_tokens"),
        ("learn", "num_tokens"),
    ):
        mine = [beat.status for beat in beats if role_of(beat) == role and not beat.retired]
        # One that mostly waits for the others goes at their pace.
        mine = [status for status in mine if status.busy is None or status.busy >= 0.5]
        if rate := sum(status.tokens_per_s or 0.0 for status in mine):
            found.append(max(0.0, missing - total(role, *done)) / rate)
    return max(found, default=None)


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
    def workers(self) -> list[Heartbeat]:
        """The last heartbeats of those that did not retire, in the order of the pipeline."""
        beats = (beat for beat in self.beats.values() if not beat.retired)
        return sorted(beats, key=lambda beat: (_PLACES.get(role_of(beat), len(_PLACES)), beat.worker))

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
