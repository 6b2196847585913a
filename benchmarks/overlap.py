"""How much a staleness bound buys: trained tokens/s for τ in {0, 1, 2, 4} on the walk recipe, in one run.

The baseline τ = 0 is synchronous and split: rollout, scoring and learning live in their own processes, as for every
other τ, and take turns. Runs of all τ are interleaved, `--rounds` times, because machines are shared and noisy.

    python benchmarks/overlap.py --rounds 2 --steps 60
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asyncopd import stack
from asyncopd.config import load_config
from asyncopd.report import Summary, summarise
from asyncopd.roles import RoleProcesses
from asyncopd.stack import prefect_environment
from flows.train import role_specs
from storage.open import open_store
from storage.runs import create_run, find_model


async def run_once(root: Path, overrides: dict[str, Any]) -> Summary:
    """One run through real role processes and Prefect task runs; returns what its report measures."""
    config = load_config("configs/quickstart.yaml", {"storage.root": str(root), "evaluate.every": 0, **overrides})
    run_id = f"overlap-{time.time_ns()}"
    record = {"config": config.model_dump(mode="json"), "config_hash": config.digest(), "created": time.time()}
    log = create_run(open_store(str(root)), run_id, record)
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
        failure_of=lambda role: None,
        say=lambda line: None,
    ).run()


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="learner steps of each run (default 60)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every τ, interleaved (default 2)")
    parser.add_argument("--tau", type=int, nargs="+", default=[0, 1, 2, 4], metavar="T")
    arguments = parser.parse_args()
    console = Console()
    stack.up(lambda line: console.print(line, style="dim"))
    results: dict[int, list[Summary]] = {tau: [] for tau in arguments.tau}
    with tempfile.TemporaryDirectory(prefix="asyncopd-overlap-") as folder:
        for number in range(arguments.rounds):
            for tau in arguments.tau:
                overrides = {"staleness.max_staleness": tau, "learner.num_steps": arguments.steps}
                results[tau].append(asyncio.run(run_once(Path(folder), overrides)))
                console.print(f"round {number + 1}, τ={tau}: {results[tau][-1].throughput_tokens_per_s:,.0f} tokens/s")
    console.print(_table(results))


def _table(results: dict[int, list[Summary]]) -> Table:
    table = Table(title="walk recipe, medians over rounds")
    for heading in ("τ", "trained tokens/s", "ratio to τ=0", "overlap", "mean staleness", "max", "orchestration"):
        table.add_column(heading, justify="right")

    def median(tau: int, name: str) -> float:
        return statistics.median(getattr(summary, name) for summary in results[tau])

    base = median(min(results), "throughput_tokens_per_s")
    for tau in results:
        table.add_row(
            str(tau),
            f"{median(tau, 'throughput_tokens_per_s'):,.0f}",
            f"{median(tau, 'throughput_tokens_per_s') / base:.2f}",
            f"{median(tau, 'overlap'):.2f}",
            f"{median(tau, 'staleness_mean_versions'):.2f}",
            f"{median(tau, 'staleness_max_versions'):.0f}",
            f"{median(tau, 'orchestration_share'):.1%}",
        )
    return table


if __name__ == "__main__":
    main()
