"""`/v1/runs`: launch, list, look at, stop and resume."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Response

from api.deps import IdempotencyKey, Launcher, Launches, Reader, RunId, Runs, View, query
from api.problems import responses
from api.schemas import RUN_ID_PATTERN, Run, RunConfigOut, RunCreate, RunPage
from storage.history import RunStatus

router = APIRouter(prefix="/v1/runs", tags=["runs"])


@router.post(
    "",
    status_code=201,
    dependencies=[Launcher],
    operation_id="create_run",
    responses={**responses(404, 409, 413), 200: {"model": Run, "description": "A repeat: the run launched before"}},
)
def create_run(asked: RunCreate, response: Response, launches: Launches, idempotency_key: IdempotencyKey = None) -> Run:
    """Launch a run through the deployment `asyncopd/train`. Its state is `queued` until a worker starts the flow."""
    run, is_repeat = launches.create(asked, idempotency_key)
    if is_repeat:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    response.headers["Location"] = f"/v1/runs/{run.id}"
    return run


@router.get("", dependencies=[Reader], operation_id="list_runs", responses=responses())
def list_runs(
    runs: Runs,
    status: Annotated[list[RunStatus] | None, query("Only runs in one of these states.", ["running"])] = None,
    name: Annotated[str | None, query("Only runs whose id starts so.", "walk-", max_length=100)] = None,
    after: Annotated[str | None, query("`next_cursor` of the page before.", "walk-7", pattern=RUN_ID_PATTERN)] = None,
    limit: Annotated[int, query("Runs per page.", 20, ge=1, le=100)] = 20,
) -> RunPage:
    """Runs, newest first by creation."""
    ids = runs.newest(name or "")
    if after is not None:
        place = (runs.created(after), after)
        ids = [run_id for run_id in ids if (runs.created(run_id), run_id) < place]
    # One by one: without a filter, what is not on the page is not read.
    shown = (run for run in map(runs.run, ids) if status is None or run.status in status)
    page = list(islice(shown, limit + 1))
    return RunPage(data=page[:limit], next_cursor=page[limit - 1].id if len(page) > limit else None)


@router.get("/{run_id}", dependencies=[Reader], operation_id="get_run", responses=responses(404))
def get_run(run_id: RunId, runs: Runs) -> Run:
    """One run."""
    return runs.run(run_id)


@router.get("/{run_id}/config", dependencies=[Reader], operation_id="get_run_config", responses=responses(404))
def get_run_config(view: View) -> RunConfigOut:
    """The configuration in force, and what resumes changed."""
    changes = [{"settings": dict(c.settings), "recorded": c.recorded} for c in view.log.changes()]
    return RunConfigOut(config=view.config.model_dump(mode="json"), changes=changes)


_order = partial(router.post, status_code=202, dependencies=[Launcher], responses=responses(404, 409))


@_order("/{run_id}/cancel", operation_id="cancel_run")
def cancel_run(run_id: RunId, launches: Launches) -> Run:
    """Stop every role within ten seconds. Nothing stored is lost; `resume` goes on."""
    return launches.stop(run_id, "cancelled")


@_order("/{run_id}/pause", operation_id="pause_run")
def pause_run(run_id: RunId, launches: Launches) -> Run:
    """As cancel, and says that somebody means to go on."""
    return launches.stop(run_id, "paused")


@_order("/{run_id}/resume", operation_id="resume_run")
def resume_run(run_id: RunId, launches: Launches) -> Run:
    """Go on with a paused, cancelled or failed run, from its newest checkpoint."""
    return launches.resume(run_id)
