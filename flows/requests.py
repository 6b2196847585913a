"""Flows of what is asked of runs beside training. What they print is an artifact.

    prefect deployment run replay/run -p run_id=RUN -p steps=40:100 --> ReplayRequest --> python -m flows.offline
    prefect deployment run study/staleness ---------------------------------------------> python -m flows.study
    prefect deployment run maintain/audit -p run_id=RUN --> done in the flow itself

The parameters of a request's flow are the run's address and the fields of the request, one by one: Prefect's page
shows a form for each, and `-p` takes what the command line takes. A flow run that is killed loses nothing: run the
deployment again with the same parameters, and it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

from prefect import Flow, flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Failed

from asyncopd.config.requests import BackfillRequest, CounterfactualRequest, ReplayRequest, Request
from asyncopd.errors import RoleFailedError
from asyncopd.study import study_command
from storage.maintain.audit import GRACE_S, audit_run
from storage.maintain.collect import collect_run
from storage.runs import find_run
from storage.stores import open_store


def request_flow(request: type[Request], about: str, **address: str) -> Flow[..., Coroutine[Any, Any, str]]:
    """The flow of a request: its parameters are those of `address`, which it describes, and the request's fields."""

    async def ask(run_id: str, root: str = "runs", out: str | None = None, **asked: Any) -> str:
        return await _done(request.of(asked), run_id, root, out)

    where = inspect.signature(ask, eval_str=True).parameters
    fields = inspect.signature(request).parameters.values()
    ask.__signature__ = inspect.Signature([*(where[name] for name in address), *fields])  # type: ignore[attr-defined]
    described = address | {name: " ".join(str(f.description).split()) for name, f in request.model_fields.items()}
    ask.__doc__ = "\n".join([about, "", "Args:", *(f"    {name}: {text}" for name, text in described.items())])
    ask.__name__ = ask.__qualname__ = request.verb
    return flow(name=request.verb, flow_run_name=f"{request.verb}-{{run_id}}", validate_parameters=False)(ask)


replay = request_flow(
    ReplayRequest,
    "Train again from a run's log, with no sampler and no teacher, into a run of its own.",
    run_id="of the parent.",
    root="its storage root.",
    out="folder of a comparison's table.",
)
backfill = request_flow(
    BackfillRequest,
    "Score a run's trajectories again, with another teacher or wider, beside what exists.",
    run_id="of the run, or of a replay of it.",
    root="its storage root.",
)
counterfactual = request_flow(
    CounterfactualRequest,
    "One log under other staleness bounds and orders: loss, drift, ESS and waste.",
    run_id="of the run that was sampled, not of a replay.",
    root="its storage root.",
    out="folder of tables and cells; cells in it are reused.",
)


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


@flow(name="maintain", flow_run_name="{action}-{run_id}")
async def maintain(
    action: Literal["audit", "collect"],
    run_id: str,
    root: str = "runs",
    grace_s: float = GRACE_S,
    dry_run: bool = False,
) -> str | State[Any]:
    """Verify or clean one run. An audit with findings ends as Failed, so that an automation or a person notices.

    Args:
        action: `audit` changes nothing; `collect` removes garbage.
        run_id: may be running.
        root: its storage root.
        grace_s: age, seconds, below which unreferenced objects are left alone.
        dry_run: of `collect`: only say what would happen.
    Returns:
        What the command would print; a Failed state with it when an audit found something.
    """
    store = open_store(root)
    find_run(store, run_id)
    if action == "audit":
        audit = await asyncio.to_thread(audit_run, store, run_id, grace_s=grace_s)
        text, is_clean = audit.to_text(), audit.is_clean
    else:
        collection = await asyncio.to_thread(collect_run, store, run_id, grace_s=grace_s, dry_run=dry_run)
        text, is_clean = collection.to_text(), True
    get_run_logger().info(text)
    await acreate_markdown_artifact(key=f"maintain-{action}", markdown=f"```\n{text}\n```", description=run_id)
    return text if is_clean else Failed(message=text)


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
