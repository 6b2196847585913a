"""`/v1/runs`: launch, list, look at, stop and resume; work on a log that exists. `/v1/configs`: what can be launched.

The body of a replay or back-fill is the request itself (asyncopd/config/requests.py), as the command line and Prefect
have it. What can be refused without a model is refused here: a mistake should not have to wait for a worker.
"""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Response

from api.deps import IdempotencyKey, Launcher, Launches, Reader, RunId, Runs, View, query
from api.problems import ProblemError, responses
from api.reader import RunReader
from api.schemas import RUN_ID_PATTERN, Config, ConfigList, Run, RunConfigOut, RunCreate, RunPage, Work
from asyncopd.config import RunConfig, load_config
from asyncopd.config.requests import BackfillRequest, ReplayRequest, Request
from asyncopd.local.stack import create_flow_run
from storage.history import RunStatus
from storage.replay import check

router = APIRouter(prefix="/v1")
_RUN = "/runs/{run_id}"
_read = partial(router.get, tags=["runs"], dependencies=[Reader])
_order = partial(router.post, tags=["runs"], dependencies=[Launcher], status_code=202, responses=responses(404, 409))
_work = partial(_order, tags=["replays"], responses=responses(404, 409, 413))


@_order(
    "/runs",
    status_code=201,
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


@_read("/runs", operation_id="list_runs", responses=responses())
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


@_read(_RUN, operation_id="get_run", responses=responses(404))
def get_run(run_id: RunId, runs: Runs) -> Run:
    """One run."""
    return runs.run(run_id)


@_read(f"{_RUN}/config", operation_id="get_run_config", responses=responses(404))
def get_run_config(view: View) -> RunConfigOut:
    """The configuration in force, and what resumes changed."""
    changes = [{"settings": dict(c.settings), "recorded": c.recorded} for c in view.log.changes()]
    return RunConfigOut(config=view.config.model_dump(mode="json"), changes=changes)


@_order(f"{_RUN}/cancel", operation_id="cancel_run")
def cancel_run(run_id: RunId, launches: Launches) -> Run:
    """Stop every role within ten seconds. Nothing stored is lost; `resume` goes on."""
    return launches.stop(run_id, "cancelled")


@_order(f"{_RUN}/pause", operation_id="pause_run")
def pause_run(run_id: RunId, launches: Launches) -> Run:
    """As cancel, and says that somebody means to go on."""
    return launches.stop(run_id, "paused")


@_order(f"{_RUN}/resume", operation_id="resume_run")
def resume_run(run_id: RunId, launches: Launches) -> Run:
    """Go on with a paused, cancelled or failed run, from its newest checkpoint."""
    return launches.resume(run_id)


# -- work on a log that exists, through deployments `replay/run` and `backfill/run` ---------------------------------
@_work(f"{_RUN}/replay", operation_id="replay_run")
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


@_work(f"{_RUN}/backfill", operation_id="backfill_run")
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


# -- what can be launched --------------------------------------------------------------------------------------------
@_read("/configs", tags=["configs"], operation_id="list_configs", responses=responses())
def list_configs(launches: Launches) -> ConfigList:
    """Configurations of this service, every value resolved, and the schema a form can be made from."""
    with _turn:
        return _listed(launches.files())


# One at a time, and once for each state of the files: it takes a second of CPU.
_turn = threading.Lock()


@lru_cache(maxsize=4)
def _listed(files: tuple[tuple[Path, int], ...]) -> ConfigList:
    found = [
        Config(name=path.stem, about=_about(path), config=load_config(path).model_dump(mode="json"))
        for path, _ in files
    ]
    return ConfigList(data=found, json_schema=RunConfig.model_json_schema())


def _about(path: Path) -> str:
    """The comment a file opens with, as one line."""
    comments = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.lstrip("# ").strip() for line in comments)
