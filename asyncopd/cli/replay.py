"""`asyncopd replay | backfill | counterfactual`: a request from the command line, done by a child process.

options --ReplayRequest.of, storage.replay.check--> python -m flows.offline      loads torch; this module does not
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import Annotated

from cyclopts import Parameter

from asyncopd.cli import STOPPED_BY_USER, Root
from asyncopd.config.requests import BackfillRequest, CounterfactualRequest, ReplayRequest, Request, Start
from storage.replay import check
from storage.runs import open_run
from storage.stores import open_store

STOP_S = 20.0
"""Patience with a child after Ctrl-C; it ends within a step."""

Out = Annotated[str | None, Parameter(metavar="DIR", help="Folder of tables (default: beside the run's reports).")]


def _field(request: type[Request], field: str, metavar: str | None = None, *, name: str | None = None) -> Parameter:
    """The option for a field of a request, whose description is its help."""
    about = " ".join(str(request.model_fields[field].description).split())
    return Parameter(name, metavar=metavar, help=about)


def replay(
    run_id: str,
    *,
    root: Root = "runs",
    steps: Annotated[str, _field(ReplayRequest, "steps", "FIRST:LAST")] = ":",
    from_version: Annotated[int | None, _field(ReplayRequest, "from_version", "N")] = None,
    start: Annotated[Start, _field(ReplayRequest, "start")] = "checkpoint",
    overrides: Annotated[tuple[str, ...], _field(ReplayRequest, "overrides", "KEY=VALUE", name="--set")] = (),
    compare: Annotated[tuple[str, ...], _field(ReplayRequest, "compare", "'KEY=VALUE …'")] = (),
    evaluate: Annotated[bool, _field(ReplayRequest, "evaluate")] = False,
    num_prompts: Annotated[int, _field(ReplayRequest, "num_prompts", "N", name="--prompts")] = 0,
    out: Out = None,
) -> int:
    asked = {"steps": steps, "from_version": from_version, "start": start, "overrides": overrides, "compare": compare}
    return _run(root, run_id, ReplayRequest.of({**asked, "evaluate": evaluate, "num_prompts": num_prompts}), out)


def backfill(
    run_id: str,
    *,
    root: Root = "runs",
    teacher: Annotated[tuple[str, ...], _field(BackfillRequest, "teacher", "KEY=VALUE")] = (),
    top_k: Annotated[str, _field(BackfillRequest, "top_k", "K")] = "0",
    num_teacher_draws: Annotated[int, _field(BackfillRequest, "num_teacher_draws", "M", name="--teacher-draws")] = 0,
    candidates: Annotated[str, _field(BackfillRequest, "candidates", "head=K,num_draws=N,law=LAW")] = "",
    cache: Annotated[bool, _field(BackfillRequest, "cache")] = False,
) -> int:
    asked = {"teacher": teacher, "top_k": top_k, "num_teacher_draws": num_teacher_draws, "candidates": candidates}
    return _run(root, run_id, BackfillRequest.of({**asked, "cache": cache}))


def counterfactual(
    run_id: str,
    *,
    root: Root = "runs",
    staleness: Annotated[str, _field(CounterfactualRequest, "staleness", "LIST")] = "0:64",
    order: Annotated[str, _field(CounterfactualRequest, "order", "LIST")] = "index,arrival",
    on_stale: Annotated[str, _field(CounterfactualRequest, "on_stale", "LIST")] = "train,drop,hold",
    lag: Annotated[int | None, _field(CounterfactualRequest, "lag", "N")] = None,
    from_version: Annotated[int | None, _field(CounterfactualRequest, "from_version", "N")] = None,
    out: Out = None,
) -> int:
    asked = {"staleness": staleness, "order": order, "on_stale": on_stale, "lag": lag, "from_version": from_version}
    return _run(root, run_id, CounterfactualRequest.of(asked), out)


def _run(root: str, run_id: str, asked: Request, out: str | None = None) -> int:
    # The child would take seconds to load torch before it could refuse.
    check(open_run(open_store(root), run_id), asked)
    process = subprocess.Popen(asked.command(root, run_id, out=out), env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal sent it to the child too, which stops after its step and says how to go on.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            return STOPPED_BY_USER if process.wait(STOP_S) else 0
        process.kill()
        return STOPPED_BY_USER
