"""What `max_ahead` buys and wastes in arrival order, on a simulated clock with the real rules: a second of CPU.

Durations are like the quickstart's: 128 slots at 14 ms per token, log-normal lengths of mean 28 up to 192 tokens,
0.11 s per learner step, 5 ms per scored shard; B = 64 in shards of 16, 60 steps.

    python benchmarks/waste_simulated.py --tau 2
"""

from __future__ import annotations

import argparse
import random
import statistics

from rich.console import Console
from rich.table import Table
from simulate import Durations, Simulation, simulate

from asyncopd.schedule import Plan

NUM_STEPS, BATCH_SIZE, SHARD_SIZE, NUM_SLOTS = 60, 64, 16, 128


def response_tokens(index: int) -> int:
    return min(192, max(2, int(random.Random(index).lognormvariate(2.9, 1.0))))


DURATIONS = Durations(lambda index: 0.014 * response_tokens(index), lambda shard: 0.005, lambda step: 0.11)


def row(plan: Plan, result: Simulation) -> tuple[str, str, str, str]:
    """Wall time, share of the started trajectories that were dropped, mean and largest staleness of the trained."""
    dropped = sum(len(arrival.dropped) for arrival in result.arrivals)
    positions = [index for arrival in result.arrivals for index in arrival.taken] or range(plan.num_indices)
    ages = [p // BATCH_SIZE - result.started_under[i] for p, i in enumerate(positions[: plan.num_indices])]
    share = dropped / len(result.started_under)
    return f"{result.wall_s:.1f} s", f"{share:.1%}", f"{statistics.mean(ages):.2f}", str(max(ages))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tau", type=int, default=2, help="max_staleness (default 2)")
    tau = parser.parse_args().tau
    table = Table("order", "max_ahead", "wall time", "dropped", "mean staleness", "max", title=f"simulated, τ = {tau}")
    plan = Plan(NUM_STEPS, BATCH_SIZE, SHARD_SIZE, tau)
    table.add_row("index", "–", *row(plan, simulate(plan, DURATIONS, num_slots=NUM_SLOTS)))
    for ahead in (1, 2, 3, 4):
        for on_stale in ("drop", "train"):
            plan = Plan(NUM_STEPS, BATCH_SIZE, SHARD_SIZE, tau, "arrival", on_stale, ahead)
            cells = row(plan, simulate(plan, DURATIONS, num_slots=NUM_SLOTS))
            table.add_row(f"arrival, {on_stale}", str(ahead), *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
