"""Flow `rollout`: hosts one sampler engine and schedules async tasks against it, each of which writes shards.

More of them join a running run with `prefect deployment run rollout/worker -p run_id=…`.
"""

from __future__ import annotations

from functools import partial

from prefect import flow

from asyncopd.worker import run_lanes
from flows.shard_tasks import timed_task
from flows.wiring import open_stored_run, rollout_stage


@flow(name="rollout", flow_run_name="rollout-{run_id}")
async def rollout(run_id: str, root: str = "runs") -> None:
    """Sample trajectory shards of a run until all its indices are produced.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    run = open_stored_run(root, run_id)
    worker = run.worker("rollout")
    settings = run.config.rollout
    async with worker.alive():
        # The learner stores the student's architecture before it publishes version 0.
        await worker.wait_for(run.log.latest_policy, "version 0 to be published")
        stage, sampler = rollout_stage(run, worker)
        try:
            async with stage.following_versions():
                # One lane more than fills the engine, so that refilling never waits for a shard to be published.
                await run_lanes(
                    partial(timed_task("rollout-shards", worker), stage, settings.shards_per_task),
                    num_lanes=-(-settings.slots // settings.shard_size) + 1,
                    shards_per_task=settings.shards_per_task,
                )
        finally:
            await sampler.close()
