"""The scoring stage: asks one teacher about every trajectory shard of a run, in index order as far as they exist.

    RunLog --trajectory shards--> next_shard --claim--> cache, then Scorer --> score shards
"""

from __future__ import annotations

import asyncio
import time

from asyncopd.arrivals import num_taken
from asyncopd.open_shards import OpenShards
from asyncopd.ports import RunLog, ScoreCache, Scorer, ScoreRequest
from asyncopd.schedule import Plan
from asyncopd.teacher.cached import NoCache, score_through
from asyncopd.types import IndexRange
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
        self._lease_s, self._cache = lease_s, cache or NoCache()
        self._stage = f"score-{scorer.name}"
        self._open = OpenShards(plan)
        """Shards neither scored nor claimed by this worker, in index order."""
        self._choosing = asyncio.Lock()
        worker.status.update(teacher=scorer.name, num_trajectories=0, num_tokens=0)

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
        answers = await score_through(
            self._cache, self._scorer, trajectories, self._request, worker=self._worker.name
        )
        finished = time.time()
        self._worker.record("score", started, finished, answers.described(shard.name))
        facts = {**answers.facts(), "seconds": finished - started}
        scores, num_tokens = answers.scores, answers.num_tokens
        with self._worker.span("orchestrate:parquet", shard.name):
            await asyncio.to_thread(
                self._log.publish_scores, self._scorer.name, shard, scores, worker=self._worker.name, facts=facts
            )
        self._worker.status["num_trajectories"] += len(trajectories)
        self._worker.status["num_tokens"] += num_tokens

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
