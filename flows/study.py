"""Studies: the process that runs one, and flow `study` (deployments `study/estimators`, `study/staleness`) around it.

    flow study, asyncopd study --> python -m flows.study KIND --out DIR --> cells, tables, plot in DIR
                                                    staleness only: +--> python -m flows.study worker

A study that is killed loses nothing: run it again with the same `out`, and finished cells are reused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyncopd.config import RunConfig, TinyModel
from asyncopd.errors import AsyncOPDError, RoleFailedError
from asyncopd.local.processes import watch_parent
from asyncopd.study import estimators, staleness, study_command
from asyncopd.study.loop import LoopSettings
from asyncopd.study.report import write_estimators, write_staleness
from asyncopd.study.worlds import WarmStart
from flows.engines import make_model
from flows.wiring import task_of
from storage.runs import find_model, read_model
from storage.stores import open_store
from storage.stores.base import ObjectStore

MAX_WORKERS = 2


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


# -- sizes --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Size:
    """How large both studies are."""

    config: RunConfig
    """Names the student they start from."""
    scale: estimators.Scale
    grid: staleness.Grid


def tiny_config() -> RunConfig:
    """A student that is made in a second."""
    pretrain = {"num_steps": 5, "batch_size": 4}
    student = {"kind": "tiny", "num_layers": 1, "hidden_size": 16, "num_heads": 2, "pretrain": pretrain}
    return RunConfig.model_validate({"student": student})


def tiny() -> Size:
    """For tests: seconds, meaningless numbers."""
    loop = LoopSettings(num_steps=3, batch_size=4, max_new_tokens=16, num_prompts=6)
    scale = estimators.Scale((0,), further=3, num_prompts=8, num_prefixes=24, drifts=(0.0, 0.05), loop=loop)
    chosen = {name: staleness.QUICK_ESTIMATORS[name] for name in ("head 4 + tail 4", "dense reverse KL")}
    return Size(tiny_config(), scale, staleness.Grid(loop, chosen, lags=(0, 2), lrs=(1e-3,), seeds=(0, 1)))


SIZES: dict[str, Callable[[], Size]] = {
    "full": lambda: Size(RunConfig(), estimators.Scale(), staleness.FULL),
    "quick": lambda: Size(RunConfig(), estimators.Scale(), staleness.QUICK),
    "tiny": tiny,
}


# -- the process --------------------------------------------------------------------------------------------------
def main() -> None:
    """Run one study, or serve one as a worker; errors of ours end with status 2 and their message."""
    parser = argparse.ArgumentParser(prog="python -m flows.study")
    parser.add_argument("study", choices=("estimators", "staleness", "worker"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", required=True, help="storage root with the cache of pre-trained models")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--workers", type=int, default=MAX_WORKERS)
    parser.add_argument("--watch-parent", action="store_true", help="end when stdin ends")
    arguments = parser.parse_args()
    if arguments.watch_parent:
        watch_parent()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    try:
        _run(arguments, console)
    except* AsyncOPDError as group:
        for error in group.exceptions:
            console.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, style="red")
        sys.exit(2)


def _run(arguments: argparse.Namespace, console: Console) -> None:
    store, models = open_store(arguments.out), open_store(arguments.models)
    size = SIZES[arguments.size]()
    if arguments.study == "worker":
        staleness.serve(warm_start(size.config, models), store, size.grid)
        return
    started = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        task = progress.add_task("warm start", total=None)

        def show(done: float, total: float, what: str) -> None:
            progress.update(task, completed=round(done, 1), total=total, description=what[:60].ljust(60))

        warm = warm_start(size.config, models, lambda step, total: show(step, total, "pre-training the student"))
        if arguments.study == "estimators":
            cells = estimators.run_cells(warm, store, size.scale, lambda what, done, total: show(done, total, what))
            text = write_estimators(store, asyncio.run(cells))
        else:
            total = len(size.grid.cells())
            work = staleness.run_cells(
                warm,
                store,
                size.grid,
                worker_arguments=["--out", arguments.out, "--models", arguments.models, "--size", arguments.size],
                num_workers=min(arguments.workers, MAX_WORKERS),
                on_progress=lambda done, what: show(done, total, what),
            )
            text = write_staleness(store, asyncio.run(work))
    print(text)
    console.print(f"{arguments.study}: {time.monotonic() - started:.0f} s; tables and plot in {arguments.out}")


def warm_start(
    config: RunConfig, models: ObjectStore, on_step: Callable[[int, int], None] = lambda done, planned: None
) -> WarmStart:
    """The pre-trained student of `config`, a walk run with a tiny student; made once per model digest.

    Args:
        models: the store whose model cache is used, for example the one of training runs.
        on_step: called with (steps done, steps planned) while it is made.
    """
    model = config.student
    assert isinstance(model, TinyModel)
    if find_model(models, config.model_digest(model)) is None:
        num_steps = model.pretrain.num_steps
        task = task_of(config, model.pretrain.seed)
        make_model(config, models, task, model, on_step=lambda step, _: on_step(step, num_steps))
    objects = read_model(models, config.model_digest(model))
    return WarmStart(config, objects["config.json"].decode(), objects["model.safetensors"])


if __name__ == "__main__":
    main()
