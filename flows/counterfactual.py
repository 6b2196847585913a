"""Counterfactual staleness: one log, consumed late, in other orders and under other bounds. Without Prefect.

    log --log_of--> consume (pure) --indices per clock--> Student from version f --> a Cell per setting, tables in --out

Every setting starts from the parent's state at one version f, the largest lag, and is measured over the same clocks,
f + the largest lag to the end: by then each has trained `lag` steps and its batches are ones the parent had not trained
when it published f.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial

from rich.console import Console

from asyncopd.config.requests import CounterfactualRequest
from asyncopd.errors import ConfigError
from asyncopd.learner.counterfactual import (
    Cell,
    Log,
    Rollout,
    Setting,
    StepFigures,
    arrived_steps,
    check_defined,
    consume,
    measure,
    settings_of,
    train_in_order,
    whole_batches,
)
from asyncopd.learner.restore import train_to
from asyncopd.local.console import bar, console_table
from asyncopd.metrics import SECONDS
from asyncopd.report.text import number, percent, table
from asyncopd.schedule import Arrival
from asyncopd.study.cells import CellStore, parquet
from asyncopd.types import IndexRange, ScoredTrajectory
from flows.compare import folder_of
from flows.engines import student_skeleton
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
    appeared = arrived_steps(scored_at, [step.finished - step.metrics[SECONDS.key] for step in steps])
    rollouts = [
        Rollout(
            index=trajectory.index,
            step=step_of[trajectory.index],
            # Clocks tick in milliseconds, but a rollout is never there before the version that ended it, nor later
            # than the step that decided about it.
            arrived_step=min(step_of[trajectory.index], max(appeared[number], trajectory.version_last)),
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
    return Log(
        run_id=run.log.run_id,
        order=plan.order,
        batch_size=plan.batch_size,
        num_clocks=len(steps),
        rollouts=rollouts,
        num_batches=whole_batches(indices, plan.batch_size),
        num_filtered=len(indices) - len(rollouts),
    )


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

    `asyncopd.learner.counterfactual.check_defined` tells which settings mean something on this log.

    Args:
        known: finished cells; each new one is put there, so that a stopped call loses at most one.
    """
    names = {s: f"staleness{s.max_staleness}-lag{s.lag}-{s.order}-{s.on_stale}" for s in settings}
    missing = {setting: consume(log, setting) for setting in settings if known.find(names[setting]) is None}
    read = _reader(run)
    start = student_of(run.config, student_skeleton(run.log))
    if missing:
        await train_to(run.log, start, first, read_step=partial(read_step, run.log, run.config))
    figures: dict[tuple[tuple[int, ...], ...], list[StepFigures]] = {}
    num_clocks = (log.num_clocks - first) * len({consumption.steps[first:] for consumption in missing.values()})
    with bar(console, f"from version {first}", num_clocks, "steps") as advance:
        for setting, consumption in missing.items():
            trained = consumption.steps[first:]
            if trained not in figures:
                student = student_of(run.config, student_skeleton(run.log))
                student.restore(start.checkpoint())
                by_clock, on_step = dict(enumerate(trained, first)), partial(advance, 1)
                figures[trained] = await asyncio.to_thread(
                    train_in_order, student, by_clock, read=read, on_step=on_step
                )
            cell = measure(setting, consumption, figures[trained], log, measured_from=measured_from)
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
