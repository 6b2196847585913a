"""Forecasts for fleets and staleness bounds: throughput, overlap, staleness, and the best split of the same GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncopd.errors import ConfigError
from asyncopd.plan import pipeline
from asyncopd.plan.costs import Costs, Fleet, splits
from asyncopd.plan.lengths import Lengths
from asyncopd.schedule import Plan


@dataclass(frozen=True)
class Workload:
    """What is to be trained."""

    lengths: Lengths
    batch_size: int
    shard_size: int
    num_steps: int
    num_slots: int
    """Responses that one engine generates at once."""
    seed: int = 0


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
    unknown = [
        name
        for name in ("train_step_s", "publish_s", "fetch_s", "refresh_s", "shard_s", "handover_s", "score_shard_s")
        if getattr(costs, name) == 0
    ]
    said = [
        f"Response lengths: {work.lengths.describe()}; they do not change while the student learns.",
        "A decode step takes "
        + ", ".join(
            f"{1000 * s:.2f} ms with {a} active" for a, s in zip(costs.decode.active, costs.decode.step_s, strict=True)
        )
        + "; straight lines between, whatever the context length. Prompts cost nothing.",
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
