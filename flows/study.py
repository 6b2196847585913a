"""Flow `study` (deployments `study/estimators`, `study/staleness`): a study in a child process, its tables as artifact.

A flow run that is killed loses nothing: run the deployment again with the same `out`, and finished cells are reused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Literal

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from asyncopd.errors import RoleFailedError
from asyncopd.study import study_command
from storage.stores import open_store


@flow(name="study", flow_run_name="study-{kind}")
async def study(
    kind: Literal["estimators", "staleness"], out: str, root: str = "runs", quick: bool = False, workers: int = 2
) -> str:
    """Run a study to its end.

    Args:
        kind: which one.
        out: directory of cells, tables and plot; finished cells in it are reused.
        root: storage root whose cache of pre-trained models is used.
        quick: of `staleness`: 63 short cells instead of 420.
        workers: processes, 1 or 2.
    Returns:
        The tables, Markdown.
    Raises:
        RoleFailedError: the study failed; its last words are in the message.
    """
    get_run_logger().info(f"study {kind} in {out}")
    process = await asyncio.create_subprocess_exec(
        *study_command(kind, out=out, root=root, quick=quick, workers=workers),
        "--watch-parent",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Never written to: its end tells the study that this process is gone, however it went.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        errors = await process.stderr.read()
        await process.wait()
    finally:
        # Cancelled: the study's own workers end with it.
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        raise RoleFailedError(f"study {kind} ended with status {process.returncode}: {errors.decode()[-1500:]}")
    text = open_store(out).get(f"{kind}.md").decode()
    await acreate_markdown_artifact(key=f"study-{kind}", markdown=text, description=f"tables of study {kind} in {out}")
    return text
