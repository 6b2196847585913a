"""Counterfactual staleness: one log, consumed late, in other orders and under other bounds. Without Prefect.

    log --log_of--> consume (pure) --indices per clock--> Student from version f --> a Cell per setting, tables in --out

Every setting starts from the parent's state at one version f, the largest lag, and is measured over the same clocks,
f + the largest lag to the end: by then each has trained `lag` steps and its batches are ones the parent had not trained
when it published f.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
from rich.console import Console

from asyncopd.config.requests import CounterfactualRequest
from asyncopd.errors import ConfigError, NonFiniteError
from asyncopd.learner.counterfactual import (
    Consumption,
    Log,
    Rollout,
    Setting,
    check_defined,
    consume,
    settings_of,
    whole_batches,
)
from asyncopd.learner.optimize import StepResult
from asyncopd.learner.statistics import staleness_tokens
from asyncopd.learner.student import Student
from asyncopd.local.console import bar, console_table
from asyncopd.metrics import DRIFT, ESS, GRAD_NORM, LOSS, SECONDS, Metric
from asyncopd.report.text import number, percent, table
from asyncopd.schedule import Arrival
from asyncopd.study.cells import CellStore, parquet
from asyncopd.types import IndexRange, ScoredTrajectory
from flows.engines import student_skeleton
from flows.replay import folder_of, train_to
from flows.wiring import OpenRun, open_stored_run, student_of
from storage.replay import check_counterfactual, read_step, scores_view
from storage.stores import open_store

NOTE = (
    "Exact: which rollouts each step consumes under the setting, their staleness (recorded versions against the "
    "replayed learner's clock), and every ratio, drift and ESS, recomputed by the replayed learner on the recorded "
    "log-probs. Approximate: the closed loop. The rollouts were made by the original run's policies at its own "
    "staleness, not by the replayed learner's, so lag acts as a delay line between production and consumption. Every "
    "setting starts from version {first} of the run, which had trained the first {lag} batches of the most delayed "
    "setting already; the figures are therefore of clocks {measured} to {last} only. Under another order than "
    "the run's, rollouts that overtook each other may come a few clocks earlier or later than that. In arrival order "
    "whole shards arrive, at the times at which the original run's scores appeared; in index order a batch waits until "
    "all of it is there (idle)."
)
MIN_MEASURED = 8
"""Clocks that must be left to measure; fewer would be mostly noise."""
Figures = Mapping[int, tuple[StepResult, Mapping[int, int]]]
"""Clock of a trained step -> what it measured, and how many of its tokens had which staleness, in versions."""


@dataclass(frozen=True)
class Cell(Setting):
    """What a replayed learner measured under one setting, over the measured clocks; means are over trained tokens."""

    num_steps: int
    """Steps trained."""
    num_idle: int
    """Clocks at which there was not enough to train."""
    is_finite: bool
    """False when a loss was not finite; the figures are those of the steps before."""
    staleness_mean: float
    """Versions."""
    staleness_max: int
    loss_nats: float
    drift_nats: float
    ess_fraction: float
    grad_norm: float
    num_tokens: int
    """Trained."""
    num_tokens_wasted: int
    """Scored, and dropped or held when their turn came."""

    @property
    def waste(self) -> float:
        """Share of the tokens whose turn came that were not trained."""
        total = self.num_tokens + self.num_tokens_wasted
        return self.num_tokens_wasted / total if total else 0.0


async def run_counterfactual(
    root: str, run_id: str, asked: CounterfactualRequest, *, console: Console, out: str | None
) -> None:
    """`asyncopd counterfactual`: tables in `out`, and a file for each finished cell, which is used again."""
    run = open_stored_run(root, run_id)
    log = log_of(run)
    settings = settings_of(asked, recorded_staleness=log.recorded_staleness)
    check_defined(settings, log)
    first, measured_from = start_version(settings, log, asked.from_version)
    question = {"run": run_id, "config": run.config.digest(), "first": first, "measured_from": measured_from}
    question["num_clocks"] = log.num_clocks
    folder = folder_of(out, f"{run_id}-counterfactual", question)
    store = open_store(folder)
    known = CellStore(store, "counterfactual", question)
    cells = await run_cells(run, log, settings, first=first, measured_from=measured_from, known=known, console=console)
    lag = max(setting.lag for setting in settings)
    note = NOTE.format(first=first, lag=lag, measured=measured_from, last=log.num_clocks - 1)
    header = list(_row(cells[0]))
    rows = [list(_row(cell).values()) for cell in cells]
    text = f"# Counterfactuals of {run_id}\n\n{table(header, rows, left=(1, 2))}\n\n{note}\n"
    store.put("counterfactual.md", text.encode())
    store.put("counterfactual.parquet", parquet([{**asdict(cell), "waste": cell.waste} for cell in cells]))
    recorded = f"recorded in order {log.order} at staleness up to {log.recorded_staleness} versions"
    console.print(recorded, highlight=False)
    console.print(console_table("counterfactual staleness", header, rows, left=(1, 2)))
    console.print(note, highlight=False)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)


def log_of(run: OpenRun) -> Log:
    """Every scored rollout that the run's steps decided about, with when its scores appeared on the learner's clock.

    Raises:
        ConfigError: the run trained nothing, lacks scores, or is a replay.
    """
    check_counterfactual(run.log)
    steps = run.log.steps()
    plan, view = run.config.plan, scores_view(run.log, run.config)
    if plan.order == "arrival":
        arrivals = run.log.arrivals()
    else:  # The learner came to the shards as they are numbered, and left nothing out.
        arrivals = [Arrival(number, shard, shard.start) for number, shard in enumerate(plan.shards())]
    # With the step that decided about each index; without indices that no trained step came to.
    reached = ((arrival, {i: k for i, k in arrival.steps(plan.batch_size) if k < len(steps)}) for arrival in arrivals)
    decided = [(arrival, step_of) for arrival, step_of in reached if step_of]
    shards = [arrival.shard for arrival, _ in decided]
    view.check(shards, vocab_size=run.task.tokenizer.vocab_size)
    scored_at = [manifest.created for shard in shards if (manifest := view.find(shard)) is not None]
    # From the shard logs alone: a step began when its optimizer step did, which its record tells.
    began = [step.finished - step.metrics[SECONDS.key] for step in steps]
    rollouts = [
        Rollout(
            index=trajectory.index,
            step=(step := step_of[trajectory.index]),
            # Clocks tick in milliseconds, but a rollout is never there before the version that ended it, nor later
            # than the step that decided about it.
            arrived_step=min(step, max(bisect_left(began, scored_at[number]), trajectory.version_last)),
            # Recorded arrivals are the order itself; learners look at a folder now and then, so times may differ.
            arrival=scored_at[number] if plan.order == "index" else float(number),
            version_oldest=trajectory.version_oldest,
            num_tokens=len(trajectory.response_ids),
            is_trained=trajectory.index not in {*arrival.dropped, *arrival.held},
        )
        for number, (arrival, step_of) in enumerate(decided)
        for trajectory in view.log.read_trajectories(arrival.shard)
        if trajectory.index in step_of
    ]
    indices = {index for _, step_of in decided for index in step_of}
    num_batches = whole_batches(indices, plan.batch_size)
    num_filtered = len(indices) - len(rollouts)
    return Log(run.log.run_id, plan.order, plan.batch_size, len(steps), rollouts, num_batches, num_filtered)


def start_version(settings: Sequence[Setting], log: Log, asked: int | None) -> tuple[int, int]:
    """(version every setting starts from, first clock measured).

    Raises:
        ConfigError: the log is too short for the largest lag.
    """
    lag = max(setting.lag for setting in settings)
    first = lag if asked is None else asked
    measured_from = first + lag
    if first < lag or log.num_clocks - measured_from < MIN_MEASURED:
        longest = (log.num_clocks - MIN_MEASURED) // 2
        raise ConfigError(
            f"a lag of {lag} steps from version {first}: expected a start at or after version {lag}, and at least "
            f"{MIN_MEASURED} of the log's {log.num_clocks} steps after clock {measured_from}. Ask for less staleness; "
            f"this log bears a lag of {longest}."
        )
    return first, measured_from


async def run_cells(
    run: OpenRun,
    log: Log,
    settings: Sequence[Setting],
    *,
    first: int,
    measured_from: int,
    known: CellStore,
    console: Console,
) -> list[Cell]:
    """Train and measure every setting that is not `known` yet; settings that consume alike are trained once.

    Args:
        settings: that mean something on this log, see `check_defined`.
        known: finished cells; each new one is put there, so that a stopped call loses at most one.
    """
    names = {s: f"staleness{s.max_staleness}-lag{s.lag}-{s.order}-{s.on_stale}" for s in settings}
    missing = {setting: consume(log, setting) for setting in settings if known.find(names[setting]) is None}
    read = _reader(run)
    start = student_of(run.config, student_skeleton(run.log))
    if missing:
        await train_to(run.log, start, first, read_step=partial(read_step, run.log, run.config))
    trained: dict[tuple[tuple[int, ...], ...], Figures] = {}
    num_clocks = (log.num_clocks - first) * len({consumption.steps[first:] for consumption in missing.values()})
    with bar(console, f"from version {first}", num_clocks, "steps") as advance:
        for setting, consumption in missing.items():
            if (steps := consumption.steps[first:]) not in trained:
                student = student_of(run.config, student_skeleton(run.log))
                student.restore(start.checkpoint())
                by_clock = dict(enumerate(steps, first))
                trained[steps] = await asyncio.to_thread(_train, student, by_clock, read, partial(advance, 1))
            cell = measure(setting, consumption, trained[steps], log, measured_from=measured_from)
            known.put(names[setting], asdict(cell))
    return [Cell(**found) for name in names.values() if (found := known.find(name))]


def _reader(run: OpenRun) -> Callable[[int], ScoredTrajectory]:
    """Index -> scored trajectory; the shards between the earliest and the latest index in use stay decoded."""
    view, size = scores_view(run.log, run.config), run.config.plan.shard_size

    @lru_cache(maxsize=256)
    def shard(number: int) -> dict[int, ScoredTrajectory]:
        scored = view.read_shard(IndexRange(number * size, (number + 1) * size))
        return {row.trajectory.index: row for row in scored}

    return lambda index: shard(index // size)[index]


def _train(
    student: Student,
    steps: Mapping[int, Sequence[int]],
    read: Callable[[int], ScoredTrajectory],
    on_clock: Callable[[], None],
) -> Figures:
    """One optimizer step per clock that has indices to train. Ends early at a step whose loss is not finite."""
    figures = {}
    for clock, indices in steps.items():
        if indices:
            batch = [read(index) for index in indices]
            try:
                result = student.train(clock, batch)
            except NonFiniteError:
                break
            figures[clock] = result, staleness_tokens(batch, learner_version=clock)
        on_clock()
    return figures


def measure(setting: Setting, consumption: Consumption, figures: Figures, log: Log, *, measured_from: int) -> Cell:
    """Token means over the measured clocks; waste as a share of the tokens whose turn came."""
    clocks = range(measured_from, log.num_clocks)
    expected = [clock for clock in clocks if consumption.steps[clock]]
    seen = [figures[clock] for clock in expected if clock in figures]
    weights = np.array([result.num_tokens for result, _ in seen], np.float64)
    staleness = sum((Counter(tokens) for _, tokens in seen), Counter[int]())
    tokens = {rollout.index: rollout.num_tokens for rollout in log.rollouts}

    def mean(metric: Metric) -> float:
        values = [result.metrics[metric.key] for result, _ in seen]
        return float(np.average(values, weights=weights)) if seen else math.nan

    return Cell(
        **asdict(setting),
        num_steps=len(seen),
        num_idle=len(clocks) - len(expected),
        is_finite=len(seen) == len(expected),
        staleness_mean=float(np.average([*staleness], weights=[*staleness.values()])) if staleness else math.nan,
        staleness_max=max(staleness, default=0),
        loss_nats=mean(LOSS),
        drift_nats=mean(DRIFT),
        ess_fraction=mean(ESS),
        grad_norm=mean(GRAD_NORM),
        num_tokens=int(weights.sum()),
        num_tokens_wasted=sum(tokens[index] for clock in clocks for index in consumption.stale[clock]),
    )


def _row(cell: Cell) -> dict[str, str]:
    def figure(value: float, digits: int) -> str:
        return number(value if math.isfinite(value) else None, f".{digits}f")

    return {
        "bound": str(cell.max_staleness),
        "order": cell.order,
        "on stale": cell.on_stale,
        "lag": str(cell.lag),
        "staleness mean": figure(cell.staleness_mean, 2),
        "max": number(cell.staleness_max if cell.num_steps else None, "d"),
        "loss nats": figure(cell.loss_nats, 4),
        "drift nats": figure(cell.drift_nats, 5),
        "ESS": figure(cell.ess_fraction, 3),
        "grad norm": figure(cell.grad_norm, 3),
        "steps": f"{cell.num_steps}" + ("" if cell.is_finite else " (not finite)"),
        "idle": str(cell.num_idle),
        "waste": percent(cell.waste),
    }
