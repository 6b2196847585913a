"""The scoring stage: asks one teacher about every trajectory shard of a run, in index order as far as they exist.

    RunLog --trajectory shards--> next_shard --claim--> Scorer --> score shards
"""

from __future__ import annotations

import asyncio
import time

from asyncopd.ports import RunLog, Scorer, ScoreRequest
from asyncopd.schedule import Plan
from asyncopd.types import IndexRange
from asyncopd.worker import NextShard, Worker


class ScoreStage:
    """Scores the shards of one run with one teacher; any number of these may work on the same run."""

    def __init__(
        self, log: RunLog, worker: Worker, *, plan: Plan, scorer: Scorer, request: ScoreRequest, lease_s: float
    ) -> None:
        self._log, self._worker, self._plan, self._scorer, self._request = log, worker, plan, scorer, request
        self._lease_s = lease_s
        self._stage = f"score-{scorer.name}"
        self._open = list(plan.shards())
        """Shards neither scored nor claimed by this worker, in index order."""
        self._choosing = asyncio.Lock()
        worker.status.update(teacher=scorer.name, num_trajectories=0, num_tokens=0)

    async def next_shard(self) -> IndexRange | None:
        """Claim the lowest produced shard that nobody scored or holds; waits for rollouts and for other workers."""
        async with self._choosing:
            if not self._open:
                return None
            what = f"shard {self._open[0].name} to be sampled"
            return (await self._worker.wait_for(self._claim_next, what)).shard

    async def work(self, shard: IndexRange) -> None:
        """Score and publish one shard. Harmless when another worker publishes it first."""
        with self._worker.span("orchestrate:parquet", shard.name):
            trajectories = await asyncio.to_thread(self._log.read_trajectories, shard)
        started = time.time()
        with self._worker.span("score", shard.name):
            scores = await self._scorer.score(trajectories, self._request)
        num_tokens = sum(len(t.response_ids) for t in trajectories)
        facts = {"num_tokens": num_tokens, "seconds": time.time() - started}
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
        # No rollout is ahead of the oldest unscored step by more than τ steps: nothing to look for beyond.
        per_step = self._plan.batch_size // self._plan.shard_size
        for shard in self._open[: (self._plan.max_staleness + 2) * per_step]:
            if self._log.find_trajectories(shard) is None:
                continue
            if self._log.find_scores(self._scorer.name, shard) is not None:
                self._open.remove(shard)
            elif self._log.claim(self._stage, shard, worker=self._worker.name, lease_s=self._lease_s):
                self._open.remove(shard)
                return NextShard(shard)
        return None if self._open else NextShard(None)
