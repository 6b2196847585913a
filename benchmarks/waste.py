"""What each order wastes: tokens generated, scored and trained on the walk recipe, in index order and in arrival order.

Everything else is equal. Rollout, scoring and learning are the real stages in processes of their own, without Prefect;
accuracy and KL are measured afterwards, on the last version. Runs are interleaved, because machines are shared and
noisy. Results are kept under `--root`, so that a run that was stopped goes on and one can measure in short sittings.

    python benchmarks/waste.py --steps 60 --rounds 2
    python benchmarks/waste.py --table           # of what was measured before
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asyncopd.config import load_config
from flows.report import summarise
from flows.roles import BODIES
from flows.wiring import open_stored_run
from storage.maintain.ledger import ledger_of
from storage.runs import create_run, new_record
from storage.stores import open_store

MODES: dict[str, dict[str, Any]] = {
    "index": {},
    "arrival, drop": {"staleness.order": "arrival", "staleness.on_stale": "drop"},
    "arrival, hold": {"staleness.order": "arrival", "staleness.on_stale": "hold"},
    "arrival, train": {"staleness.order": "arrival", "staleness.on_stale": "train"},
    "index, drained": {"staleness.in_flight_updates": False},
}


@dataclass(frozen=True)
class Measured:
    """One run."""

    mode: str
    generated: int
    """Response tokens, as are the next two."""
    scored: int
    trained: int
    dropped: int
    """Trajectories, as `held`."""
    held: int
    unused: int
    """Trajectories produced or scored that no step came to."""
    mean_staleness: float
    max_staleness: int
    trained_per_s: float
    accuracy: float
    kl_nats: float


# -- one run ------------------------------------------------------------------------------------------------------
def measure(mode: str, root: Path, overrides: dict[str, Any], steps: int) -> Measured:
    """One run of one mode, and what it came to."""
    settings = {"learner.num_steps": steps, "evaluate.every": steps, "storage.root": str(root), **overrides}
    config = load_config("configs/quickstart.yaml", {**settings, **MODES[mode]})
    run_id = f"waste-{time.time_ns()}"
    create_run(open_store(str(root)), run_id, new_record(config))
    run = open_stored_run(str(root), run_id)
    asyncio.run(BODIES["pretrain"](run))
    _run_roles(run_id, root, ["learn", "rollout", "score"])
    _run_roles(run_id, root, ["evaluate"])  # alone, so that it takes nothing from the others
    summary, ledger = summarise(run.log, config), ledger_of(run.log)
    if ledger.violations() or summary.last is None:
        raise SystemExit(f"{run_id} is not sound: {ledger.violations()[:3]}")
    counts = ledger.counts()
    return Measured(
        mode=mode,
        generated=summary.tokens.generated,
        scored=summary.tokens.scored,
        trained=summary.tokens.trained,
        dropped=counts["dropped"],
        held=counts["held"],
        unused=counts["produced"] + counts["scored"],
        mean_staleness=summary.staleness.mean_versions or 0.0,
        max_staleness=summary.staleness.max_versions or 0,
        trained_per_s=summary.tokens.trained_per_s or 0.0,
        accuracy=summary.last.accuracy or 0.0,
        kl_nats=summary.last.kl_nats or 0.0,
    )


def _run_roles(run_id: str, root: Path, roles: list[str]) -> None:
    command = [sys.executable, __file__, "--run-id", run_id, "--root", str(root), "--role"]
    children = [subprocess.Popen([*command, role], env=os.environ | {"OMP_NUM_THREADS": "1"}) for role in roles]
    try:
        for role, child in zip(roles, children, strict=True):
            if child.wait():
                raise SystemExit(f"{role} of {run_id} ended with status {child.returncode}")
    finally:
        for child in children:
            child.kill()


# -- the table ----------------------------------------------------------------------------------------------------
COLUMNS: dict[str, tuple[Callable[[Measured], float], str]] = {
    "generated": (lambda m: m.generated, "{:,.0f}"),
    "scored": (lambda m: m.scored, "{:,.0f}"),
    "trained": (lambda m: m.trained, "{:,.0f}"),
    "scored, never trained": (lambda m: m.scored - m.trained, "{:,.0f}"),
    "% of scored": (lambda m: 100 * (m.scored - m.trained) / m.scored, "{:.1f} %"),
    "dropped": (lambda m: m.dropped, "{:.0f}"),
    "held": (lambda m: m.held, "{:.0f}"),
    "staleness": (lambda m: m.mean_staleness, "{:.2f}"),
    "max": (lambda m: m.max_staleness, "{:.0f}"),
    "tokens/s": (lambda m: m.trained_per_s, "{:,.0f}"),
    "accuracy": (lambda m: 100 * m.accuracy, "{:.1f} %"),
    "KL": (lambda m: m.kl_nats, "{:.3f}"),
}


def table_of(results: list[Measured]) -> Table:
    """A row per mode: medians over its runs, in tokens but for dropped and held trajectories."""
    table = Table(title=f"walk recipe, medians over {len(results) // max(1, len({r.mode for r in results}))} rounds")
    for heading in ("order", "runs", *COLUMNS):
        table.add_column(heading, justify="right")
    for mode in MODES:
        runs = [result for result in results if result.mode == mode]
        if runs:
            cells = [shape.format(statistics.median(map(figure, runs))) for figure, shape in COLUMNS.values()]
            table.add_row(mode, str(len(runs)), *cells)
    return table


def main() -> None:
    """Run the benchmark and print its table; with --role, be one role of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/waste"), help="storage root and results.jsonl")
    parser.add_argument("--steps", type=int, default=60, help="learner steps of each run (default 60)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every mode, interleaved (default 1)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE")
    parser.add_argument("--shard-size", type=int, default=16, help="arrivals are whole shards (default 16 of 64)")
    parser.add_argument("--tau", type=int, default=2, help="max_staleness (default 2)")
    parser.add_argument("--max-ahead", type=int, default=2, help="of the arrival modes (default 2)")
    parser.add_argument("--table", action="store_true", help="only print what was measured before")
    parser.add_argument("--role", choices=BODIES, help=argparse.SUPPRESS)
    parser.add_argument("--run-id", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        asyncio.run(BODIES[arguments.role](open_stored_run(str(arguments.root), arguments.run_id)))
        return
    # SIGTERM (of `timeout`, for example) as an exception, so that `_run_roles` ends its children.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    console = Console(width=180)
    name = f"results-s{arguments.steps}-S{arguments.shard_size}-tau{arguments.tau}-ahead{arguments.max_ahead}.jsonl"
    arguments.root.mkdir(parents=True, exist_ok=True)
    path = arguments.root / name
    for number in range(0 if arguments.table else arguments.rounds):
        for mode in arguments.modes:
            overrides = {"rollout.shard_size": arguments.shard_size, "staleness.max_staleness": arguments.tau}
            if mode.startswith("arrival"):
                overrides["staleness.max_ahead"] = arguments.max_ahead
            measured = measure(mode, arguments.root, overrides, arguments.steps)
            with path.open("a") as lines:
                lines.write(json.dumps(asdict(measured)) + "\n")
            console.print(f"round {number + 1}, {mode}: {measured.trained_per_s:,.0f} tokens/s")
    lines = path.read_text().splitlines() if path.exists() else []
    console.print(table_of([Measured(**json.loads(line)) for line in lines]))


if __name__ == "__main__":
    main()
