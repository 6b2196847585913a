"""`study staleness`: accuracy and KL to the teacher against a fixed lag, for estimators, learning rates and seeds.

    run_cells --one line per cell--> worker process --cell as JSON, put if absent--> store
                  ^----------------- one line per step or finished cell -----------------+

Workers take one cell after another; a killed study loses at most the cells in work. A worker ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from asyncopd.config import losses as c
from asyncopd.config.losses import LossConfig
from asyncopd.errors import RoleFailedError
from asyncopd.metrics import DRIFT, ENTROPY, ESS, RATIO_MAX, Metric
from asyncopd.ports import NamedBytes
from asyncopd.study.loop import LoopSettings, evaluate, train_lagged
from asyncopd.study.report import CellStore, digest
from asyncopd.study.worlds import WarmStart

STUDY_CODE = 1
"""Raised whenever what a cell measures changes."""
_REPORT_EVERY = 5
"""Steps between a worker's lines about a cell in work."""

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
            Cell(name, lag, lr, seed)
            for lag in sorted(self.lags)
            for seed in self.seeds
            for lr in self.lrs
            for name in self.estimators
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
    lag: int
    lr: float
    seed: int

    def name(self, loss: LossConfig) -> str:
        """Part of the cell's key; other settings of an estimator make another cell."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.estimator.lower())
        return f"{slug}-{digest(loss.model_dump(mode='json'))[:6]}-lag{self.lag}-lr{self.lr:g}-seed{self.seed}"


def cell_store(warm: WarmStart, store: NamedBytes, loop: LoopSettings) -> CellStore:
    """Where the cells of these settings are."""
    settings = {
        "code": STUDY_CODE,
        "student": warm.config.model_digest(warm.config.student),
        "teacher": warm.config.teacher.model_dump(mode="json"),
        "loop": asdict(loop),
    }
    return CellStore(store, "staleness", settings)


async def run_cell(
    warm: WarmStart, cells: CellStore, cell: Cell, loss: LossConfig, loop: LoopSettings, on_step: Callable[[int], None]
) -> None:
    """Train, evaluate and store one cell; nothing when it is stored already."""
    name = cell.name(loss)
    if cells.find(name) is not None:
        return
    started, cpu_started = time.time(), time.process_time()
    trained = await train_lagged(
        warm, loss, loop, lag=cell.lag, lr=cell.lr, seed=cell.seed, on_step=lambda step, _: on_step(step)
    )
    quality = await evaluate(warm, trained.safetensors, loop)
    recent = trained.metrics[len(trained.metrics) // 2 :]

    def over_recent(metric: Metric) -> float:
        return metric.over_steps([metrics[metric.key] for metrics in recent]) if recent else float("nan")

    row = {
        **asdict(cell),
        "loss": json.dumps(loss.model_dump(mode="json"), sort_keys=True),
        "num_steps": trained.num_steps,
        **asdict(quality),
        "drift_nats": over_recent(DRIFT),
        "ess_fraction": over_recent(ESS),
        "ratio_max": over_recent(RATIO_MAX),
        "entropy_nats": over_recent(ENTROPY),
        "seconds": time.time() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    cells.put(name, row)


async def run_cells(
    warm: WarmStart,
    store: NamedBytes,
    grid: Grid,
    *,
    worker_arguments: Sequence[str],
    num_workers: int,
    on_progress: Callable[[float, str], None],
) -> list[dict[str, Any]]:
    """Run every cell that is not stored yet, in worker processes. Returns the rows of all cells.

    Args:
        worker_arguments: after `python -m flows.study worker`; must lead to the same warm start, store and grid.
        on_progress: called with cells done (fractions for those in work) and the cell last heard of.
    Raises:
        RoleFailedError: a worker ended before its cells were done. Finished cells stay.
    """
    cells = cell_store(warm, store, grid.loop)
    named = {cell.name(grid.estimators[cell.estimator]): cell for cell in grid.cells()}
    missing = deque(name for name in named if cells.find(name) is None)
    progress = {name: 1.0 for name in named if name not in missing}
    on_progress(sum(progress.values()), f"{len(progress)} cells found")

    def heard(name: str, fraction: float) -> None:
        progress[name] = fraction
        on_progress(sum(progress.values()), name)

    if missing:
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(num_workers, len(missing))):
                workers.create_task(_work(worker_arguments, missing, named, heard))
    return [row for name in named if (row := cells.find(name)) is not None]


async def _work(
    arguments: Sequence[str], missing: deque[str], named: dict[str, Cell], heard: Callable[[str, float], None]
) -> None:
    """One worker process until no cell is missing."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "flows.study",
        "worker",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        while missing:
            name = missing.popleft()
            process.stdin.write(json.dumps(asdict(named[name])).encode() + b"\n")
            await process.stdin.drain()
            fraction = 0.0
            while fraction < 1.0:
                line = await process.stdout.readline()
                if not line:
                    raise RoleFailedError(
                        f"the worker of cell {name} ended with status {await process.wait()}; finished cells are kept, "
                        f"run the study again. Its last words: {(await errors).decode()[-1500:]}"
                    )
                fraction = json.loads(line)["done"]
                heard(name, fraction)
        process.stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        errors.cancel()


def serve(warm: WarmStart, store: NamedBytes, grid: Grid) -> None:
    """A worker: one cell per line of stdin, progress on stdout, until stdin ends (however the parent ended)."""
    cells = cell_store(warm, store, grid.loop)
    total = grid.loop.num_steps

    def say(done: float) -> None:
        print(json.dumps({"done": done}), flush=True)

    for line in lines_while_parent_lives():
        cell = Cell(**json.loads(line))
        asyncio.run(
            run_cell(
                warm,
                cells,
                cell,
                grid.estimators[cell.estimator],
                grid.loop,
                lambda step: say(0.95 * step / total) if step % _REPORT_EVERY == 0 else None,
            )
        )
        say(1.0)


def lines_while_parent_lives() -> Iterator[bytes]:
    """Lines of stdin, one at a time. At the end of stdin the process ends at once, in the middle of work or not:
    either the parent closed it because there is no more work, or the parent died."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        # Not sys.stdin: a daemon thread inside its lock makes the interpreter abort at exit.
        buffer = b""
        while chunk := os.read(0, 65536):
            *whole, buffer = (buffer + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
        os._exit(0)

    threading.Thread(target=read, name="read-stdin", daemon=True).start()
    while True:
        yield lines.get()
