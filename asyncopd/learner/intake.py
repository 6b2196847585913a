"""Where a learner step's trajectories come from: its own index range, or what was scored first.

index:    scores of [s·B, (s+1)·B) --------------------------------------------------------> Batch of step s
arrival:  scores of any shard ahead --first scored--> Arrival, recorded --positions of s --> Batch of step s
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

from asyncopd.errors import StorageError
from asyncopd.ports import RunLog
from asyncopd.records import Manifest
from asyncopd.schedule import Arrival, OpenShards, Plan, arrivals_of_step, judge, num_taken
from asyncopd.types import IndexRange, IndexSet, ScoredTrajectory
from asyncopd.worker import Worker


@dataclass(frozen=True)
class Batch:
    """What one learner step decides about, and what it trains."""

    indices: IndexRange | IndexSet
    """All of them, trained or not."""
    scored: Sequence[ScoredTrajectory]
    """Those to train."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    held: Mapping[int, str] = field(default_factory=dict)


class Intake(ABC):
    """Gives the batch of a step: the same one whenever it is asked for it, in whatever process."""

    def __init__(self, log: RunLog, worker: Worker, plan: Plan, teacher: str) -> None:
        self._log, self._worker, self._plan, self._teacher = log, worker, plan, teacher

    @abstractmethod
    async def batch(self, step: int) -> Batch:
        """Wait until everything of a step is scored, and read it. Steps are asked for in order."""

    def _find(self, shard: IndexRange) -> Manifest | None:
        return self._log.find_scores(self._teacher, shard)

    def _read(self, shard: IndexRange) -> dict[int, ScoredTrajectory]:
        """The scored trajectories of a shard, by index."""
        with self._worker.span("orchestrate:parquet", shard.name):
            trajectories = {t.index: t for t in self._log.read_trajectories(shard)}
            scores = self._log.read_scores(self._teacher, shard)
        return {row.index: ScoredTrajectory(trajectories[row.index], row) for row in scores}


class IndexIntake(Intake):
    """Step s trains what its own index range holds, whatever was scored first."""

    async def batch(self, step: int) -> Batch:
        rows: dict[int, ScoredTrajectory] = {}
        dropped: dict[int, str] = {}
        for shard in self._plan.shards_of_step(step):
            manifest = await self._worker.wait_for(partial(self._find, shard), f"scores of {shard.name}")
            dropped |= manifest.facts.dropped
            rows |= await asyncio.to_thread(self._read, shard)
        return Batch(self._plan.step(step), list(rows.values()), dropped)


class ArrivalIntake(Intake):
    """Step s trains positions [s·B, (s+1)·B) of what was scored first. Every decision is recorded before it counts."""

    def __init__(self, log: RunLog, worker: Worker, plan: Plan, teacher: str) -> None:
        super().__init__(log, worker, plan, teacher)
        self._open, self._num_removed = OpenShards(plan), 0
        """Shards that no arrival has taken up, and how many arrivals were taken out of them so far."""
        self._scored_at: dict[IndexRange, float] = {}
        """Those of them seen with scores -> when their scores were published, Unix seconds."""
        self._rows_of = lru_cache(maxsize=1)(self._read)
        """A shard whose rows go to two steps is read once."""

    async def batch(self, step: int) -> Batch:
        size = self._plan.batch_size
        arrivals = await asyncio.to_thread(self._log.arrivals)
        while num_taken(arrivals) < (step + 1) * size:
            shard = await self._worker.wait_for(self._first_scored, "scores of the shard that arrives next")
            await asyncio.to_thread(self._come_to, shard)
            arrivals = await asyncio.to_thread(self._log.arrivals)
        return await asyncio.to_thread(self._assemble, step, arrivals_of_step(arrivals, step, size))

    def _first_scored(self) -> IndexRange | None:
        """Of the shards that no arrival has taken up, the one whose scores were published first."""
        for arrival in self._log.arrivals()[self._num_removed :]:
            self._open.remove(arrival.shard)
            self._scored_at.pop(arrival.shard, None)
            self._num_removed += 1
        # Nothing starts further ahead than the window (Plan.waits_for), so nothing is scored beyond it.
        for shard in self._open.window(self._plan.window):
            if shard not in self._scored_at and (manifest := self._find(shard)) is not None:
                self._scored_at[shard] = manifest.created
        return min(self._scored_at, key=lambda shard: (self._scored_at[shard], shard), default=None)

    def _come_to(self, shard: IndexRange) -> None:
        """Decide about the indices of a shard and record it."""
        manifest = self._find(shard)
        oldest = {index: row.trajectory.version_oldest for index, row in self._rows_of(shard).items()}
        dropped = manifest.facts.dropped if manifest else {}
        earlier = self._log.arrivals()
        arrival = judge(self._plan, shard, earlier=earlier, oldest_version=oldest, dropped=dropped)
        # Recorded before anything trains on it. False: another learner was first, and what it decided counts.
        self._log.record_arrival(arrival)

    def _assemble(self, step: int, arrivals: Sequence[Arrival]) -> Batch:
        size = self._plan.batch_size
        mine = [(arrival, index) for arrival in arrivals for index, by in arrival.steps(size) if by == step]
        dropped = {index: arrival.dropped[index] for arrival, index in mine if index in arrival.dropped}
        held = {index: arrival.held[index] for arrival, index in mine if index in arrival.held}
        scored = [self._row(arrival, index) for arrival, index in mine if index not in dropped and index not in held]
        return Batch(IndexSet(tuple(index for _, index in mine)), scored, dropped, held)

    def _row(self, arrival: Arrival, index: int) -> ScoredTrajectory:
        rows = self._rows_of(arrival.shard)
        if index not in rows:
            raise StorageError(
                f"arrival {arrival.number} takes index {index}, but shard {arrival.shard.name} has no scored row "
                "of it any more. Restore the shard that was there when the arrival was recorded."
            )
        return rows[index]
