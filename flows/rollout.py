"""Flow `rollout`: hosts one sampler engine and schedules async tasks against it, each of which writes shards.

More of them join a running run with `prefect deployment run rollout/worker -p run_id=…`, or without Prefect with
`asyncopd worker rollout RUN_ID`.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.shard_tasks import timed_task
from flows.stopping import cancelled_with_its_run
from flows.wiring import open_stored_run
from flows.work import roll_out


@flow(name="rollout", flow_run_name="rollout-{run_id}")
async def rollout(run_id: str, root: str = "runs") -> State[Any] | None:
    """Sample trajectory shards of a run until all its indices are produced.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    return await cancelled_with_its_run(roll_out(open_stored_run(root, run_id), timed_task))
