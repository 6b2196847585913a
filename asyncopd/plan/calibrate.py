"""Costs and lengths of a logged run: what its spans say, and what is left of its wall time as delay between stages.

Only a synchronous run (τ = 0, one process a role) is read: there nothing overlaps, so wall time minus the work of every
role is what handing shards and versions over took. The shape of the decode curve must be given, because the spans do
not say how many slots were active; its height comes from the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from asyncopd.config import RunConfig
from asyncopd.errors import ConfigError
from asyncopd.metrics import SECONDS
from asyncopd.plan import pipeline
from asyncopd.plan.costs import Costs, DecodeCurve, Fleet
from asyncopd.plan.forecast import Workload
from asyncopd.plan.lengths import Observed
from asyncopd.types import Span, TrainStep

ROLES = ("rollout", "score", "learn")


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
    work = Workload(
        Observed(tuple(lengths), run_id),
        plan.batch_size,
        plan.shard_size,
        plan.num_steps,
        config.rollout.slots,
        config.seed,
    )
    tokens_per_s, step_s = _train_rate(steps)
    refresh_s = _seconds(spans, "rollout", "orchestrate:refresh") / len(steps)
    known = Costs(
        decode=shape,
        score_tokens_per_s=sum(lengths) / _seconds(spans, "score", "score"),
        score_shard_s=_seconds(spans, "score", "orchestrate:parquet") / plan.num_shards,
        train_tokens_per_s=tokens_per_s,
        train_step_s=step_s + _seconds(spans, "learn", "orchestrate:parquet") / len(steps),
        publish_s=_seconds(spans, "learn", "orchestrate:publish") / len(steps),
        refresh_s=refresh_s,
        shard_s=_seconds(spans, "rollout", "orchestrate:parquet") / plan.num_shards,
    )
    fleet = Fleet(1, 1, 1)
    # In a synchronous run the occupancy does not depend on how fast a step is, so its height follows from one ratio.
    unscaled = pipeline.run(plan, lengths, known, fleet, num_slots=work.num_slots)
    standing_s = len(steps) * refresh_s + plan.num_shards * known.shard_s
    scale = _seconds(spans, "rollout", "sample") / (unscaled.rollout_busy_s - standing_s)
    scaled = replace(known, decode=shape.scaled(scale))
    busy_only = pipeline.run(plan, lengths, scaled, fleet, num_slots=work.num_slots)
    delay_s = max(0.0, wall_s(spans) - busy_only.wall_s) / len(steps)
    return work, replace(scaled, handover_s=delay_s)


def wall_s(spans: Sequence[Span]) -> float:
    """Seconds from the first work of any role to the last, as reports count it."""
    busy = [s for s in spans if s.role in ROLES and not s.activity.startswith(("wait:", "orchestrate:"))]
    if not busy:
        raise ConfigError("the run has no timeline, so nothing can be read from it; was it stopped before it worked?")
    return max(s.end for s in busy) - min(s.start for s in busy)


def _seconds(spans: Sequence[Span], role: str, activity: str) -> float:
    return sum(span.end - span.start for span in spans if (span.role, span.activity) == (role, activity))


def _train_rate(steps: Sequence[TrainStep]) -> tuple[float, float]:
    """(tokens/s, seconds of a step without tokens) by least squares; proportional where the fit makes no sense."""
    tokens = np.array([step.num_tokens for step in steps], float)
    seconds = np.array([step.metrics[SECONDS.key] for step in steps])
    if tokens.std() > 0:
        slope, intercept = np.polyfit(tokens, seconds, 1)
        if slope > 0 and intercept >= 0:
            return float(1 / slope), float(intercept)
    return float(tokens.sum() / seconds.sum()), 0.0
