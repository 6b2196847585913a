"""`python -m asyncopd.study estimators|staleness --out DIR`: runs a study to its end, resuming what is there."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Before torch: OpenMP reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyncopd.config import RunConfig
from asyncopd.errors import AsyncOPDError
from asyncopd.local.processes import watch_parent
from asyncopd.study import estimators, staleness
from asyncopd.study.loop import LoopSettings
from asyncopd.study.report import write_estimators, write_staleness
from asyncopd.study.worlds import WarmStart, warm_start
from storage.stores import open_store
from storage.stores.base import ObjectStore

MAX_WORKERS = 2


def main() -> None:
    """Run one study, or serve one as a worker."""
    parser = argparse.ArgumentParser(prog="asyncopd study")
    parser.add_argument("study", choices=("estimators", "staleness", "worker"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", required=True, help="storage root with the cache of pre-trained models")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=MAX_WORKERS)
    parser.add_argument(
        "--tiny", action="store_true", help=argparse.SUPPRESS
    )  # for tests: seconds, meaningless numbers
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
    config = tiny_config() if arguments.tiny else RunConfig()
    grid = staleness.QUICK if arguments.quick else staleness.FULL
    if arguments.tiny:
        grid = tiny_grid()
    if arguments.study == "worker":
        staleness.serve(warm_start(config, models, lambda *_: None), store, grid)
        return
    started = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("warm start", total=None)

        def show(done: float, total: float, what: str) -> None:
            progress.update(task, completed=round(done, 1), total=total, description=what[:60].ljust(60))

        warm = warm_start(config, models, lambda step, total: show(step, total, "pre-training the student"))
        text = (_estimators if arguments.study == "estimators" else _staleness)(arguments, warm, store, grid, show)
    print(text)
    console.print(f"{arguments.study}: {time.monotonic() - started:.0f} s; tables and plot in {arguments.out}")


Show = Callable[[float, float, str], None]


def _estimators(_: argparse.Namespace, warm: WarmStart, store: ObjectStore, grid: staleness.Grid, show: Show) -> str:
    tiny = grid.loop.num_steps < 10
    scale = TINY_SCALE if tiny else estimators.Scale()
    rows = asyncio.run(estimators.run_cells(warm, store, scale, lambda what, done, total: show(done, total, what)))
    return write_estimators(store, rows)


def _staleness(
    arguments: argparse.Namespace, warm: WarmStart, store: ObjectStore, grid: staleness.Grid, show: Show
) -> str:
    options = [f"--{name}" for name in ("quick", "tiny") if getattr(arguments, name)]
    total = len(grid.cells())
    rows = asyncio.run(
        staleness.run_cells(
            warm,
            store,
            grid,
            worker_arguments=["--out", arguments.out, "--models", arguments.models, *options],
            num_workers=min(arguments.workers, MAX_WORKERS),
            on_progress=lambda done, what: show(done, total, what),
        )
    )
    return write_staleness(store, rows)


# -- for tests ----------------------------------------------------------------------------------------------------
TINY_SCALE = estimators.Scale(
    stages=(0,),
    further=3,
    num_prompts=8,
    num_prefixes=24,
    drifts=(0.0, 0.05),
    loop=LoopSettings(num_steps=3, batch_size=4, max_new_tokens=16, num_prompts=0),
)


def tiny_config() -> RunConfig:
    """A student that is made in a second."""
    student: dict[str, Any] = {"kind": "tiny", "num_layers": 1, "hidden_size": 16, "num_heads": 2}
    return RunConfig.model_validate({"student": {**student, "pretrain": {"num_steps": 5, "batch_size": 4}}})


def tiny_grid() -> staleness.Grid:
    """Eight cells of about half a second."""
    chosen = ("head 4 + tail 4", "dense reverse KL")
    return staleness.Grid(
        loop=LoopSettings(num_steps=3, batch_size=4, max_new_tokens=16, num_prompts=6),
        estimators={name: staleness.QUICK_ESTIMATORS[name] for name in chosen},
        lags=(0, 2),
        lrs=(1e-3,),
        seeds=(0, 1),
    )


if __name__ == "__main__":
    main()
