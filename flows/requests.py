"""Flows `replay`, `backfill`, `counterfactual` and `study`: done by a child process; what it prints as artifact.

    prefect deployment run replay/run -p run_id=RUN -p steps=40:100 --> ReplayRequest --> python -m flows.offline
    prefect deployment run study/staleness ---------------------------------------------> python -m flows.study

The parameters of a request's flow are the run's address and the fields of the request, one by one: Prefect's page
shows a form for each, and `-p` takes what the command line takes. A flow run that is killed loses nothing: run the
deployment again with the same parameters, and it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from asyncopd.config.requests import BackfillRequest, CounterfactualRequest, ReplayRequest, Request
from asyncopd.errors import RoleFailedError
from asyncopd.study import study_command

Work = Callable[..., Coroutine[Any, Any, str]]


def asking(request: type[Request]) -> Callable[[Work], Work]:
    """Give a flow's function the fields of `request` as parameters, in its signature and in its docstring."""

    def with_fields(function: Work) -> Work:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[:-1]
        fields = inspect.signature(request).parameters.values()
        described = [f"    {name}: {' '.join(str(f.description).split())}" for name, f in request.model_fields.items()]
        function.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
        function.__doc__ = "\n".join([inspect.getdoc(function) or "", *described])
        return function

    return with_fields


@flow(name="replay", flow_run_name="replay-{run_id}", validate_parameters=False)
@asking(ReplayRequest)
async def replay(run_id: str, root: str = "runs", out: str | None = None, **asked: Any) -> str:
    """Train again from a run's log, with no sampler and no teacher, into a run of its own.

    Args:
        run_id: of the parent.
        root: its storage root.
        out: folder of a comparison's table.
    """
    return await _done(ReplayRequest.of(asked), run_id, root, out)


@flow(name="backfill", flow_run_name="backfill-{run_id}", validate_parameters=False)
@asking(BackfillRequest)
async def backfill(run_id: str, root: str = "runs", **asked: Any) -> str:
    """Score a run's trajectories again, with another teacher or wider, beside what exists.

    Args:
        run_id: of the run, or of a replay of it.
        root: its storage root.
    """
    return await _done(BackfillRequest.of(asked), run_id, root)


@flow(name="counterfactual", flow_run_name="counterfactual-{run_id}", validate_parameters=False)
@asking(CounterfactualRequest)
async def counterfactual(run_id: str, root: str = "runs", out: str | None = None, **asked: Any) -> str:
    """One log under other staleness bounds and orders: loss, drift, ESS and waste.

    Args:
        run_id: of the run that was sampled, not of a replay.
        root: its storage root.
        out: folder of tables and cells; cells in it are reused.
    """
    return await _done(CounterfactualRequest.of(asked), run_id, root, out)


@flow(name="study", flow_run_name="study-{kind}")
async def study(
    kind: Literal["estimators", "staleness"],
    out: str,
    root: str = "runs",
    quick: bool = False,
    workers: Literal[1, 2] = 2,
) -> str:
    """Measure the estimators; the tables, Markdown.

    Args:
        kind: which study.
        out: directory of cells, tables and plot; finished cells in it are reused.
        root: storage root whose cache of pre-trained models is used.
        quick: of `staleness`: 63 short cells instead of 420.
        workers: processes, 1 or 2.
    """
    command = study_command(kind, out=out, root=root, quick=quick, workers=workers)
    text = await _output_of([*command, "--watch-parent"], f"study {kind}")
    await acreate_markdown_artifact(key=f"study-{kind}", markdown=text, description=f"tables of study {kind} in {out}")
    return text


async def _done(request: Request, run_id: str, root: str, out: str | None = None) -> str:
    """What the child of a request prints, run to its end."""
    text = await _output_of(request.command(root, run_id, out=out, watch_parent=True), f"{request.verb} of {run_id}")
    await acreate_markdown_artifact(
        key=request.verb, markdown=f"```\n{text}\n```", description=f"{request.verb} of {run_id}"
    )
    return text


async def _output_of(command: Sequence[str], what: str) -> str:
    """What a child process prints, run to its end. Raises RoleFailedError with its last words when it fails."""
    get_run_logger().info(what)
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        # Never written to: its end tells the child that this process is gone, however it went.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        # Not communicate(), which would close stdin.
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
        await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        raise RoleFailedError(f"{what} ended with status {process.returncode}: {errors.decode()[-1500:]}")
    return output.decode()
