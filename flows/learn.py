"""Flow `learn`: the long-running learner. One process, one model, until the last step of the run."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows import work
from flows.stopping import cancelled_with_its_run
from flows.wiring import open_stored_run


@flow(name="learn", flow_run_name="learn-{run_id}")
async def learn(run_id: str, root: str = "runs") -> State[Any] | None:
    """Train a run from its newest checkpoint to its last step, publishing a policy version after every step.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    return await cancelled_with_its_run(work.learn(open_stored_run(root, run_id)))
