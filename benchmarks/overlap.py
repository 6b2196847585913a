"""How much a staleness bound buys: trained tokens/s for τ in {0, 1, 2, 4} on the walk recipe, in one run.

The baseline τ = 0 is synchronous and split: rollout, scoring and learning live in their own processes, as for every
other τ, and take turns. Runs of all τ are interleaved, `--rounds` times, because machines are shared and noisy.

    python benchmarks/overlap.py --rounds 2 --steps 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asyncopd.config import load_config
from asyncopd.local import stack
from asyncopd.local.processes import RoleProcesses
from asyncopd.local.stack import prefect_environment
from asyncopd.report.summary import Summary
from flows.report import summarise
from flows.train import role_specs
from storage.runs import create_run, find_model, new_record
from storage.stores import open_store


async def run_once(root: Path, overrides: dict[str, Any]) -> Summary:
    """One run through real role processes and Prefect task runs; returns what its report measures."""
    config = load_config("configs/quickstart.yaml", {"storage.root": str(root), "evaluate.every": 0, **overrides})
    run_id = f"overlap-{time.time_ns()}"
    log = create_run(open_store(str(root)), run_id, new_record(config))
    specs = role_specs(config)
    if find_model(log.store, config.model_digest(config.student)) is None:
        await _finish(log.run_id, root, [type(specs[0])("pretrain")])
    await _finish(log.run_id, root, specs)
    return summarise(log, config)


async def _finish(run_id: str, root: Path, specs: list[Any]) -> None:
    await RoleProcesses(
        specs,
        run_id=run_id,
        root=str(root),
        log_dir=root / "logs",
        env=prefect_environment(),
        max_restarts=0,
        hang_s=300,
        beats=dict,
        retire=lambda pid: None,
        failure_of=lambda role: None,
        say=lambda line: None,
    ).run()


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="learner steps of each run (default 60)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every τ, interleaved (default 2)")
    parser.add_argument("--tau", type=int, nargs="+", default=[0, 1, 2, 4], metavar="T")
    parser.add_argument("--root", metavar="DIR", help="keep the runs here, with results.json, for `asyncopd plan`")
    arguments = parser.parse_args()
    console = Console(width=130)
    stack.up(lambda line: console.print(line, style="dim"))
    results: dict[int, list[Summary]] = {tau: [] for tau in arguments.tau}
    with contextlib.ExitStack() as folders:
        folder = arguments.root or folders.enter_context(tempfile.TemporaryDirectory(prefix="asyncopd-overlap-"))
        for number in range(arguments.rounds):
            for tau in arguments.tau:
                overrides = {"staleness.max_staleness": tau, "learner.num_steps": arguments.steps}
                results[tau].append(asyncio.run(run_once(Path(folder), overrides)))
                rate = results[tau][-1].tokens.trained_per_s or 0
                console.print(f"round {number + 1}, τ={tau}: {rate:,.0f} tokens/s")
    console.print(_table(results))
    if arguments.root:
        rows = [
            {
                "tau": tau,
                "round": number,
                "run_id": run.run_id,
                "tokens_per_s": run.tokens.trained_per_s,
                "overlap": run.overlap,
                "staleness": run.staleness.mean_versions,
            }
            for tau, runs in results.items()
            for number, run in enumerate(runs)
        ]
        (Path(arguments.root) / "results.json").write_text(json.dumps(rows, indent=1))


COLUMNS: dict[str, tuple[Callable[[Summary], float | None], str]] = {
    "trained tokens/s": (lambda s: s.tokens.trained_per_s, "{:,.0f}"),
    "overlap": (lambda s: s.overlap, "{:.2f}"),
    "mean staleness": (lambda s: s.staleness.mean_versions, "{:.2f}"),
    "max": (lambda s: s.staleness.max_versions, "{:.0f}"),
    "orchestration": (lambda s: s.orchestration.share, "{:.1%}"),
    "exposed": (lambda s: s.orchestration.exposed_share, "{:.1%}"),
    "rollout busy": (lambda s: s.roles["rollout"].busy_share, "{:.0%}"),
    "learn busy": (lambda s: s.roles["learn"].busy_share, "{:.0%}"),
}


def _table(results: dict[int, list[Summary]]) -> Table:
    table = Table(title="walk recipe, medians over rounds")
    for heading in ("τ", "ratio to τ=0", *COLUMNS):
        table.add_column(heading, justify="right")

    def median(tau: int, figure: Callable[[Summary], float | None]) -> float:
        return statistics.median(figure(summary) or 0.0 for summary in results[tau])

    throughput, _ = COLUMNS["trained tokens/s"]
    for tau in results:
        # Paired: each run against the synchronous one of its own round.
        pairs = zip(results[tau], results[min(results)], strict=True)
        ratios = [(throughput(run) or 0) / (throughput(base) or 1) for run, base in pairs]
        cells = [shape.format(median(tau, figure)) for figure, shape in COLUMNS.values()]
        table.add_row(str(tau), f"{statistics.median(ratios):.2f}", *cells)
    return table


if __name__ == "__main__":
    main()
