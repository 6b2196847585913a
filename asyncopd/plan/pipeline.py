"""The pipeline as a discrete-event simulation: the run's admission rule, engines with slots, teachers, one learner.

    shard --may_start--> an engine's free lane --slots--> responses finish --> engine encodes --delay--> a teacher
       ^                                                                                                    |
       +--- engine refresh <--fetch-- version <--publish-- learner trains the step once all its shards <----+

Decoding is a fluid: an engine's clock counts decode steps, which take longer the more slots are active, and a response
of n tokens ends n steps after it began. Work runs at the speed that the number of busy processes allows; delays do not.
benchmarks/simulate.py proves the rule over arbitrary durations with one engine; this one predicts.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncopd.errors import DeadlineError
from asyncopd.plan.workload import Costs, Fleet
from asyncopd.schedule import Plan, step_of

_END = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What happened, on the simulated clock."""

    trained_at: tuple[float, ...]
    """Step -> seconds at which its version could be read."""
    rollout_busy_s: float
    """Σ over engines, standing still for weights and shards included."""
    teacher_busy_s: float
    learner_busy_s: float
    """Publishing included. Of one learner, however many GPUs it has."""
    staleness_tokens: dict[int, int]
    """Staleness in versions -> trained tokens that had it."""
    num_tokens: int
    engine_tokens: tuple[int, ...]
    """Engine -> tokens it sampled."""

    @property
    def wall_s(self) -> float:
        return self.trained_at[-1]


def run(plan: Plan, lengths: Sequence[int], costs: Costs, fleet: Fleet, *, num_slots: int) -> Outcome:
    """Simulate `plan` to its end.

    Args:
        lengths: response tokens by index.
        num_slots: responses that one engine generates at once.
    Raises:
        DeadlineError: nothing can go on although steps are left.
    """
    return _Pipeline(plan, lengths, costs, fleet, num_slots).run()


@dataclass(order=True)
class _Response:
    ends: float
    """On the engine's clock of decode steps."""
    index: int
    segment_start: float
    version: int
    tokens_left: int


@dataclass
class _Engine:
    number: int
    step_s: list[float]
    free_lanes: int
    clock: float = 0.0
    """Decode steps so far."""
    version: int = 0
    stall_s: float = 0.0
    """Work to do before the next decode step."""
    active: list[_Response] = field(default_factory=list)
    """Heap; the next to end first."""
    queue: deque[int] = field(default_factory=deque)
    finished_shards: list[int] = field(default_factory=list)
    """Whose encoding is what it stands still for."""
    num_tokens: int = 0

    @property
    def is_busy(self) -> bool:
        return bool(self.active) or self.stall_s > 0

    def next_s(self) -> float:
        """Work until its next event."""
        if self.stall_s > 0:
            return self.stall_s
        return max(0.0, self.active[0].ends - self.clock) * self.step_s[len(self.active)]

    def work(self, seconds: float) -> None:
        if self.stall_s > 0:
            self.stall_s = self.stall_s - seconds if self.stall_s - seconds > _END else 0.0
        elif self.active:
            self.clock += seconds / self.step_s[len(self.active)]


class _Pipeline:
    def __init__(self, plan: Plan, lengths: Sequence[int], costs: Costs, fleet: Fleet, num_slots: int) -> None:
        self._plan, self._lengths, self._costs, self._fleet = plan, lengths, costs, fleet
        self._num_slots = num_slots
        table = costs.decode.table(num_slots)
        # As flows/roles.py: one lane more than fills the engine.
        lanes = -(-num_slots // plan.shard_size) + 1
        self._engines = [_Engine(number, table, lanes) for number in range(fleet.rollout)]
        self._left_in_shard = [plan.shard_size] * plan.num_shards
        self._next_shard = 0
        self._engine_of: dict[int, _Engine] = {}
        self._to_score: list[int] = []
        self._scoring: dict[int, float] = {}
        """Shard -> work left on it."""
        self._is_scored = [False] * plan.num_shards
        self._train_left_s: float | None = None
        self._now = 0.0
        self._timers: list[tuple[float, int, str, int]] = []
        self._tie = itertools.count()
        self._trained_at: list[float] = []
        self._busy_s = {"rollout": 0.0, "teacher": 0.0, "learner": 0.0}
        self._staleness: Counter[int] = Counter()

    # -- the clock ------------------------------------------------------------------------------------------------
    def run(self) -> Outcome:
        self._go_on()
        while len(self._trained_at) < self._plan.num_steps:
            self._advance()
            self._go_on()
        return Outcome(
            trained_at=tuple(self._trained_at),
            rollout_busy_s=self._busy_s["rollout"],
            teacher_busy_s=self._busy_s["teacher"],
            learner_busy_s=self._busy_s["learner"],
            staleness_tokens=dict(sorted(self._staleness.items())),
            num_tokens=sum(self._staleness.values()),
            engine_tokens=tuple(engine.num_tokens for engine in self._engines),
        )

    def _advance(self) -> None:
        """Let the time pass until the next event."""
        busy = [engine for engine in self._engines if engine.is_busy]
        pending = [engine.next_s() for engine in busy] + list(self._scoring.values())
        if self._train_left_s is not None:
            pending.append(self._train_left_s)
        speed = self._costs.speeds[min(len(pending), len(self._costs.speeds)) - 1] if pending else 1.0
        passed = min(pending) / speed if pending else float("inf")
        if self._timers:
            passed = min(passed, max(0.0, self._timers[0][0] - self._now))
        if passed == float("inf"):
            raise DeadlineError(
                f"nothing can go on after {len(self._trained_at)} of {self._plan.num_steps} steps: shard "
                f"{self._next_shard} of {self._plan.num_shards} is next to start."
            )
        self._now += passed
        self._busy_s["rollout"] += passed * len(busy)
        self._busy_s["teacher"] += passed * len(self._scoring)
        self._busy_s["learner"] += passed * (self._train_left_s is not None)
        work = passed * speed
        for engine in busy:
            engine.work(work)
        for shard in self._scoring:
            self._scoring[shard] -= work
        if self._train_left_s is not None:
            self._train_left_s -= work

    def _after(self, delay_s: float, kind: str, number: int) -> None:
        heapq.heappush(self._timers, (self._now + delay_s, next(self._tie), kind, number))

    def _go_on(self) -> None:
        """Finish what is finished, then start everything that may start now."""
        while self._timers and self._timers[0][0] <= self._now + _END:
            _, _, kind, number = heapq.heappop(self._timers)
            if kind == "shard seen":
                heapq.heappush(self._to_score, number)
            elif kind == "scores seen":
                self._is_scored[number] = True
            else:
                self._refresh_engines(number)
        for engine in self._engines:
            self._finish_responses(engine)
        for shard in [shard for shard, left_s in self._scoring.items() if left_s <= _END]:
            del self._scoring[shard]
            self._after(self._costs.handover_s / 2, "scores seen", shard)
        if self._train_left_s is not None and self._train_left_s <= _END:
            self._train_left_s = None
            self._trained_at.append(self._now)
            self._after(self._costs.fetch_s, "version", len(self._trained_at))
        self._claim()
        for engine in self._engines:
            self._fill(engine)
        while self._to_score and len(self._scoring) < self._fleet.teacher:
            shard = heapq.heappop(self._to_score)
            tokens = sum(self._lengths[index] for index in self._plan.shard(shard).indices)
            self._scoring[shard] = self._costs.score_shard_s + tokens / self._costs.score_tokens_per_s
        self._start_training()

    # -- rollout --------------------------------------------------------------------------------------------------
    def _claim(self) -> None:
        """Hand out the next shards, each to the engine with a free lane that has least to do."""
        while self._next_shard < self._plan.num_shards:
            shard = self._plan.shard(self._next_shard)
            able = [e for e in self._engines if e.free_lanes and self._plan.may_start(shard, e.version)]
            if not able:
                return
            engine = min(able, key=lambda e: (len(e.active) + len(e.queue), e.number))
            engine.free_lanes -= 1
            engine.queue += shard.indices
            self._engine_of[self._next_shard] = engine
            self._next_shard += 1

    def _fill(self, engine: _Engine) -> None:
        while engine.queue and len(engine.active) < self._num_slots:
            index = engine.queue.popleft()
            ends = engine.clock + self._lengths[index]
            heapq.heappush(engine.active, _Response(ends, index, engine.clock, engine.version, self._lengths[index]))

    def _finish_responses(self, engine: _Engine) -> None:
        if engine.finished_shards and engine.stall_s == 0:
            for shard in engine.finished_shards:
                engine.free_lanes += 1
                self._after(self._costs.handover_s / 2, "shard seen", shard)
            engine.finished_shards.clear()
        while engine.active and engine.active[0].ends <= engine.clock + _END:
            response = heapq.heappop(engine.active)
            self._count(response, response.tokens_left)
            engine.num_tokens += self._lengths[response.index]
            shard = response.index // self._plan.shard_size
            self._left_in_shard[shard] -= 1
            if self._left_in_shard[shard] == 0:
                engine.finished_shards.append(shard)
                engine.stall_s += self._costs.shard_s
        if engine.finished_shards and engine.stall_s == 0:
            self._finish_responses(engine)

    def _refresh_engines(self, version: int) -> None:
        """Every engine loads `version` between two decode steps and rebuilds the cache of what is in flight."""
        for engine in self._engines:
            cached = 0
            for response in engine.active:
                made = min(response.tokens_left, round(engine.clock - response.segment_start))
                self._count(response, made)
                response.tokens_left -= made
                response.segment_start, response.version = engine.clock, version
                cached += self._lengths[response.index] - response.tokens_left
            engine.version = version
            engine.stall_s += self._costs.refresh_s + cached * self._costs.prefill_token_s

    def _count(self, response: _Response, num_tokens: int) -> None:
        if num_tokens:
            self._staleness[step_of(response.index, self._plan.batch_size) - response.version] += num_tokens

    # -- learner --------------------------------------------------------------------------------------------------
    def _start_training(self) -> None:
        step = len(self._trained_at)
        if self._train_left_s is not None or step == self._plan.num_steps:
            return
        per_step = self._plan.batch_size // self._plan.shard_size
        if not all(self._is_scored[step * per_step : (step + 1) * per_step]):
            return
        tokens = sum(self._lengths[index] for index in self._plan.step(step).indices)
        costs = self._costs
        self._train_left_s = costs.train_step_s + tokens / (costs.train_tokens_per_s * self._fleet.learner)
        self._train_left_s += costs.publish_s + (2 * costs.switch_s if self._fleet.time_shared else 0.0)
