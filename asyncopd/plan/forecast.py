"""Forecasts for fleets and staleness bounds, the best split of the same GPUs, and the costs of a run to forecast from.

Costs are read from a synchronous run only (τ = 0, one process a role): there nothing overlaps, so wall time minus the
work of every role is what handing shards and versions over took. The shape of the decode curve must be given, because
the spans do not say how many slots were active; its height comes from the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from asyncopd.config import RunConfig
from asyncopd.errors import ConfigError
from asyncopd.metrics import SECONDS
from asyncopd.plan import pipeline
from asyncopd.plan.workload import Costs, DecodeCurve, Fleet, Observed, Workload, splits
from asyncopd.schedule import Plan
from asyncopd.types import Span, TrainStep


@dataclass(frozen=True)
class Forecast:
    """What one fleet does under one staleness bound."""

    fleet: Fleet
    max_staleness: int
    wall_s: float
    tokens_per_s: float
    """Trained tokens over wall time, ramp-up and drain included."""
    overlap: float
    """Σ busy time of engines, teachers and the learner / wall time."""
    rollout_busy: float
    """Of one engine on average, share of wall time."""
    teacher_busy: float
    learner_busy: float
    mean_staleness: float
    """Versions, over trained tokens."""
    staleness_tokens: dict[int, int]


def forecast(work: Workload, costs: Costs, fleet: Fleet, max_staleness: int) -> Forecast:
    """Simulate one fleet under one bound.

    Raises ConfigError when time-shared GPUs are asked to be asynchronous, or the shard size does not divide the batch.
    """
    if fleet.time_shared and max_staleness:
        raise ConfigError(f"time-shared GPUs are synchronous: max_staleness {max_staleness} is not possible, 0 is.")
    plan = Plan(work.num_steps, work.batch_size, work.shard_size, max_staleness)
    lengths = [int(length) for length in work.lengths.draw(plan.num_indices, work.seed)]
    out = pipeline.run(plan, lengths, costs, fleet, num_slots=work.num_slots)
    busy_s = out.rollout_busy_s + out.teacher_busy_s + out.learner_busy_s
    return Forecast(
        fleet=fleet,
        max_staleness=max_staleness,
        wall_s=out.wall_s,
        tokens_per_s=out.num_tokens / out.wall_s,
        overlap=busy_s / out.wall_s,
        rollout_busy=out.rollout_busy_s / out.wall_s / fleet.rollout,
        teacher_busy=out.teacher_busy_s / out.wall_s / fleet.teacher,
        learner_busy=out.learner_busy_s / out.wall_s,
        mean_staleness=float(np.average(list(out.staleness_tokens), weights=list(out.staleness_tokens.values()))),
        staleness_tokens=out.staleness_tokens,
    )


def best_split(work: Workload, costs: Costs, num_gpus: int, max_staleness: int) -> Forecast:
    """The fastest of all splits of `num_gpus`; of equally fast ones the first, with fewest teachers."""
    found = (forecast(work, costs, fleet, max_staleness) for fleet in splits(num_gpus))
    return max(found, key=lambda made: made.tokens_per_s)


def assumptions(work: Workload, costs: Costs) -> Sequence[str]:
    """What the forecast takes for granted, in sentences."""
    names = ("train_step_s", "publish_s", "fetch_s", "refresh_s", "shard_s", "handover_s", "score_shard_s")
    unknown = [name for name in names if getattr(costs, name) == 0]
    points = zip(costs.decode.active, costs.decode.step_s, strict=True)
    steps = ", ".join(f"{1000 * seconds:.2f} ms with {active} active" for active, seconds in points)
    said = [
        f"Response lengths: {work.lengths.describe()}; they do not change while the student learns.",
        f"A decode step takes {steps}; straight lines between, whatever the context length. Prompts cost nothing.",
        f"A teacher GPU scores {costs.score_tokens_per_s:,.0f} tokens/s, a learner GPU trains "
        f"{costs.train_tokens_per_s:,.0f} tokens/s; learner GPUs scale without loss.",
        f"{work.num_steps} steps of {work.batch_size} in shards of {work.shard_size}; {work.num_slots} slots an "
        "engine. Wall time runs from the first token to the last version.",
    ]
    if costs.speeds != (1.0,):
        shown = ", ".join(f"{speed:.0%}" for speed in costs.speeds)
        said.append(f"Processes share one machine: with 1, 2, … busy each runs at {shown} of its speed.")
    if unknown:
        said.append(f"Taken as free: {', '.join(unknown)}.")
    return said


def calibrate(
    run_id: str,
    config: RunConfig,
    shape: DecodeCurve,
    *,
    steps: Sequence[TrainStep],
    spans: Sequence[Span],
    lengths: Sequence[int],
) -> tuple[Workload, Costs]:
    """What a finished run trained and what its work cost.

    Args:
        shape: seconds of a decode step by active slots; only the ratios count.
        steps, spans: all of the run.
        lengths: of all its responses, tokens, in index order.
    Raises:
        ConfigError: the run is not synchronous, has several workers, or is not finished.
    """
    if config.staleness.max_staleness or config.rollout.workers != 1 or config.score.workers != 1:
        raise ConfigError(
            f"run {run_id} has max_staleness {config.staleness.max_staleness}, {config.rollout.workers} rollout "
            f"and {config.score.workers} score workers; costs are read where nothing overlaps: 0, 1 and 1."
        )
    if len(steps) < max(2, config.learner.num_steps):
        raise ConfigError(f"run {run_id} trained {len(steps)} of {config.learner.num_steps} steps; let it finish.")
    plan = config.plan
    sizes = (plan.batch_size, plan.shard_size, plan.num_steps, config.rollout.slots)
    work = Workload(Observed(tuple(lengths), run_id), *sizes, config.seed)
    tokens_per_s, step_s = _train_rate(steps)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for span in spans:
        seconds[span.role, span.activity] += span.end - span.start
    refresh_s = seconds["rollout", "orchestrate:refresh"] / len(steps)
    known = Costs(
        decode=shape,
        score_tokens_per_s=sum(lengths) / seconds["score", "score"],
        score_shard_s=seconds["score", "orchestrate:parquet"] / plan.num_shards,
        train_tokens_per_s=tokens_per_s,
        train_step_s=step_s + seconds["learn", "orchestrate:parquet"] / len(steps),
        # The writing overlaps the next step; a model as large as the machine's disk is slow still waits for it.
        publish_s=(seconds["learn", "orchestrate:serialise"] + seconds["learn", "orchestrate:publish"]) / len(steps),
        refresh_s=refresh_s,
        shard_s=seconds["rollout", "orchestrate:parquet"] / plan.num_shards,
    )
    fleet = Fleet(1, 1, 1)
    # In a synchronous run the occupancy does not depend on how fast a step is, so its height follows from one ratio.
    unscaled = pipeline.run(plan, lengths, known, fleet, num_slots=work.num_slots)
    standing_s = len(steps) * refresh_s + plan.num_shards * known.shard_s
    scale = seconds["rollout", "sample"] / (unscaled.rollout_busy_s - standing_s)
    scaled = replace(known, decode=shape.scaled(scale))
    busy_only = pipeline.run(plan, lengths, scaled, fleet, num_slots=work.num_slots)
    delay_s = max(0.0, wall_s(spans) - busy_only.wall_s) / len(steps)
    return work, replace(scaled, handover_s=delay_s)


def wall_s(spans: Sequence[Span]) -> float:
    """Seconds from the first work of any role to the last, as reports count it."""
    roles, idle = ("rollout", "score", "learn"), ("wait:", "orchestrate:")
    busy = [span for span in spans if span.role in roles and not span.activity.startswith(idle)]
    if not busy:
        raise ConfigError("the run has no timeline, so nothing can be read from it; was it stopped before it worked?")
    return max(s.end for s in busy) - min(s.start for s in busy)


def _train_rate(steps: Sequence[TrainStep]) -> tuple[float, float]:
    """(tokens/s, seconds of a step without tokens) by least squares; proportional where the fit makes no sense."""
    tokens = np.array([step.num_tokens for step in steps], float)
    seconds = np.array([step.metrics[SECONDS.key] for step in steps])
    if tokens.std() > 0:
        slope, intercept = np.polyfit(tokens, seconds, 1)
        if slope > 0 and intercept >= 0:
            return float(1 / slope), float(intercept)
    return float(tokens.sum() / seconds.sum()), 0.0
