"""Flow `score`: hosts one teacher engine and schedules async tasks against it, each of which writes score shards."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows import work
from flows.shard_tasks import timed_task
from flows.stopping import cancelled_with_its_run
from flows.wiring import open_stored_run


@flow(name="score", flow_run_name="score-{run_id}")
async def score(run_id: str, root: str = "runs") -> State[Any] | None:
    """Score the trajectory shards of a run with its teacher until all of them are scored.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    return await cancelled_with_its_run(work.score(open_stored_run(root, run_id), timed_task))
