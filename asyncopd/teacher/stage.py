"""Scoring: a teacher is asked about every trajectory shard of a run, as it appears or, back-filled, long after.

    ScoreStage     trajectory shards --next_shard, claim--> cache, then Scorer --> scores/<teacher>/
    BackfillStage  trajectory shards --(candidates recomputed beside them)--> cache, then Scorer --> scores/<folder>/

Shards are scored in index order as far as they exist, and claimed, so that several processes can share the work. A
shard of scores that is there is skipped, so either goes on where it was; nothing that exists is changed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from asyncopd.errors import ConfigError
from asyncopd.ports import RunLog, ScoreCache, Scorer, ScoreRequest
from asyncopd.records import Facts
from asyncopd.schedule import OpenShards, Plan, num_taken
from asyncopd.teacher.cached import Answers, score_through
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


@dataclass(frozen=True, kw_only=True)
class BackfillStage:
    """Scores shards of one run under one folder."""

    log: RunLog
    worker: Worker
    folder: str
    """Of the scores; the scorer's answers are stored under it."""
    scorer: Scorer
    request: ScoreRequest
    cache: ScoreCache | None
    with_candidates: Callable[[IndexRange, list[Trajectory]], list[Trajectory]] | None
    """Gives a shard's trajectories the candidates to score, which are made first where nobody did; None for the
    recorded ones."""
    facts: Facts
    """Added to each manifest: the question, and the name of the candidates."""
    lease_s: float
    on_shard: Callable[[int], None]
    """Called with the number of trajectories of each finished shard."""

    async def run(self, shards: Sequence[IndexRange]) -> Backfilled:
        """Score every shard that is not scored yet, waiting for those that other processes hold.

        Raises:
            ConfigError: another teacher's scores are in the folder.
            EngineError: the teacher, or the student that candidates come from, cannot serve a shard.
        """
        started = time.time()
        counts: Counter[str] = Counter()
        waiting = list(shards)
        while waiting:
            held = []
            for shard in waiting:
                found = await asyncio.to_thread(self.log.find_scores, self.folder, shard)
                if found is not None:
                    self._check_teacher(found.facts.teacher_digests)
                    counts["found"] += 1
                elif await asyncio.to_thread(self._claim, shard):
                    answers = await self._work(shard)
                    counts.update(shards=1, asked=answers.num_tokens_asked, cached=answers.num_tokens_cached)
                    self.worker.tell(num_tokens=counts["asked"] + counts["cached"])
                else:
                    held.append(shard)
                    continue
                self.on_shard(len(shard))
            if len(held) == len(waiting):
                await asyncio.sleep(self.lease_s / 10)
            waiting = held
        return Backfilled(
            folder=self.folder,
            num_shards=counts["shards"],
            num_shards_found=counts["found"],
            num_tokens_asked=counts["asked"],
            num_tokens_cached=counts["cached"],
            seconds=time.time() - started,
        )

    def _claim(self, shard: IndexRange) -> bool:
        claim = self.log.claim(f"backfill-{self.folder}", shard, worker=self.worker.name, lease_s=self.lease_s)
        return claim is not None

    def _check_teacher(self, digests: Sequence[str]) -> None:
        if set(digests) - {self.scorer.digest}:
            raise ConfigError(
                f"run {self.log.run_id}: scores/{self.folder} holds answers of another teacher (digest "
                f"{', '.join(d[:12] for d in digests)}, this one has {self.scorer.digest[:12]}). Give it another name "
                "with --teacher name=…."
            )

    async def _work(self, shard: IndexRange) -> Answers:
        trajectories = await asyncio.to_thread(self.log.read_trajectories, shard)
        if self.with_candidates is not None:
            trajectories = await asyncio.to_thread(self.with_candidates, shard, trajectories)
        started = time.time()
        answers = await score_through(self.cache, self.scorer, trajectories, self.request, worker=self.worker.name)
        finished = time.time()
        self.worker.record("score", started, finished, answers.described(shard.name))
        facts = replace(
            answers.facts(),
            backfill=self.facts.backfill,
            candidates=self.facts.candidates,
            seconds=finished - started,
        )
        await asyncio.to_thread(
            self.log.publish_scores, self.folder, shard, answers.scores, worker=self.worker.name, facts=facts
        )
        return answers
