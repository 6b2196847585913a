"""`asyncopd plan` against the runs of `benchmarks/overlap.py --root DIR`: ratios to τ = 0, overlap and staleness.

    python benchmarks/plan_overlap.py DIR --decode … --prefill-token-s … --speeds …    # as decode_curve.py prints them

Costs are read from the τ = 0 run alone. Predictions are made twice: with the lengths of that run, and with the lengths
that each run turned out to have, because a student that learns under another τ writes responses of another length.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asyncopd.cli.plan import costs_of_run
from asyncopd.config import RunConfig
from asyncopd.plan.forecast import assumptions, forecast
from asyncopd.plan.workload import DecodeCurve, Fleet, Observed
from storage.run_log import StoredRunLog
from storage.runs import open_run
from storage.stores import open_store


def lengths_of(log: StoredRunLog) -> Observed:
    shards = log.trajectory_shards()
    return Observed(tuple(len(t.response_ids) for shard in shards for t in log.read_trajectories(shard)), log.run_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--decode", required=True)
    parser.add_argument("--prefill-token-s", type=float, required=True)
    parser.add_argument("--speeds", required=True)
    arguments = parser.parse_args()
    store = open_store(arguments.root)
    runs = sorted(json.loads((Path(arguments.root) / "results.json").read_text()), key=lambda run: run["tau"])
    base = open_run(store, runs[0]["run_id"])
    work, costs = costs_of_run(
        base, RunConfig.model_validate(base.record["config"]), DecodeCurve.parse(arguments.decode)
    )
    speeds = tuple(float(speed) for speed in arguments.speeds.split(","))
    costs = replace(costs, prefill_token_s=arguments.prefill_token_s, speeds=speeds)

    table = Table(title=f"costs of {base.run_id}; predicted with its lengths / with each run's own")
    for heading in (
        "τ",
        "mean tokens",
        "ratio measured",
        "ratio predicted",
        "off by",
        "overlap measured",
        "predicted",
        "staleness measured",
        "predicted",
    ):
        table.add_column(heading, justify="right")
    fleet = Fleet(1, 1, 1)
    at_zero = forecast(work, costs, fleet, 0).tokens_per_s
    for run in runs:
        own = lengths_of(open_run(store, run["run_id"]))
        made = [forecast(replace(work, lengths=lengths), costs, fleet, run["tau"]) for lengths in (work.lengths, own)]
        measured = run["tokens_per_s"] / runs[0]["tokens_per_s"]
        ratios = [each.tokens_per_s / at_zero for each in made]
        table.add_row(
            str(run["tau"]),
            f"{sum(own.lengths) / len(own.lengths):.1f}",
            f"{measured:.2f}",
            " / ".join(f"{ratio:.2f}" for ratio in ratios),
            " / ".join(f"{ratio / measured - 1:+.0%}" for ratio in ratios),
            f"{run['overlap']:.2f}",
            " / ".join(f"{each.overlap:.2f}" for each in made),
            f"{run['staleness']:.2f}",
            " / ".join(f"{each.mean_staleness:.2f}" for each in made),
        )
    console = Console(width=150)
    console.print(table)
    console.print(costs)
    for sentence in assumptions(work, costs):
        console.print(f"- {sentence}", highlight=False)


if __name__ == "__main__":
    main()
