"""The process of a study, without Prefect.

    asyncopd study, flow `study` (flows/requests.py) --> python -m flows.study KIND --out DIR --> cells, tables, plot

A study that is killed loses nothing: run it again with the same `out`, and finished cells are reused.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyncopd.config import RunConfig, TinyModel
from asyncopd.errors import AsyncOPDError
from asyncopd.local.processes import watch_parent
from asyncopd.study import estimators, staleness
from asyncopd.study.loop import WarmStart
from asyncopd.study.report import write
from flows.engines import make_model
from flows.wiring import task_of
from storage.runs import find_model, read_model
from storage.stores import open_store
from storage.stores.base import ObjectStore


def main() -> None:
    """Run one study; errors of ours end with status 2 and their message."""
    parser = argparse.ArgumentParser(prog="python -m flows.study")
    parser.add_argument("study", choices=("estimators", "staleness"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", required=True, help="storage root with the cache of pre-trained models")
    parser.add_argument("--quick", action="store_true", help="of staleness: 63 short cells instead of 420")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--watch-parent", action="store_true", help="end when stdin ends")
    arguments = parser.parse_args()
    if arguments.watch_parent:
        watch_parent()
    grid = staleness.QUICK if arguments.quick else staleness.FULL
    out, models = open_store(arguments.out), open_store(arguments.models)
    run(arguments.study, out, models, RunConfig(), estimators.Scale(), grid, num_workers=arguments.workers)


def run(
    kind: str,
    out: ObjectStore,
    models: ObjectStore,
    config: RunConfig,
    scale: estimators.Scale,
    grid: staleness.Grid,
    *,
    num_workers: int,
) -> None:
    """Run one study to its end and print its tables.

    Args:
        config: names the student it starts from.
        scale, grid: how large the two studies are.
    """
    torch.set_num_threads(1)
    console = Console(stderr=True)
    started = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
            task = progress.add_task("warm start", total=None)

            def show(what: str, done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, description=what[:60].ljust(60))

            warm = warm_start(config, models, lambda step, total: show("pre-training the student", step, total))
            if kind == "estimators":
                rows = asyncio.run(estimators.run_cells(warm, out, scale, show))
            else:
                rows = staleness.run_cells(warm, out, grid, num_workers=num_workers, on_done=show)
            text = write(kind, out, rows)
    except AsyncOPDError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, style="red")
        sys.exit(2)
    print(text)
    console.print(f"{kind}: {time.monotonic() - started:.0f} s; tables and plot in {out.url}")


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
