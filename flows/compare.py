"""Counterfactual staleness without Prefect: one log, consumed late, in other orders and under other bounds.

    log --rollouts_of--> consume (pure) --indices per clock--> Student from version f --> figures per setting

Every setting starts from the parent's state at one version f, the largest lag, and is measured over the same clocks,
f + the largest lag to the end: by then each has trained `lag` steps and its batches are ones the parent had not trained
when it published f.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from rich.console import Console

from asyncopd.errors import ConfigError
from asyncopd.learner.restore import StepFigures, train_in_order, train_to
from asyncopd.local.console import bar
from asyncopd.study.counterfactual import (
    Cell,
    Consumption,
    Log,
    Rollout,
    Setting,
    arrived_steps,
    consume,
    whole_batches,
)
from asyncopd.types import IndexRange, ScoredTrajectory
from flows.engines import student_skeleton
from flows.wiring import OpenRun, student_of
from storage.replay import ScoresView, check_counterfactual, check_log, read_shard, read_step, scores_view

MIN_MEASURED = 8
"""Clocks that must be left to measure; fewer would be mostly noise."""


def log_of(run: OpenRun) -> Log:
    """Every scored rollout that the run's steps decided about, with when its scores appeared on the learner's clock.

    Raises:
        ConfigError: the run trained nothing, lacks scores, or is a replay.
    """
    check_counterfactual(run.log)
    steps = run.log.steps()
    plan, view = run.config.plan, scores_view(run.log, run.config)
    decided = _decided(run, len(steps))
    shards = [of_shard.shard for of_shard in decided]
    required = run.config.loss.requirements()
    check_log(view.log, view.weights, required, shards, vocab_size=run.task.tokenizer.vocab_size)
    scored_at = [_scored_at(view, shard) for shard in shards]
    # From the shard logs alone: a step began when its optimizer step did, which its record tells.
    appeared = arrived_steps(scored_at, [step.finished - step.metrics["train/seconds"] for step in steps])
    rollouts = [
        Rollout(
            index=trajectory.index,
            step=of_shard.steps[trajectory.index],
            # Clocks tick in milliseconds, but a rollout is never there before the version that ended it, nor later
            # than the step that decided about it.
            arrived_step=min(of_shard.steps[trajectory.index], max(appeared[number], trajectory.version_last)),
            # Recorded arrivals are the order itself; learners look at a folder now and then, so times may differ.
            arrival=scored_at[number] if plan.order == "index" else float(number),
            version_oldest=trajectory.version_oldest,
            num_tokens=len(trajectory.response_ids),
            is_trained=trajectory.index not in of_shard.untrained,
        )
        for number, of_shard in enumerate(decided)
        for trajectory in view.log.read_trajectories(of_shard.shard)
        if trajectory.index in of_shard.steps
    ]
    indices = {index for of_shard in decided for index in of_shard.steps}
    return Log(
        run_id=run.log.run_id,
        order=plan.order,
        batch_size=plan.batch_size,
        num_clocks=len(steps),
        rollouts=rollouts,
        num_batches=whole_batches(indices, plan.batch_size),
        num_filtered=len(indices) - len(rollouts),
    )


@dataclass(frozen=True)
class _Decided:
    """What the run's steps decided about one shard."""

    shard: IndexRange
    steps: Mapping[int, int]
    """Index -> the step that decided about it; without those that no trained step came to."""
    untrained: Collection[int]
    """Those dropped or held."""


def _decided(run: OpenRun, num_steps: int) -> list[_Decided]:
    plan = run.config.plan
    if plan.order == "index":
        return [
            _Decided(shard, dict.fromkeys(shard.indices, step), ())
            for step in range(num_steps)
            for shard in plan.shards_of_step(step)
        ]
    found = []
    for arrival in run.log.arrivals():
        steps = {index: step for index, step in arrival.steps(plan.batch_size) if step < num_steps}
        if steps:
            found.append(_Decided(arrival.shard, steps, {*arrival.dropped, *arrival.held}))
    return found


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
    known: Mapping[Setting, Cell],
    keep: Callable[[Cell], None],
    console: Console,
) -> list[Cell]:
    """Train and measure every setting that is not `known` yet; settings that consume alike are trained once.

    `asyncopd.study.counterfactual.check_defined` tells which settings mean something on this log.

    Args:
        keep: called with each new cell, so that a stopped call loses at most one.
    """
    consumptions = {setting: consume(log, setting) for setting in settings}
    read = _reader(run, log)
    state: Mapping[str, bytes] | None = None
    figures: dict[tuple[tuple[int, ...], ...], list[StepFigures]] = {}
    cells = []
    num_clocks = (log.num_clocks - first) * len({consumptions[s].steps[first:] for s in settings if s not in known})
    with bar(console, f"from version {first}", num_clocks, "steps") as advance:
        for setting in settings:
            if setting in known:
                cells.append(known[setting])
                continue
            consumption = consumptions[setting]
            state = state or await _state(run, first)
            trained = consumption.steps[first:]
            if trained not in figures:
                figures[trained] = await _train(run, state, consumption, first, read, partial(advance, 1))
            cells.append(measure(setting, consumption, figures[trained], log, measured_from=measured_from))
            keep(cells[-1])
    return cells


def measure(
    setting: Setting, consumption: Consumption, figures: Sequence[StepFigures], log: Log, *, measured_from: int
) -> Cell:
    """Token means over the measured clocks; waste as a share of the tokens whose turn came."""
    seen = [step for step in figures if step.clock >= measured_from]
    weights = np.array([step.num_tokens for step in seen], np.float64)
    tokens = {rollout.index: rollout.num_tokens for rollout in log.rollouts}

    def mean(key: str) -> float:
        return float(np.average([step.metrics[key] for step in seen], weights=weights)) if seen else float("nan")

    clocks = range(measured_from, log.num_clocks)
    stale = sum(tokens[index] for clock in clocks for index in consumption.stale[clock])
    expected = [clock for clock in clocks if consumption.steps[clock]]
    return Cell(
        setting=setting,
        num_steps=len(seen),
        num_idle=len(clocks) - len(expected),
        is_finite=len(seen) == len(expected),
        staleness_mean=float(np.average([s.staleness_mean for s in seen], weights=weights)) if seen else float("nan"),
        staleness_max=max((s.staleness_max for s in seen), default=0),
        loss_nats=mean("train/loss_nats"),
        drift_nats=mean("train/drift_nats"),
        ess_fraction=mean("train/ess_fraction"),
        grad_norm=mean("train/grad_norm"),
        num_tokens=int(weights.sum()),
        num_tokens_wasted=stale,
    )


async def _state(run: OpenRun, version: int) -> Mapping[str, bytes]:
    student = student_of(run.config, student_skeleton(run.log))
    await train_to(run.log, student, version, read_step=partial(read_step, run.log, run.config))
    return student.checkpoint()


async def _train(
    run: OpenRun,
    state: Mapping[str, bytes],
    consumption: Consumption,
    first: int,
    read: Callable[[int], ScoredTrajectory],
    on_step: Callable[[], None],
) -> list[StepFigures]:
    student = student_of(run.config, student_skeleton(run.log))
    student.restore(state)
    steps = {clock: indices for clock, indices in enumerate(consumption.steps) if clock >= first}
    return await asyncio.to_thread(train_in_order, student, steps, read=read, on_step=on_step)


def _reader(run: OpenRun, log: Log) -> Callable[[int], ScoredTrajectory]:
    """Index -> scored trajectory; the shards between the earliest and the latest index in use stay decoded."""
    view, size = scores_view(run.log, run.config), run.config.plan.shard_size

    @lru_cache(maxsize=256)
    def shard(number: int) -> dict[int, ScoredTrajectory]:
        scored = read_shard(view, IndexRange(number * size, (number + 1) * size))
        return {row.trajectory.index: row for row in scored}

    return lambda index: shard(index // size)[index]


def _scored_at(view: ScoresView, shard: IndexRange) -> float:
    manifest = view.find(shard)
    assert manifest is not None  # check_log looked
    return manifest.created
