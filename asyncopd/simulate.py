"""The pipeline as a discrete-event simulation: the real scheduling rule under given durations, on a simulated clock.

shard admitted -> its indices take free slots in order -> produced -> scored (one teacher) -> trained (one learner)
                                                                               publishes the next version <--+
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from asyncopd.errors import DeadlineError
from asyncopd.schedule import Plan
from asyncopd.types import IndexRange


@dataclass(frozen=True)
class Durations:
    """How long each piece of work takes, seconds."""

    sample_s: Callable[[int], float]
    """Of one trajectory, by index."""
    score_s: Callable[[IndexRange], float]
    """Of one shard."""
    train_s: Callable[[int], float]
    """Of one learner step, publication included."""


@dataclass(frozen=True)
class Simulation:
    """What happened, on the simulated clock."""

    started_under: tuple[int, ...]
    """Index -> the policy version it started under."""
    trained_at: tuple[float, ...]
    """Step -> time its version was published, seconds."""
    sampling_s: float
    """Σ over slots of time spent sampling."""
    scoring_s: float
    training_s: float

    @property
    def wall_s(self) -> float:
        return self.trained_at[-1]


def simulate(plan: Plan, durations: Durations, *, num_slots: int) -> Simulation:
    """Run `plan` to its end with one engine of `num_slots` slots, one teacher and one learner.

    Raises:
        DeadlineError: nothing can go on although steps are left: the schedule is deadlocked.
    """
    return _Simulator(plan, durations, num_slots).run()


Event = tuple[float, int, Literal["sampled", "scored", "trained"], int]
"""Time, tie-breaker, kind, and the index, shard number or step it is about."""


class _Simulator:
    def __init__(self, plan: Plan, durations: Durations, num_slots: int) -> None:
        self._plan, self._durations = plan, durations
        self._events: list[Event] = []
        self._tie = itertools.count()
        self._now, self._version, self._free_slots = 0.0, 0, num_slots
        self._waiting: list[int] = []  # admitted indices without a slot, in order
        self._next_shard = 0
        self._left_in_shard = [plan.shard_size] * plan.num_shards
        self._to_score: list[int] = []
        self._is_scored = [False] * plan.num_shards
        self._scoring = self._training = False
        self._started_under = [-1] * plan.num_indices
        self._trained_at: list[float] = []
        self._busy = {"sampled": 0.0, "scored": 0.0, "trained": 0.0}

    def run(self) -> Simulation:
        self._go_on()
        while len(self._trained_at) < self._plan.num_steps:
            if not self._events:
                raise DeadlineError(
                    f"nothing can go on at version {self._version}: shard {self._next_shard} of "
                    f"{self._plan.num_shards} is next to start and step {len(self._trained_at)} of "
                    f"{self._plan.num_steps} to train."
                )
            self._now, _, kind, number = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(number)
            self._go_on()
        return Simulation(
            tuple(self._started_under),
            tuple(self._trained_at),
            self._busy["sampled"],
            self._busy["scored"],
            self._busy["trained"],
        )

    def _after(self, seconds: float, kind: Literal["sampled", "scored", "trained"], number: int) -> None:
        self._busy[kind] += seconds
        heapq.heappush(self._events, (self._now + seconds, next(self._tie), kind, number))

    def _sampled(self, index: int) -> None:
        self._free_slots += 1
        shard = index // self._plan.shard_size
        self._left_in_shard[shard] -= 1
        if self._left_in_shard[shard] == 0:
            heapq.heappush(self._to_score, shard)

    def _scored(self, shard: int) -> None:
        self._scoring = False
        self._is_scored[shard] = True

    def _trained(self, step: int) -> None:
        self._training = False
        self._trained_at.append(self._now)
        self._version = step + 1

    def _go_on(self) -> None:
        """Start everything that may start now."""
        while self._next_shard < self._plan.num_shards:
            shard = self._plan.shard(self._next_shard)
            if not self._plan.may_start(shard, self._version):
                break
            self._waiting += shard.indices
            self._next_shard += 1
        while self._free_slots and self._waiting:
            index = self._waiting.pop(0)
            self._free_slots -= 1
            self._started_under[index] = self._version
            self._after(self._durations.sample_s(index), "sampled", index)
        if self._to_score and not self._scoring:
            number = heapq.heappop(self._to_score)
            self._scoring = True
            self._after(self._durations.score_s(self._plan.shard(number)), "scored", number)
        self._start_training()

    def _start_training(self) -> None:
        step = len(self._trained_at)
        if self._training or step == self._plan.num_steps:
            return
        per_step = self._plan.batch_size // self._plan.shard_size
        if all(self._is_scored[step * per_step : (step + 1) * per_step]):
            self._training = True
            self._after(self._durations.train_s(step), "trained", step)
