"""`study staleness`: accuracy and KL to the teacher against a fixed lag, for estimators, learning rates and seeds.

    run_cells --a cell--> worker process --its row--> store

Workers take one cell after another; a killed study loses at most the cells in work. A worker ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

import torch

from asyncopd.config import losses as c
from asyncopd.config.losses import LossConfig
from asyncopd.errors import RoleFailedError
from asyncopd.metrics import DRIFT, ENTROPY, ESS, RATIO_MAX, Metric
from asyncopd.ports import NamedBytes
from asyncopd.study.cells import CellStore, digest
from asyncopd.study.loop import LoopSettings, WarmStart, evaluate, train_lagged

STUDY_CODE = 1
"""Raised whenever what a cell measures changes."""

QUICK_ESTIMATORS: dict[str, LossConfig] = {
    "dense reverse KL": c.DenseReverseKLConfig(),
    "head 4 + tail 4": c.HeadTailConfig(head=4, num_draws=4),
    "16 draws": c.PolicyGradientConfig(num_draws=16),
    "sampled token": c.PolicyGradientConfig(num_draws=1),
    "sampled token, A_old": c.PolicyGradientConfig(num_draws=1, advantage="behaviour"),
    "dense forward KL": c.DenseForwardKLConfig(),
    "student top-4, drop": c.ReverseKLConfig(support="student", top_k=4, tail="drop"),
}
FULL_ESTIMATORS: dict[str, LossConfig] = {
    **QUICK_ESTIMATORS,
    "sampled token, exact baseline": c.PolicyGradientConfig(num_draws=1, baseline="exact"),
    "16 draws, clip": c.PolicyGradientConfig(num_draws=16, correction=c.Clip()),
    "16 draws, m2po": c.PolicyGradientConfig(num_draws=16, correction=c.M2po()),
    "16 draws, truncate": c.PolicyGradientConfig(num_draws=16, correction=c.Truncate()),
    "forward KL, teacher top-8": c.ForwardKLConfig(top_k=8),
    "reverse KL, teacher top-8": c.ReverseKLConfig(top_k=8),
    "student top-4, bucket": c.ReverseKLConfig(support="student", top_k=4),
}


@dataclass(frozen=True)
class Grid:
    """Which cells a study has."""

    loop: LoopSettings
    estimators: dict[str, LossConfig]
    lags: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    def cells(self) -> list[Cell]:
        """Costly ones first, so that workers end together: at large lags nearly everything is sampled at once."""
        return [
            Cell(name, loss, lag, lr, seed)
            for lag in sorted(self.lags)
            for seed in self.seeds
            for lr in self.lrs
            for name, loss in self.estimators.items()
        ]


QUICK = Grid(
    loop=LoopSettings(num_steps=48, batch_size=32, max_new_tokens=96, num_prompts=300),
    estimators=QUICK_ESTIMATORS,
    lags=(0, 4, 64),
    lrs=(1e-3,),
    seeds=(0, 1, 2),
)
FULL = Grid(
    loop=LoopSettings(num_steps=100, batch_size=32, max_new_tokens=192, num_prompts=300),
    estimators=FULL_ESTIMATORS,
    lags=(0, 1, 4, 16, 64),
    lrs=(3e-4, 1e-3),
    seeds=(0, 1, 2),
)


@dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    estimator: str
    loss: LossConfig
    lag: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Part of the cell's key; other settings of an estimator make another cell."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.estimator.lower())
        return f"{slug}-{digest(self.loss.model_dump(mode='json'))[:6]}-lag{self.lag}-lr{self.lr:g}-seed{self.seed}"


def run_cells(
    warm: WarmStart, store: NamedBytes, grid: Grid, *, num_workers: int, on_done: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Run every cell that is not stored yet, in worker processes. Returns the rows of all cells.

    Args:
        store: at the output directory.
        on_done: called with (the cell, cells done, cells planned).
    Raises:
        RoleFailedError: a worker ended before its cell was done. Finished cells stay.
    """
    cells = CellStore(store, "staleness", {"code": STUDY_CODE, "loop": asdict(grid.loop), **warm.identity()})
    names = [cell.name for cell in grid.cells()]
    missing = [cell for cell in grid.cells() if cells.find(cell.name) is None]
    found = len(names) - len(missing)
    on_done(f"{found} cells found", found, len(names))
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        work = {pool.submit(measure_cell, warm, cell, grid.loop): cell.name for cell in missing}
        for number, done in enumerate(as_completed(work), found + 1):
            cells.put(work[done], done.result())
            on_done(work[done], number, len(names))
    except BrokenProcessPool as error:
        raise RoleFailedError(
            f"a worker of the study was killed or crashed; finished cells are kept, run the study again. {error}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return [row for name in names if (row := cells.find(name)) is not None]


def measure_cell(warm: WarmStart, cell: Cell, loop: LoopSettings) -> dict[str, Any]:
    """Train and evaluate one cell."""
    started, cpu_started = time.time(), time.process_time()
    trained = asyncio.run(train_lagged(warm, cell.loss, loop, lag=cell.lag, lr=cell.lr, seed=cell.seed))
    quality = asyncio.run(evaluate(warm, trained.safetensors, loop))
    recent = trained.metrics[len(trained.metrics) // 2 :]

    def over_recent(metric: Metric) -> float:
        return metric.over_steps([metrics[metric.key] for metrics in recent]) if recent else float("nan")

    return {
        **asdict(cell),
        "loss": json.dumps(cell.loss.model_dump(mode="json"), sort_keys=True),
        "num_steps": trained.num_steps,
        **quality,
        "drift_nats": over_recent(DRIFT),
        "ess_fraction": over_recent(ESS),
        "ratio_max": over_recent(RATIO_MAX),
        "entropy_nats": over_recent(ENTROPY),
        "seconds": time.time() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def _end_with_parent() -> None:
    """In a worker: end at Ctrl-C, and when the study is gone, however it went, in the middle of work or not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()
