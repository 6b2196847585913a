"""The pipeline as a discrete-event simulation: the real scheduling rule under given durations, on a simulated clock.

shard admitted -> its indices take free slots in order -> produced -> scored (one teacher) -> trained (one learner)
                                                                               publishes the next version <--+

In index order a step waits for its own shards; in arrival order the learner comes to shards as they are scored, one
step ahead of the one it trains, as the real one does.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from asyncopd.errors import DeadlineError
from asyncopd.schedule import Arrival, Plan, Seen, judge, num_taken
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
    drift_nats: Callable[[int], float] = lambda step: 0.0
    """What a learner step measures."""


@dataclass(frozen=True)
class Simulation:
    """What happened, on the simulated clock."""

    started_under: tuple[int, ...]
    """Index -> the policy version it started under; in arrival order as far as indices were started."""
    trained_at: tuple[float, ...]
    """Step -> time its version was published, seconds."""
    sampling_s: float
    """Σ over slots of time spent sampling."""
    scoring_s: float
    training_s: float
    arrivals: tuple[Arrival, ...] = ()
    """Of arrival order, in order."""
    most_ahead: int = 0
    """Most shards that were started and not yet trained, dropped or held at one moment."""

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
        self._open = plan.shards()
        self._next_shard = next(self._open, None)
        self._num_started = self._most_ahead = 0
        self._left_in_shard: dict[int, int] = {}
        self._to_score: list[int] = []
        self._scored_order: list[int] = []  # shard numbers in the order in which they were scored
        self._is_scored: set[int] = set()
        self._arrivals: list[Arrival] = []
        self._scoring = self._training = False
        self._started_under: dict[int, int] = {}
        self._trained_at: list[float] = []
        self._busy = {"sampled": 0.0, "scored": 0.0, "trained": 0.0}

    def run(self) -> Simulation:
        self._go_on()
        while len(self._trained_at) < self._plan.num_steps:
            if not self._events:
                raise DeadlineError(
                    f"nothing can go on at version {self._version}: shard {self._next_shard} is next to start and step "
                    f"{len(self._trained_at)} of {self._plan.num_steps} to train."
                )
            self._now, _, kind, number = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(number)
            self._go_on()
        return Simulation(
            tuple(self._started_under[index] for index in sorted(self._started_under)),
            tuple(self._trained_at),
            self._busy["sampled"],
            self._busy["scored"],
            self._busy["trained"],
            tuple(self._arrivals),
            self._most_ahead,
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
        self._scored_order.append(shard)
        self._is_scored.add(shard)

    def _trained(self, step: int) -> None:
        self._training = False
        self._trained_at.append(self._now)
        self._version = step + 1

    def _go_on(self) -> None:
        """Start everything that may start now."""
        while self._arrive() or self._admit():
            pass
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

    def _admit(self) -> bool:
        """Let the next shard start, if it may."""
        shard, drift = self._next_shard, self._durations.drift_nats
        drift_nats = drift(self._version - 1) if self._version else 0.0
        seen = Seen(self._version, drift_nats, len(self._arrivals), num_taken(self._arrivals))
        if shard is None or self._plan.is_complete(seen) or not self._plan.admits(shard, seen):
            return False
        self._waiting += shard.indices
        self._left_in_shard[self._num_started] = len(shard)
        self._num_started += 1
        self._most_ahead = max(self._most_ahead, self._num_started - len(self._arrivals))
        self._next_shard = next(self._open, None)
        return True

    def _arrive(self) -> bool:
        """Let the learner come to the next scored shard, if the step after the one it trains lacks any."""
        wanted = (len(self._trained_at) + 1 + self._training) * self._plan.batch_size
        num_come_to = len(self._arrivals)
        if (
            self._plan.order == "index"
            or num_come_to == len(self._scored_order)
            or num_taken(self._arrivals) >= min(wanted, self._plan.num_indices)
        ):
            return False
        shard = self._plan.shard(self._scored_order[num_come_to])
        versions = {index: self._started_under[index] for index in shard.indices}
        self._arrivals.append(judge(self._plan, shard, earlier=self._arrivals, oldest_version=versions, dropped={}))
        return True

    def _start_training(self) -> None:
        step = len(self._trained_at)
        if self._training or step == self._plan.num_steps:
            return
        if self._has_all_of(step):
            self._training = True
            self._after(self._durations.train_s(step), "trained", step)

    def _has_all_of(self, step: int) -> bool:
        if self._plan.order == "arrival":
            return num_taken(self._arrivals) >= (step + 1) * self._plan.batch_size
        per_step = self._plan.shards_per_step
        return all(number in self._is_scored for number in range(step * per_step, (step + 1) * per_step))
