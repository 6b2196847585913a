"""What offline work reads of a run: which shards and trajectories its steps consumed, and whether they serve a loss.

    order index      step s --> its own shards
    order arrival    step s --arrivals--> positions [s·B, (s+1)·B) --> rows of the shards that arrived there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asyncopd.arrivals import arrivals_of_step, num_taken
from asyncopd.config.cache import CacheRequirements, check_cache
from asyncopd.errors import ConfigError
from asyncopd.schedule import Plan
from asyncopd.types import IndexRange, ScoredTrajectory
from flows.wiring import OpenRun
from storage.replay_log import ReplayLog, ScoresView
from storage.run_log import StoredRunLog

SHARDS_CHECKED = 8
"""Shards of which one row is compared with what the loss needs before training; the learner compares every batch."""


def source_of(run: OpenRun) -> StoredRunLog:
    """The log with the shards of a run: its own, or that of the run it replays."""
    return run.log.source if isinstance(run.log, ReplayLog) else run.log


def scores_view(run: OpenRun) -> ScoresView:
    """What the run itself trained on."""
    if isinstance(run.log, ReplayLog):
        return run.log.view
    return ScoresView(run.log, {run.config.teacher.name: 1.0}, needs_top_k=False)


def read_shard(view: ScoresView, shard: IndexRange) -> list[ScoredTrajectory]:
    pairs = zip(view.read_trajectories(shard), view.read_scores(shard), strict=True)
    return [ScoredTrajectory(trajectory, scores) for trajectory, scores in pairs]


def read_step(run: OpenRun, step: int) -> list[ScoredTrajectory]:
    """The batch that a run trained in a step, in the order in which it took it."""
    view, plan = scores_view(run), run.config.plan
    if plan.order == "index":
        return [scored for shard in plan.shards_of_step(step) for scored in read_shard(view, shard)]
    batch = []
    for arrival in arrivals_of_step(run.log.arrivals(), step, plan.batch_size):
        if taken := arrival.taken_by(step, plan.batch_size):
            rows = {scored.trajectory.index: scored for scored in read_shard(view, arrival.shard)}
            batch += [rows[index] for index in taken]
    return batch


def shards_of_plan(run: OpenRun, plan: Plan, first_step: int) -> list[IndexRange]:
    """The shards that the steps of `plan`, from `first_step` on, read of the run's log.

    Args:
        plan: the run's own, or one with another number or size of steps.
    Raises:
        ConfigError: the run has not come to that many trajectories, in order arrival.
    """
    if plan.order == "index":
        return list(plan.shards(first_step))
    arrivals = run.log.arrivals()
    if num_taken(arrivals) < plan.num_indices:
        raise ConfigError(
            f"run {run.log.run_id} took {num_taken(arrivals)} trajectories as they arrived; {plan.num_steps} steps of "
            f"{plan.batch_size} need {plan.num_indices}. Train the run further (`asyncopd train --run-id "
            f"{run.log.run_id}`), or replay fewer steps (--steps)."
        )
    # Once each: a shard whose rows go to two steps is in both.
    found = {
        arrival.shard: None
        for step in range(first_step, plan.num_steps)
        for arrival in arrivals_of_step(arrivals, step, plan.batch_size)
        if arrival.taken_by(step, plan.batch_size)
    }
    return list(found)


def choose_scores(
    run: OpenRun, wanted: Mapping[str, float], required: CacheRequirements, shards: Sequence[IndexRange]
) -> dict[str, float]:
    """The folders of scores to train on: those asked for, else the run's own, else a back-fill by its own teacher.

    Raises:
        ConfigError: a folder that is not there or lacks shards, or none that holds what the loss needs; names the
            missing columns and the back-fill command.
    """
    source = source_of(run)
    known = source.teachers()
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(
            f"run {source.run_id} has no scores {', '.join(unknown)}; it has {', '.join(known) or 'none'}. "
            f"Make them with `asyncopd backfill {source.run_id}`."
        )
    own = dict(wanted) or dict(scores_view(run).weights)
    vocab_size = run.task.tokenizer.vocab_size
    try:
        check_log(source, own, required, shards, vocab_size=vocab_size)
    except ConfigError:
        (teacher, *others) = own
        variants = [name for name in known if name.startswith(f"{teacher.partition('@')[0]}@") and name != teacher]
        for name in variants if not wanted and not others else []:
            if _serves(source, {name: 1.0}, required, shards, vocab_size=vocab_size):
                return {name: 1.0}
        raise
    return own


def check_log(
    source: StoredRunLog,
    weights: Mapping[str, float],
    required: CacheRequirements,
    shards: Sequence[IndexRange],
    *,
    vocab_size: int,
) -> None:
    """Refuse a log that lacks shards or columns, before anything is trained."""
    needs_top_k = required.top_k > 0 or required.full_vocabulary
    view = ScoresView(source, weights, needs_top_k=needs_top_k)
    missing = [shard.name for shard in shards if view.find(shard) is None]
    if missing:
        raise ConfigError(
            f"run {source.run_id}: {len(missing)} of {len(shards)} shards have no scores {view.name}, the first is "
            f"{missing[0]}. Train the run further (`asyncopd train --run-id {source.run_id}`), back-fill the rest "
            f"(`asyncopd backfill {source.run_id}`), or replay fewer steps (--steps)."
        )
    every = max(1, len(shards) // SHARDS_CHECKED)
    for shard in {*shards[::every], shards[-1]}:
        for scored in read_shard(view, shard)[:1]:
            check_cache(required, CacheRequirements.held_by(scored, vocab_size=vocab_size), run_id=source.run_id)


def _serves(
    source: StoredRunLog,
    weights: Mapping[str, float],
    required: CacheRequirements,
    shards: Sequence[IndexRange],
    *,
    vocab_size: int,
) -> bool:
    try:
        check_log(source, weights, required, shards, vocab_size=vocab_size)
    except ConfigError:
        return False
    return True
