"""How shard work becomes Prefect task runs, and what that costs.

One task run covers several shards (`shards_per_task`): a task run costs the client about 7 ms and the server 11–18 ms,
a walk shard takes about 100 ms.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from prefect import task
from prefect.cache_policies import NO_CACHE

from asyncopd.worker import ShardStage, Worker, work_on_shards


def timed_task(name: str, worker: Worker) -> Callable[[ShardStage, int], Awaitable[int]]:
    """`work_on_shards` as an async Prefect task whose orchestration overhead lands in the worker's timeline."""

    @task(name=name, cache_policy=NO_CACHE, persist_result=False)
    async def shards(stage: ShardStage, max_shards: int) -> tuple[int, float, float]:
        started = time.time()
        done = await work_on_shards(stage, max_shards)
        return done, started, time.time()

    async def measured(stage: ShardStage, max_shards: int) -> int:
        called = time.time()
        done, started, finished = await shards(stage, max_shards)
        worker.record("orchestrate:prefect", called, started, name)
        worker.record("orchestrate:prefect", finished, time.time(), name)
        return done

    return measured
