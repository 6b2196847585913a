"""The back-filling stage: asks a teacher about rollouts that exist, into a folder of scores of its own.

    trajectory shards --(candidates recomputed beside them)--> cache, then Scorer --> scores/<folder>/

Nothing that exists is changed. Shards are claimed, so several processes can share the work; a shard that is there
already is skipped, so a back-fill that stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from asyncopd.errors import ConfigError
from asyncopd.ports import RunLog, ScoreCache, Scorer, ScoreRequest
from asyncopd.teacher.cached import score_through
from asyncopd.types import IndexRange, Trajectory
from asyncopd.worker import Worker


class CandidateShards(Protocol):
    """Where back-filled candidates come from and stay."""

    @property
    def name(self) -> str: ...

    def join(self, shard: IndexRange, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories with these candidates, which are made and published first where nobody did."""
        ...


@dataclass(frozen=True)
class Backfilled:
    """What a back-fill did."""

    folder: str
    num_shards: int
    """Shards that this call scored."""
    num_shards_found: int
    """Shards that were there before, or that another process scored."""
    num_tokens_asked: int
    num_tokens_cached: int
    seconds: float


class BackfillStage:
    """Scores shards of one run under one folder."""

    def __init__(
        self,
        log: RunLog,
        worker: Worker,
        *,
        folder: str,
        scorer: Scorer,
        request: ScoreRequest,
        cache: ScoreCache,
        candidates: CandidateShards | None,
        facts: Mapping[str, Any],
        lease_s: float,
        on_shard: Callable[[int], None],
    ) -> None:
        """
        Args:
            folder: of the scores; the scorer's answers are stored under it.
            candidates: to score in place of the recorded ones; None for those.
            facts: added to each manifest.
            on_shard: called with the number of trajectories of each finished shard.
        """
        self._log, self._worker, self._folder = log, worker, folder
        self._scorer, self._request, self._cache = scorer, request, cache
        self._candidates, self._facts, self._lease_s = candidates, facts, lease_s
        self._on_shard = on_shard
        self._counts = {"shards": 0, "found": 0, "asked": 0, "cached": 0}

    async def run(self, shards: Sequence[IndexRange]) -> Backfilled:
        """Score every shard that is not scored yet, waiting for those that other processes hold.

        Raises:
            ConfigError: another teacher's scores are in the folder.
            EngineError: the teacher, or the student that candidates come from, cannot serve a shard.
        """
        started = time.time()
        waiting = list(shards)
        while waiting:
            held = []
            for shard in waiting:
                found = await asyncio.to_thread(self._log.find_scores, self._folder, shard)
                if found is not None:
                    self._check_teacher(found.facts["teacher_digests"])
                    self._counts["found"] += 1
                    self._on_shard(len(shard))
                elif await asyncio.to_thread(self._claim, shard):
                    await self._work(shard)
                    self._on_shard(len(shard))
                else:
                    held.append(shard)
            if len(held) == len(waiting):
                await asyncio.sleep(self._lease_s / 10)
            waiting = held
        return Backfilled(
            folder=self._folder,
            num_shards=self._counts["shards"],
            num_shards_found=self._counts["found"],
            num_tokens_asked=self._counts["asked"],
            num_tokens_cached=self._counts["cached"],
            seconds=time.time() - started,
        )

    def _claim(self, shard: IndexRange) -> bool:
        return self._log.claim(f"backfill-{self._folder}", shard, worker=self._worker.name, lease_s=self._lease_s)

    def _check_teacher(self, digests: Sequence[str]) -> None:
        if set(digests) - {self._scorer.digest}:
            raise ConfigError(
                f"run {self._log.run_id}: scores/{self._folder} holds answers of another teacher (digest "
                f"{', '.join(d[:12] for d in digests)}, this one has {self._scorer.digest[:12]}). Give it another name "
                "with --teacher name=…."
            )

    async def _work(self, shard: IndexRange) -> None:
        trajectories = await asyncio.to_thread(self._log.read_trajectories, shard)
        facts = dict(self._facts)
        if self._candidates is not None:
            trajectories = await asyncio.to_thread(self._candidates.join, shard, trajectories)
            facts["candidates"] = self._candidates.name
        started = time.time()
        answers = await score_through(self._cache, self._scorer, trajectories, self._request, worker=self._worker.name)
        finished = time.time()
        self._worker.record("score", started, finished, answers.described(shard.name))
        facts |= {**answers.facts(), "seconds": finished - started}
        await asyncio.to_thread(
            self._log.publish_scores, self._folder, shard, answers.scores, worker=self._worker.name, facts=facts
        )
        self._counts["shards"] += 1
        self._counts["asked"] += answers.num_tokens_asked
        self._counts["cached"] += answers.num_tokens_cached
        self._worker.status["num_tokens"] = self._counts["asked"] + self._counts["cached"]
