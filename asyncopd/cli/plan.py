"""`asyncopd plan`: what a fleet of GPUs would do, simulated with the run's own scheduling rule. Loads no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asyncopd.config import RunConfig
from asyncopd.errors import ConfigError
from asyncopd.plan.calibrate import calibrate
from asyncopd.plan.costs import Costs, DecodeCurve, Fleet
from asyncopd.plan.forecast import Forecast, Workload, assumptions, best_split, forecast
from asyncopd.plan.lengths import Lengths, Lognormal, Observed
from storage.runs import open_run
from storage.stores import open_store

SECONDS = {
    "train-step-s": "of a step whatever its tokens and GPUs",
    "score-shard-s": "of scoring a shard whatever its tokens",
    "publish-s": "of the learner after each step, until the version can be read",
    "fetch-s": "until an engine has read a version",
    "refresh-s": "an engine stands still to load it",
    "prefill-token-s": "for each token in flight at a refresh, whose cache is rebuilt",
    "shard-s": "an engine stands still for each finished shard",
    "handover-s": "from a finished shard to its scores in the learner, besides scoring",
    "switch-s": "of time-shared GPUs at each change between sampling and training",
}


def add_plan(commands: Any) -> None:
    """Add `plan` to the parser's commands."""
    about = "predict throughput, overlap and staleness of a fleet, and its best split (docs/capacity.md)"
    plan = commands.add_parser("plan", help=about, description=about)
    plan.add_argument("--lengths", metavar="RUN_ID|LAW", help="a run's, or lognormal:mean=…,p99=…,max=…")
    plan.add_argument("--costs-of", metavar="RUN_ID", help="read costs and lengths from this synchronous run")
    plan.add_argument("--root", default="runs", help="storage root of those runs (default: runs)")
    for role in ("rollout", "teacher", "learner"):
        plan.add_argument(f"--{role}-gpus", type=int, default=1, metavar="N")
    plan.add_argument("--tau", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], metavar="T", help="staleness bounds")
    plan.add_argument("--decode", metavar="N:S,…", help="seconds of a decode step by active slots: 1:0.006,512:0.02")
    plan.add_argument("--score-tokens-per-s", type=float, metavar="X", help="of one teacher GPU")
    plan.add_argument("--train-tokens-per-s", type=float, metavar="X", help="of one learner GPU")
    for name, what in SECONDS.items():
        plan.add_argument(f"--{name}", type=float, metavar="S", help=f"seconds {what}")
    plan.add_argument(
        "--speeds", metavar="X,…", help="speed with 1, 2, … processes busy on one machine, e.g. 1,0.9,0.6"
    )
    plan.add_argument("--batch-size", type=int, help="trajectories a step (default 256)")
    plan.add_argument("--shard-size", type=int, help="trajectories a shard (default 64)")
    plan.add_argument("--slots", type=int, help="responses an engine generates at once (default 256)")
    plan.add_argument("--steps", type=int, help="learner steps to simulate (default 40)")
    plan.add_argument("--seed", type=int, default=0, help="of the lengths")
    plan.add_argument("--no-best", action="store_true", help="do not look for the best split")
    plan.add_argument("--json", metavar="FILE", help="write everything here too")
    plan.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    work, costs = _inputs(arguments)
    fleet = Fleet(arguments.rollout_gpus, arguments.teacher_gpus, arguments.learner_gpus)
    shared = fleet.rollout + fleet.learner
    baseline = forecast(work, costs, Fleet(shared, fleet.teacher, shared, time_shared=True), 0)
    rows = [forecast(work, costs, fleet, tau) for tau in arguments.tau]
    said = assumptions(work, costs)
    console = Console()
    console.print(_table(f"{fleet.describe()}, and time-shared", [baseline, *rows], baseline))
    best: list[Forecast] = []
    if not arguments.no_best:
        console.print(f"trying every split of {fleet.num_gpus} GPUs …", highlight=False)
        best = [best_split(work, costs, fleet.num_gpus, tau) for tau in arguments.tau]
        console.print(_table(f"the best split of {fleet.num_gpus} GPUs", best, baseline))
    console.print("Assumptions:", style="bold")
    for sentence in said:
        console.print(f"- {sentence}", highlight=False)
    if arguments.json:
        record = {
            "workload": {**asdict(work), "lengths": work.lengths.describe()},
            "costs": asdict(costs),
            "assumptions": list(said),
            "time_shared": asdict(baseline),
            "fleet": [asdict(row) for row in rows],
            "best_splits": [asdict(row) for row in best],
        }
        Path(arguments.json).write_text(json.dumps(record, indent=1))
    return 0


def _table(title: str, rows: Sequence[Forecast], baseline: Forecast) -> Table:
    table = Table(title=title, caption="R rollout, T teacher, L learner GPUs; ratio to time-shared; mean staleness")
    for heading in ("GPUs", "τ", "tokens/s", "ratio", "overlap", "busy R/T/L", "staleness"):
        table.add_column(heading, justify="left" if heading == "GPUs" else "right", no_wrap=True)
    for row in rows:
        gpus, busy = row.fleet, (row.rollout_busy, row.teacher_busy, row.learner_busy)
        table.add_row(
            f"{gpus.rollout}RL + {gpus.teacher}T"
            if gpus.time_shared
            else f"{gpus.rollout}R + {gpus.teacher}T + {gpus.learner}L",
            str(row.max_staleness),
            f"{row.tokens_per_s:,.0f}",
            f"{row.tokens_per_s / baseline.tokens_per_s:.2f}",
            f"{row.overlap:.2f}",
            "/".join(f"{100 * share:.0f}" for share in busy) + " %",
            f"{row.mean_staleness:.2f}",
        )
    return table


# -- what is asked about ------------------------------------------------------------------------------------------
def _inputs(arguments: argparse.Namespace) -> tuple[Workload, Costs]:
    given = {
        name.replace("-", "_"): value
        for name in (*SECONDS, "score-tokens-per-s", "train-tokens-per-s")
        if (value := getattr(arguments, name.replace("-", "_"))) is not None
    }
    if arguments.speeds:
        given["speeds"] = _speeds(arguments.speeds)
    _check_given(arguments)
    shape = DecodeCurve.parse(arguments.decode)
    sizes = {
        "batch_size": arguments.batch_size,
        "shard_size": arguments.shard_size,
        "num_slots": arguments.slots,
        "num_steps": arguments.steps,
    }
    if arguments.costs_of:
        log, config = _stored(arguments.root, arguments.costs_of)
        work, costs = calibrate(log, config, shape)
        lengths = _lengths(arguments) if arguments.lengths else work.lengths
        own = {
            "batch_size": work.batch_size,
            "shard_size": work.shard_size,
            "num_slots": work.num_slots,
            "num_steps": work.num_steps,
        }
        chosen = {name: own[name] if value is None else value for name, value in sizes.items()}
        return Workload(lengths, **chosen, seed=arguments.seed), Costs(**{**vars(costs), **given})
    defaults = {"batch_size": 256, "shard_size": 64, "num_slots": 256, "num_steps": 40}
    chosen = {name: defaults[name] if value is None else value for name, value in sizes.items()}
    return Workload(_lengths(arguments), **chosen, seed=arguments.seed), Costs(decode=shape, **given)


NEEDED = {
    "decode": "--decode N:S,…: seconds of a decode step by active slots, for example 1:0.006,512:0.02",
    "lengths": "--lengths: a run id, or for example lognormal:mean=3000,p99=16000,max=16384",
    "score_tokens_per_s": "--score-tokens-per-s X, of one teacher GPU",
    "train_tokens_per_s": "--train-tokens-per-s X, of one learner GPU",
}


def _check_given(arguments: argparse.Namespace) -> None:
    """Raise ConfigError that names everything that is missing, so that nobody finds out one by one."""
    needed = ["decode"] if arguments.costs_of else list(NEEDED)
    missing = [NEEDED[name] for name in needed if getattr(arguments, name) is None]
    if missing:
        hint = "" if arguments.costs_of else " All but --decode can be read from a synchronous run: --costs-of RUN_ID."
        raise ConfigError(f"the forecast needs {'; '.join(missing)}.{hint}")


def _lengths(arguments: argparse.Namespace) -> Lengths:
    if arguments.lengths.startswith("lognormal:"):
        return Lognormal.parse(arguments.lengths)
    log, config = _stored(arguments.root, arguments.lengths)
    shards = [shard for shard in config.plan.shards() if log.find_trajectories(shard) is not None]
    lengths = tuple(len(t.response_ids) for shard in shards for t in log.read_trajectories(shard))
    if not lengths:
        raise ConfigError(f"run {arguments.lengths} has produced no responses yet.")
    return Observed(lengths, arguments.lengths)


def _stored(root: str, run_id: str) -> tuple[Any, RunConfig]:
    log = open_run(open_store(root), run_id)
    return log, RunConfig.model_validate(log.record["config"])


def _speeds(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--speeds {text!r} cannot be read; expected for example 1,0.9,0.6.") from error
