"""Flow `score`: hosts one teacher engine and schedules async tasks against it, each of which writes score shards."""

from __future__ import annotations

from functools import partial

from prefect import flow

from asyncopd.worker import run_lanes
from flows.shard_tasks import timed_task
from flows.wiring import open_stored_run, score_stage


@flow(name="score", flow_run_name="score-{run_id}")
async def score(run_id: str, root: str = "runs") -> None:
    """Score the trajectory shards of a run with its teacher until all of them are scored.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    run = open_stored_run(root, run_id)
    worker = run.worker("score")
    shards_per_task = run.config.score.shards_per_task
    async with worker.alive():
        stage = score_stage(run, worker)
        # Two lanes: one reads or writes Parquet while the other is in the teacher.
        try:
            await run_lanes(
                partial(timed_task("score-shards", worker), stage, shards_per_task),
                num_lanes=2,
                shards_per_task=shards_per_task,
            )
        finally:
            await stage.close()
