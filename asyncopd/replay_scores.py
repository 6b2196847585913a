"""What offline work reads of a run: the shards and trajectories of its steps, and scores that serve a loss. No torch.

    order index      step s --> its own shards
    order arrival    step s --arrivals--> positions [s·B, (s+1)·B) --> rows of the shards that arrived there

Replay as asked for --folders named, else the run's own, else a back-fill by its own teacher--> Replay as it is stored
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from asyncopd.arrivals import arrivals_of_step, num_taken
from asyncopd.config import RunConfig
from asyncopd.config.cache import CacheRequirements, check_cache
from asyncopd.config.replay import Replay, first_step, replay_config
from asyncopd.errors import ConfigError
from asyncopd.offline_checks import check_scores
from asyncopd.schedule import Plan
from asyncopd.tasks.build import build_task
from asyncopd.types import IndexRange, ScoredTrajectory
from storage.replay_log import ReplayLog, ScoresView
from storage.run_log import StoredRunLog

SHARDS_CHECKED = 8
"""Shards of which one row is compared with what the loss needs before training; the learner compares every batch."""


def vocab_size_of(config: RunConfig) -> int | None:
    """Ids of the task's tokenizer; None for a Hugging Face one, which only transformers could tell."""
    if config.task.kind == "text" and config.task.tokenizer != "bytes":
        return None
    return build_task(config.task, seed=config.seed).tokenizer.vocab_size


def resolved_replay(
    log: StoredRunLog, config: RunConfig, asked: Replay, *, vocab_size: int
) -> tuple[Replay, RunConfig]:
    """The replay with its scores named, which decides its child's id, and the child's configuration.

    Raises:
        ConfigError: settings or a log that it cannot work with.
    """
    child = replay_config(config, asked)
    shards = shards_of_plan(log, child.plan, first_step(config, child, asked))
    required = child.loss.requirements()
    scores = choose_scores(log, config, asked.scores, required, shards, vocab_size=vocab_size)
    return replace(asked, scores=scores), child


def source_of(log: StoredRunLog) -> StoredRunLog:
    """The log with the shards of a run: its own, or that of the run it replays."""
    return log.source if isinstance(log, ReplayLog) else log


def scores_view(log: StoredRunLog, config: RunConfig) -> ScoresView:
    """What the run itself trained on."""
    if isinstance(log, ReplayLog):
        return log.view
    return ScoresView(log, {config.teacher.name: 1.0}, needs_top_k=False)


def read_shard(view: ScoresView, shard: IndexRange) -> list[ScoredTrajectory]:
    """The trajectories of a shard with what a replay trains on."""
    pairs = zip(view.read_trajectories(shard), view.read_scores(shard), strict=True)
    return [ScoredTrajectory(trajectory, scores) for trajectory, scores in pairs]


def read_step(log: StoredRunLog, config: RunConfig, step: int) -> list[ScoredTrajectory]:
    """The batch that a run trained in a step, in the order in which it took it."""
    view, plan = scores_view(log, config), config.plan
    if plan.order == "index":
        return [scored for shard in plan.shards_of_step(step) for scored in read_shard(view, shard)]
    batch = []
    for arrival in arrivals_of_step(log.arrivals(), step, plan.batch_size):
        if taken := arrival.taken_by(step, plan.batch_size):
            rows = {scored.trajectory.index: scored for scored in read_shard(view, arrival.shard)}
            batch += [rows[index] for index in taken]
    return batch


def shards_of_plan(log: StoredRunLog, plan: Plan, first_step: int) -> list[IndexRange]:
    """The shards that the steps of `plan`, from `first_step` on, read of `log`.

    Args:
        plan: the run's own, or one with another number or size of steps.
    Raises:
        ConfigError: the run has not come to that many trajectories, in order arrival.
    """
    if plan.order == "index":
        return list(plan.shards(first_step))
    arrivals = log.arrivals()
    if num_taken(arrivals) < plan.num_indices:
        raise ConfigError(
            f"run {log.run_id} took {num_taken(arrivals)} trajectories as they arrived; {plan.num_steps} steps of "
            f"{plan.batch_size} need {plan.num_indices}. Train the run further (`asyncopd train --run-id "
            f"{log.run_id}`), or replay fewer steps (--steps)."
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
    log: StoredRunLog,
    config: RunConfig,
    wanted: Mapping[str, float],
    required: CacheRequirements,
    shards: Sequence[IndexRange],
    *,
    vocab_size: int,
) -> dict[str, float]:
    """The folders of scores to train on: those asked for, else the run's own, else a back-fill by its own teacher.

    Raises:
        ConfigError: a folder that is not there or lacks shards, or none that holds what the loss needs; names the
            missing columns and the back-fill command.
    """
    source = source_of(log)
    known = source.teachers()
    check_scores(source.run_id, wanted, known)
    own = dict(wanted) or dict(scores_view(log, config).weights)
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
