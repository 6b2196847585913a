"""Flows `replay`, `backfill` and `counterfactual`: work on a log that exists, in a child process; output as artifact.

A flow run that is killed loses nothing: run the deployment again with the same parameters, and it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from asyncopd.cli.replay import offline_command
from asyncopd.errors import RoleFailedError


@flow(name="replay", flow_run_name="replay-{run_id}")
async def replay(
    run_id: str,
    root: str = "runs",
    steps: str = ":",
    start: Literal["checkpoint", "weights"] = "checkpoint",
    overrides: list[str] | None = None,
    compare: list[str] | None = None,
    evaluate: bool = False,
    prompts: int = 0,
    out: str | None = None,
) -> str:
    """Train again from a run's log, with no sampler and no teacher, into a run of its own.

    Args:
        run_id: of the parent.
        root: its storage root.
        steps: FIRST:LAST of the parent's steps.
        start: the parent's exact state, or its published weights with a new optimizer.
        overrides: KEY=VALUE settings that change; scores=FOLDER or scores={FOLDER: WEIGHT, …} choose the teachers.
        compare: arms of a comparison, each `KEY=VALUE …`.
        evaluate: evaluate the first and the last version of a single replay.
        prompts: held-out prompts of a comparison; 0 for the run's own number.
        out: folder of a comparison's table.
    Returns:
        What `asyncopd replay` prints.
    """
    options: dict[str, Any] = {"steps": steps, "start": start, "overrides": overrides or [], "compare": compare or []}
    options |= {"run_id": run_id, "root": root, "evaluate": evaluate, "prompts": prompts, "out": out}
    return await _child("replay", options)


@flow(name="backfill", flow_run_name="backfill-{run_id}")
async def backfill(
    run_id: str,
    root: str = "runs",
    teacher: list[str] | None = None,
    top_k: int | Literal["all"] = 0,
    teacher_draws: int = 0,
    candidates: str = "",
    cache: bool = False,
) -> str:
    """Score a run's trajectories again, with another teacher or wider, beside what exists.

    Args:
        run_id: of the run, or of a replay of it.
        root: its storage root.
        teacher: KEY=VALUE settings of the teacher that differ from the run's own.
        top_k: most likely ids per token, or `all`.
        teacher_draws: ids per token drawn by the teacher.
        candidates: head=K,num_draws=N,law=LAW, recomputed from the published weights of the student that sampled.
        cache: share answers with other runs of the storage root.
    Returns:
        What `asyncopd backfill` prints.
    """
    options = {"run_id": run_id, "root": root, "teacher": teacher or [], "top_k": top_k}
    return await _child(
        "backfill", options | {"teacher_draws": teacher_draws, "candidates": candidates, "cache": cache}
    )


@flow(name="counterfactual", flow_run_name="counterfactual-{run_id}")
async def counterfactual(
    run_id: str,
    root: str = "runs",
    staleness: list[int] | None = None,
    order: list[str] | None = None,
    on_stale: list[str] | None = None,
    lag: int | None = None,
    from_version: int | None = None,
    out: str | None = None,
) -> str:
    """One log under other staleness bounds and orders: loss, drift, ESS and waste.

    Args:
        run_id: of the run that was sampled, not of a replay.
        root: its storage root.
        staleness: bounds in versions; 0, 1, 2, 4, … 64 by default.
        order: some of `index`, `arrival`; both by default.
        on_stale: some of `train`, `drop`, `hold`; all by default.
        lag: steps of delay for all bounds; as much as each bound allows by default.
        from_version: start of every setting; the largest lag by default.
        out: folder of tables and cells; cells in it are reused.
    Returns:
        What `asyncopd counterfactual` prints.
    """
    chosen = {"staleness": staleness, "order": order, "on_stale": on_stale, "lag": lag, "from_version": from_version}
    options = {name: value for name, value in chosen.items() if value is not None}
    return await _child("counterfactual", {"run_id": run_id, "root": root, "out": out, **options})


async def _child(command: str, options: Mapping[str, Any]) -> str:
    """Run the child to its end. Raises RoleFailedError with its last words when it fails."""
    get_run_logger().info(f"{command} of {options['run_id']}")
    process = await asyncio.create_subprocess_exec(
        *offline_command(command, options, watch_parent=True),
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
        raise RoleFailedError(f"{command} ended with status {process.returncode}: {errors.decode()[-1500:]}")
    text = output.decode()
    await acreate_markdown_artifact(
        key=command, markdown=f"```\n{text}\n```", description=f"{command} of {options['run_id']}"
    )
    return text
