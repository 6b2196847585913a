"""Flow `evaluate`: follows the policy versions of a run and measures the chosen ones on held-out prompts."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows import work
from flows.stopping import cancelled_with_its_run
from flows.wiring import open_stored_run


@flow(name="evaluate", flow_run_name="evaluate-{run_id}")
async def evaluate(run_id: str, root: str = "runs") -> State[Any] | None:
    """Evaluate version 0, every `evaluate.every`-th and the last version of a run as they appear.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    return await cancelled_with_its_run(work.evaluate(open_stored_run(root, run_id)))
