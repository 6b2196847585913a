"""Flow `pretrain`: makes the tiny models of a run that the model cache does not hold yet."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows import work
from flows.stopping import cancelled_with_its_run
from flows.wiring import open_stored_run


@flow(name="pretrain", flow_run_name="pretrain-{run_id}")
async def pretrain(run_id: str, root: str = "runs") -> State[Any] | None:
    """Pre-train the run's student and teacher where they are tiny models and not in the cache.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    return await cancelled_with_its_run(work.pretrain(open_stored_run(root, run_id)))
