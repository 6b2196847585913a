"""One run's history in memory: read once, extended by what is new, shown to everybody who asks.

    storage --look, at most every FRESH_S--> History (frozen, replaced as a whole) --> Run, events, curves, timeline

Everything here blocks; the routes call it in threads.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from asyncopd.config import RunConfig
from asyncopd.types import Evaluation, Failure, Heartbeat, IndexRange, Rewind, RunState, Span, TrainStep
from storage.run_log import StoredRunLog

T = TypeVar("T")
FRESH_S = 0.25
"""A history this young is not read again: fifty requests a second cost four looks."""


STEP, FINISHED, NUM_TOKENS = "step", "finished", "num_tokens"
"""Columns that every step has. Metrics have a slash in their names, so that these cannot be one."""


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


def stretches(num: int, max_points: int) -> NDArray[np.int64]:
    """Where each of at most `max_points` stretches of `num` steps begins."""
    return np.arange(0, num, max(1, -(-num // max_points)))


def means(values: NDArray[np.float64], starts: NDArray[np.int64]) -> list[float | None]:
    """Mean of the finite values of each stretch; None where there is none."""
    if not len(values):
        return []
    finite = np.isfinite(values)
    nums = np.add.reduceat(finite, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    return [total / num if num else None for total, num in zip(sums.tolist(), nums.tolist(), strict=True)]


@dataclass(frozen=True)
class History:
    """What storage said about a run at one moment."""

    states: Sequence[RunState] = ()
    """Read first: everything else is at least as new, so nothing from before the last state is missing."""
    rewinds: Sequence[Rewind] = ()
    steps: Sequence[TrainStep] = ()
    """Of the surviving lineage, in order."""
    evaluations: Sequence[Evaluation] = ()
    failures: Sequence[Failure] = ()
    beats: Mapping[str, Heartbeat] = field(default_factory=dict)
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


class RunFold:
    """A run that is looked at."""

    def __init__(self, log: StoredRunLog) -> None:
        self.log = log
        self.config = RunConfig.model_validate(log.config())
        self.history = History()
        self._evaluations: dict[str, Evaluation] = {}
        self._failures: dict[str, Failure] = {}
        self._spans: dict[str, list[Span]] = {}
        self._shard_tokens: dict[str, dict[IndexRange, tuple[float, int]]] = {"generated": {}, "scored": {}}
        self._looked = -FRESH_S
        self._lock = threading.Lock()

    @property
    def is_fresh(self) -> bool:
        """Was storage asked a moment ago?"""
        return time.monotonic() - self._looked < FRESH_S

    @property
    def steps(self) -> Sequence[TrainStep]:
        return self.history.steps

    def refresh(self) -> RunFold:
        """Read what is new, unless that was done a moment ago."""
        with self._lock:
            if not self.is_fresh:
                self.history = self._look(self.history)
                self._looked = time.monotonic()
        return self

    def shard_tokens(self) -> dict[str, list[tuple[float, int]]]:
        """`generated` and `scored` -> (Unix time of publication, tokens) of every shard; each manifest is read once."""
        teacher = self.config.teacher.name
        log = self.log
        for stage, shards, find in (
            ("generated", log.trajectory_shards(), log.find_trajectories),
            ("scored", log.score_shards(teacher), partial(log.find_scores, teacher)),
        ):
            known = self._shard_tokens[stage]
            for shard in shards:
                if shard not in known and (manifest := find(shard)) is not None:
                    known[shard] = (manifest.created, int(manifest.facts["num_tokens"]))
        return {stage: list(known.values()) for stage, known in self._shard_tokens.items()}

    def spans(self) -> list[Span]:
        """All spans of all workers, by start; each object is read once, a worker's last one again."""
        keys = self.log.span_keys()
        with self._lock:
            last = {key.rsplit(".", 2)[0]: key for key in keys}
            # A worker that failed to write its newest object writes it again, with more in it.
            for key in keys:
                if key not in self._spans or key == last[key.rsplit(".", 2)[0]]:
                    self._spans[key] = self.log.read_spans(key)
            return sorted((span for spans in self._spans.values() for span in spans), key=lambda span: span.start)

    def _look(self, known: History) -> History:
        log = self.log
        states = log.run_states()
        if known.is_over and len(states) == len(known.states):
            return known
        if len(states) != len(known.states):
            # A resume may have changed settings, and says that it runs afterwards.
            self.config = RunConfig.model_validate(log.config())
        rewinds = log.rewinds()
        steps = list(known.steps)
        for rewind in rewinds[len(known.rewinds) :]:
            steps = [step for step in steps if step.step < rewind.to_step or step.rewind >= rewind.number]
        num_kept = len(steps)
        if not steps:
            steps = log.steps()
        # A replay's first step has its parent's number.
        while (step := log.find_step(steps[-1].step + 1 if steps else 0)) is not None:
            steps.append(step)
        return History(
            states=states,
            rewinds=rewinds,
            steps=steps,
            evaluations=[_remembered(self._evaluations, key, log.read_evaluation) for key in log.evaluation_keys()],
            failures=[_remembered(self._failures, key, log.read_failure) for key in log.failure_keys()],
            beats=log.heartbeats(),
            columns=known.columns.extended(steps, num_kept),
        )


def _remembered(known: dict[str, T], key: str, read: Callable[[str], T]) -> T:
    """What is stored under `key`, read once: such records never change."""
    if key not in known:
        known[key] = read(key)
    return known[key]
