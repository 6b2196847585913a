"""`/v1/runs/{id}/replay | backfill`: work on a log that exists, through deployments `replay/run` and `backfill/run`.

The body is the request itself (asyncopd/config/requests.py), as the command line and Prefect have it. What can be
refused without a model is refused here: a mistake should not have to wait for a worker.
"""

from __future__ import annotations

import hashlib

from fastapi import APIRouter

from api.deps import IdempotencyKey, Launcher, Runs, View
from api.problems import ProblemError, responses
from api.reader import RunReader
from api.schemas import Work
from asyncopd.config.requests import BackfillRequest, ReplayRequest, Request
from asyncopd.local.stack import create_flow_run
from storage.replay import check

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["replays"], dependencies=[Launcher])


@router.post("/replay", status_code=202, operation_id="replay_run", responses=responses(404, 409, 413))
def replay_run(asked: ReplayRequest, view: View, runs: Runs, idempotency_key: IdempotencyKey = None) -> Work:
    """Train again from this run's log, with no sampler and no teacher, into a run of its own."""
    run_id = view.log.run_id
    if not view.history.steps:
        raise ProblemError(409, "nothing-to-replay", f"Run {run_id} has trained no step yet.")
    children = [replay.child_id for replay in check(view.log, asked)]
    child = children[0] if children and not asked.compare else None
    name = child or f"{'compare' if asked.compare else 'replay'}-{run_id}"
    flow_run_id = _start(asked, run_id, runs, name, idempotency_key)
    if child is not None:
        # So that cancelling the replay finds what to cancel.
        runs.launches.record_flow_run(child, flow_run_id)
    return Work(parent=run_id, run_id=child, flow_run_id=flow_run_id)


@router.post("/backfill", status_code=202, operation_id="backfill_run", responses=responses(404, 409, 413))
def backfill_run(asked: BackfillRequest, view: View, runs: Runs, idempotency_key: IdempotencyKey = None) -> Work:
    """Score this run's trajectories again, beside what exists."""
    run_id = view.log.run_id
    check(view.log, asked)
    flow_run_id = _start(asked, run_id, runs, f"backfill-{run_id}", idempotency_key)
    return Work(parent=run_id, flow_run_id=flow_run_id)


def _start(asked: Request, run_id: str, runs: RunReader, name: str, key: str | None) -> str:
    """Prefect's id of the flow run; one for every key."""
    flow_run = create_flow_run(
        f"{asked.verb}/run",
        {"run_id": run_id, "root": runs.store.url, **asked.model_dump(mode="json")},
        name=name,
        idempotency_key=key and hashlib.sha256(f"{asked.verb} {run_id} {key}".encode()).hexdigest(),
    )
    return flow_run.id
