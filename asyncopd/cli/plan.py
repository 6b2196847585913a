"""`asyncopd plan` and `asyncopd study`: what can be known before a run. Loads no torch.

A plan is simulated with the run's own scheduling rule; a study is measured in a child process.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from asyncopd.cli import STOPPED_BY_USER
from asyncopd.config import RunConfig
from asyncopd.errors import ConfigError
from asyncopd.local.console import console_table
from asyncopd.plan.forecast import Forecast, assumptions, best_split, calibrate, forecast
from asyncopd.plan.workload import Costs, DecodeCurve, Fleet, Lengths, Lognormal, Observed, Workload
from asyncopd.study import study_command
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.runs import open_run
from storage.stores import open_store

Gpus = Annotated[int, Parameter(metavar="N")]
Seconds = Annotated[float | None, Parameter(metavar="S")]
Rate = Annotated[float | None, Parameter(metavar="X")]
Out = Annotated[str, Parameter(metavar="DIR", help="Cells, tables and plot; finished cells are reused.")]
Models = Annotated[str, Parameter("--root", help="Storage root whose cache of pre-trained models is used.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Given:
    """What is said on the command line; the rest is read from a run, or has its default.

    Attributes:
        lengths: A run's, or lognormal:mean=…,p99=…,max=….
        costs_of: Read costs and lengths from this synchronous run.
        root: Storage root of those runs.
        decode: Seconds of a decode step by active slots: 1:0.006,512:0.02.
        score_tokens_per_s: Of one teacher GPU.
        train_tokens_per_s: Of one learner GPU.
        train_step_s: Seconds of a step whatever its tokens and GPUs.
        score_shard_s: Seconds of scoring a shard whatever its tokens.
        publish_s: Seconds of the learner after each step, until the version can be read.
        fetch_s: Seconds until an engine has read a version.
        refresh_s: Seconds an engine stands still to load it.
        prefill_token_s: Seconds for each token in flight at a refresh, whose cache is rebuilt.
        shard_s: Seconds an engine stands still for each finished shard.
        handover_s: Seconds from a finished shard to its scores in the learner, besides scoring.
        switch_s: Seconds of time-shared GPUs at each change between sampling and training.
        speeds: Speed with 1, 2, … processes busy on one machine, e.g. 1,0.9,0.6.
        batch_size: Trajectories a step (default 256).
        shard_size: Trajectories a shard (default 64).
        num_slots: Responses an engine generates at once (default 256).
        num_steps: Learner steps to simulate (default 40).
        seed: Of the lengths.
    """

    lengths: Annotated[str | None, Parameter(metavar="RUN_ID|LAW")] = None
    costs_of: Annotated[str | None, Parameter(metavar="RUN_ID")] = None
    root: str = "runs"
    decode: Annotated[str | None, Parameter(metavar="N:S,…")] = None
    score_tokens_per_s: Rate = None
    train_tokens_per_s: Rate = None
    train_step_s: Seconds = None
    score_shard_s: Seconds = None
    publish_s: Seconds = None
    fetch_s: Seconds = None
    refresh_s: Seconds = None
    prefill_token_s: Seconds = None
    shard_s: Seconds = None
    handover_s: Seconds = None
    switch_s: Seconds = None
    speeds: Annotated[str | None, Parameter(metavar="X,…")] = None
    batch_size: int | None = None
    shard_size: int | None = None
    num_slots: Annotated[int | None, Parameter("--slots")] = None
    num_steps: Annotated[int | None, Parameter("--steps")] = None
    seed: int = 0

    def resolve(self) -> tuple[Workload, Costs]:
        """What is to be simulated. Raises ConfigError that names everything that is missing."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        needed = {"decode": NEEDED["decode"]} if self.costs_of else NEEDED
        if missing := [what for name, what in needed.items() if name not in given]:
            hint = "" if self.costs_of else " All but --decode can be read from a synchronous run: --costs-of RUN_ID."
            raise ConfigError(f"the forecast needs {'; '.join(missing)}.{hint}")
        shape = DecodeCurve.parse(given.pop("decode"))
        if self.speeds:
            given["speeds"] = _speeds(self.speeds)
        costs = {name: given[name] for name in Costs.__annotations__ if name in given}
        sizes = {name: given[name] for name in (*SIZES, "seed") if name in given}
        if self.costs_of:
            log = open_run(open_store(self.root), self.costs_of)
            work, measured = costs_of_run(log, RunConfig.model_validate(log.config()), shape)
            lengths = self._lengths() if self.lengths else work.lengths
            return replace(work, **sizes, lengths=lengths), replace(measured, **costs)
        return Workload(self._lengths(), **{**SIZES, **sizes}), Costs(decode=shape, **costs)

    def _lengths(self) -> Lengths:
        asked = self.lengths or ""
        if asked.startswith("lognormal:"):
            return Lognormal.parse(asked)
        if lengths := _lengths_of(open_run(open_store(self.root), asked)):
            return Observed(lengths, asked)
        raise ConfigError(f"run {asked} has produced no responses yet.")


NEEDED = {
    "decode": "--decode N:S,…: seconds of a decode step by active slots, for example 1:0.006,512:0.02",
    "lengths": "--lengths: a run id, or for example lognormal:mean=3000,p99=16000,max=16384",
    "score_tokens_per_s": "--score-tokens-per-s X, of one teacher GPU",
    "train_tokens_per_s": "--train-tokens-per-s X, of one learner GPU",
}
SIZES = {"batch_size": 256, "shard_size": 64, "num_slots": 256, "num_steps": 40}
NOTHING = Given()


def plan(
    *,
    given: Given = NOTHING,
    rollout_gpus: Gpus = 1,
    teacher_gpus: Gpus = 1,
    learner_gpus: Gpus = 1,
    tau: Annotated[tuple[int, ...], Parameter(metavar="T", consume_multiple=True)] = (0, 1, 2, 4, 8, 16),
    no_best: bool = False,
    json_: Annotated[Path | None, Parameter("--json", metavar="FILE")] = None,
) -> int:
    """Forecast a fleet.

    Args:
        rollout_gpus: GPUs that sample.
        teacher_gpus: GPUs that score.
        learner_gpus: GPUs that train.
        tau: Staleness bounds, one or more.
        no_best: Do not look for the best split.
        json_: Write everything here too.
    """
    work, costs = given.resolve()
    fleet = Fleet(rollout_gpus, teacher_gpus, learner_gpus)
    shared = fleet.rollout + fleet.learner
    baseline = forecast(work, costs, Fleet(shared, fleet.teacher, shared, time_shared=True), 0)
    rows = [forecast(work, costs, fleet, bound) for bound in tau]
    said = assumptions(work, costs)
    console = Console(highlight=False)
    console.print(_table(f"{fleet.describe()}, and time-shared", [baseline, *rows], baseline))
    best: list[Forecast] = []
    if not no_best:
        console.print(f"trying every split of {fleet.num_gpus} GPUs …")
        best = [best_split(work, costs, fleet.num_gpus, bound) for bound in tau]
        console.print(_table(f"the best split of {fleet.num_gpus} GPUs", best, baseline))
    console.print("Assumptions:", style="bold")
    for sentence in said:
        console.print(f"- {sentence}")
    if json_ is not None:
        record = {
            "workload": {**asdict(work), "lengths": work.lengths.describe()},
            "costs": asdict(costs),
            "assumptions": list(said),
            "time_shared": asdict(baseline),
            "fleet": [asdict(row) for row in rows],
            "best_splits": [asdict(row) for row in best],
        }
        json_.write_text(json.dumps(record, indent=1))
    return 0


def estimators(*, out: Out, root: Models = "runs") -> int:
    """Measure gradients."""
    return _run_study("estimators", out=out, root=root)


def staleness(*, out: Out, root: Models = "runs", quick: bool = False, workers: Literal[1, 2] = 2) -> int:
    """Measure training at a fixed lag.

    Args:
        quick: 63 short cells, under 10 minutes on two cores.
        workers: Processes.
    """
    return _run_study("staleness", out=out, root=root, quick=quick, workers=workers)


def _run_study(name: str, **options: Any) -> int:
    try:
        return subprocess.call(study_command(name, **options), env={**os.environ, "OMP_NUM_THREADS": "1"})
    except KeyboardInterrupt:
        return STOPPED_BY_USER


def _table(title: str, forecasts: Sequence[Forecast], baseline: Forecast) -> Table:
    header = ("GPUs", "τ", "tokens/s", "ratio to time-shared", "overlap", "busy R/T/L", "mean staleness")
    rows = []
    for row in forecasts:
        gpus, ratio = row.fleet, row.tokens_per_s / baseline.tokens_per_s
        apart = f"{gpus.rollout}R + {gpus.teacher}T + {gpus.learner}L"
        split = f"{gpus.rollout}RL + {gpus.teacher}T" if gpus.time_shared else apart
        busy = "/".join(f"{100 * share:.0f}" for share in (row.rollout_busy, row.teacher_busy, row.learner_busy))
        speed = (f"{row.tokens_per_s:,.0f}", f"{ratio:.2f}", f"{row.overlap:.2f}")
        rows.append((split, str(row.max_staleness), *speed, f"{busy} %", f"{row.mean_staleness:.2f}"))
    return console_table(f"{title} (R rollout, T teacher, L learner)", header, rows)


def costs_of_run(log: StoredRunLog, config: RunConfig, shape: DecodeCurve) -> tuple[Workload, Costs]:
    """What `calibrate` reads from a stored run."""
    view = RunView(log).read("step", "rewind", "spans")
    return calibrate(log.run_id, config, shape, steps=view.steps(), spans=view.spans(), lengths=_lengths_of(log))


def _lengths_of(log: StoredRunLog) -> tuple[int, ...]:
    return tuple(len(t.response_ids) for shard in log.trajectory_shards() for t in log.read_trajectories(shard))


def _speeds(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--speeds {text!r} cannot be read; expected for example 1,0.9,0.6.") from error
