"""The parts that routes share, as dependencies."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request
from fastapi.dependencies.utils import get_flat_dependant
from starlette.concurrency import run_in_threadpool

from api.fold import RunFold
from api.hub import Hub
from api.launcher import RunLauncher
from api.problems import ProblemError, no_run
from api.reader import RunReader
from api.schemas import RUN_ID_PATTERN

RunId = Annotated[str, Path(pattern=RUN_ID_PATTERN, description="Id of a run.", examples=["walk-7"])]


# The trivial ones are coroutines: FastAPI calls plain functions in a thread each.
async def reader(request: Request) -> RunReader:
    found: RunReader = request.app.state.reader
    return found


async def launcher(request: Request) -> RunLauncher:
    found: RunLauncher = request.app.state.launcher
    return found


async def hub(request: Request) -> Hub:
    found: Hub = request.app.state.hub
    return found


async def fold(run_id: RunId, runs: Annotated[RunReader, Depends(reader)]) -> RunFold:
    """The run of the path, read up to now; 404 while it does not exist in storage."""
    held = runs.held(run_id)
    return held if held is not None and held.is_fresh else await run_in_threadpool(runs.fold, run_id)


async def known_run(run_id: RunId, runs: Annotated[RunReader, Depends(reader)]) -> str:
    """The id of the path; 404 when neither a run nor a launch has it. A stream must know before it begins."""
    if runs.held(run_id) is None and not await run_in_threadpool(runs.exists, run_id):
        raise no_run(run_id)
    return run_id


async def known_query(request: Request) -> None:
    """Refuse query parameters that the resource does not have: a mistyped filter would silently match everything."""
    if not request.url.query:
        return
    route = request.scope["route"]
    known = {parameter.alias for parameter in get_flat_dependant(route.dependant).query_params}
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        expected = ", ".join(sorted(known)) or "none at all"
        raise ProblemError(
            422, "unknown-parameter", f"{unknown[0]!r} is no query parameter of this resource; it has {expected}."
        )


Runs = Annotated[RunReader, Depends(reader)]
Launches = Annotated[RunLauncher, Depends(launcher)]
Streams = Annotated[Hub, Depends(hub)]
Fold = Annotated[RunFold, Depends(fold)]
KnownRun = Annotated[str, Depends(known_run)]
