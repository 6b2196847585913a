"""Scoring: a teacher is asked about every trajectory shard of a run, as it appears or, back-filled, long after.

    ScoreStage     trajectory shards --next_shard, claim--> cache, then Scorer --> scores/<teacher>/
    BackfillStage  trajectory shards --(candidates recomputed beside them)--> cache, then Scorer --> scores/<folder>/

Shards are scored in index order as far as they exist, and claimed, so that several processes can share the work. A
shard of scores that is there is skipped, so either goes on where it was; nothing that exists is changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from asyncopd.errors import ConfigError
from asyncopd.ports import RunLog, ScoreCache, Scorer, ScoreRequest
from asyncopd.records import Facts
from asyncopd.schedule import OpenShards, Plan, num_taken
from asyncopd.teacher.cached import score_through
from asyncopd.types import IndexRange, Trajectory
from asyncopd.worker import NextShard, Worker


class ScoreStage:
    """Scores the shards of one run with one teacher; any number of these may work on the same run."""

    def __init__(
        self,
        log: RunLog,
        worker: Worker,
        *,
        plan: Plan,
        scorer: Scorer,
        request: ScoreRequest,
        lease_s: float,
        cache: ScoreCache | None = None,
    ) -> None:
        """`cache` is asked before the teacher; None to ask the teacher for everything."""
        self._log, self._worker, self._plan, self._scorer, self._request = log, worker, plan, scorer, request
        self._lease_s, self._cache = lease_s, cache
        self._stage = f"score-{scorer.name}"
        self._open = OpenShards(plan)
        """Shards neither scored nor claimed by this worker, in index order."""
        self._choosing = asyncio.Lock()
        worker.tell(teacher=scorer.name, num_trajectories=0, num_tokens=0)

    async def next_shard(self) -> IndexRange | None:
        """Claim the lowest produced shard that nobody scored or holds; waits for rollouts and for other workers."""
        async with self._choosing:
            first = self._open.first
            if first is None:
                return None
            what = f"shard {first.name} to be sampled"
            return (await self._worker.wait_for(self._claim_next, what)).shard

    async def work(self, shard: IndexRange) -> None:
        """Score and publish one shard. Harmless when another worker publishes it first."""
        with self._worker.busy.working():
            await self._score_and_publish(shard)

    async def _score_and_publish(self, shard: IndexRange) -> None:
        with self._worker.span("orchestrate:parquet", shard.name):
            trajectories = await asyncio.to_thread(self._log.read_trajectories, shard)
        started = time.time()
        answers = await score_through(self._cache, self._scorer, trajectories, self._request, worker=self._worker.name)
        finished = time.time()
        self._worker.record("score", started, finished, answers.described(shard.name))
        facts = replace(answers.facts(), seconds=finished - started)
        scores, num_tokens = answers.scores, answers.num_tokens
        with self._worker.span("orchestrate:parquet", shard.name):
            await asyncio.to_thread(
                self._log.publish_scores, self._scorer.name, shard, scores, worker=self._worker.name, facts=facts
            )
        self._worker.count(num_trajectories=len(trajectories), num_tokens=num_tokens)

    async def close(self) -> None:
        """Stop the teacher's engine."""
        await self._scorer.close()

    def _claim_next(self) -> NextShard | None:
        """What to do next; None when there is nothing to do right now."""
        if self._plan.order == "arrival" and num_taken(self._log.arrivals()) >= self._plan.num_indices:
            return NextShard(None)
        for shard in self._open.window(self._plan.window):
            if self._log.find_trajectories(shard) is None:
                continue
            if self._log.find_scores(self._scorer.name, shard) is not None:
                self._open.remove(shard)
            elif self._log.claim(self._stage, shard, worker=self._worker.name, lease_s=self._lease_s):
                self._open.remove(shard)
                # Its last holder may have published between the look above and our claim.
                if self._log.find_scores(self._scorer.name, shard) is None:
                    return NextShard(shard)
        return None if self._open.first else NextShard(None)


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
        cache: ScoreCache | None,
        candidates: CandidateShards | None,
        facts: Facts,
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
                    self._check_teacher(found.facts.teacher_digests)
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
        claim = self._log.claim(f"backfill-{self._folder}", shard, worker=self._worker.name, lease_s=self._lease_s)
        return claim is not None

    def _check_teacher(self, digests: Sequence[str]) -> None:
        if set(digests) - {self._scorer.digest}:
            raise ConfigError(
                f"run {self._log.run_id}: scores/{self._folder} holds answers of another teacher (digest "
                f"{', '.join(d[:12] for d in digests)}, this one has {self._scorer.digest[:12]}). Give it another name "
                "with --teacher name=…."
            )

    async def _work(self, shard: IndexRange) -> None:
        trajectories = await asyncio.to_thread(self._log.read_trajectories, shard)
        candidates = None
        if self._candidates is not None:
            trajectories = await asyncio.to_thread(self._candidates.join, shard, trajectories)
            candidates = self._candidates.name
        started = time.time()
        answers = await score_through(self._cache, self._scorer, trajectories, self._request, worker=self._worker.name)
        finished = time.time()
        self._worker.record("score", started, finished, answers.described(shard.name))
        facts = replace(
            answers.facts(), backfill=self._facts.backfill, candidates=candidates, seconds=finished - started
        )
        await asyncio.to_thread(
            self._log.publish_scores, self._folder, shard, answers.scores, worker=self._worker.name, facts=facts
        )
        self._counts["shards"] += 1
        self._counts["asked"] += answers.num_tokens_asked
        self._counts["cached"] += answers.num_tokens_cached
        self._worker.tell(num_tokens=self._counts["asked"] + self._counts["cached"])
