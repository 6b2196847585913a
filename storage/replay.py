"""Work on another run's log: the log of a replay, and what a run can be asked to do (one function for each verb).

    source run    trajectories/  scores/  candidates/ --read--> learner --publish--> policies/ steps/ ...   replay
                  (never written)                                                    (run.json: parent)

The source is the parent, or, where that is a replay itself, the run that it reads. Nothing is copied. Which folders of
scores are read, and how they are mixed, stands in the replay's run.json.

    ReplayRequest --replays_asked--> Replay --resolved_replay--> Replay with its scores named, and the child's RunConfig
    BackfillRequest --backfill_asked--> Backfill

No model is loaded: what these refuse, `check` refuses at the command line and in the service, before work is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

from asyncopd.config import RunConfig
from asyncopd.config.requests import (
    Backfill,
    BackfillRequest,
    Replay,
    ReplayRequest,
    Request,
    backfill_of,
    first_step,
    replay_config,
    replays_of,
)
from asyncopd.errors import ConfigError, StorageError
from asyncopd.records import Manifest
from asyncopd.schedule import Arrival, Plan, arrivals_of_step, num_taken
from asyncopd.tasks.build import build_task
from asyncopd.types import IndexRange, ScoredTrajectory, TeacherScores, Trajectory
from storage.mixture import ScoresView
from storage.run_log import StoredRunLog


class ReplayLog(StoredRunLog):
    """`asyncopd.ports.RunLog` of a replay. Its shards are read through the source's log and cannot be written."""

    @cached_property
    def replay(self) -> Replay:
        """What is replayed, as run.json says."""
        return Replay.model_validate(self.record["parent"])

    def read_trajectories(self, shard: IndexRange) -> list[Trajectory]:
        """The source's trajectories, with the candidates that the replay trains on."""
        return self.view.read_trajectories(shard)

    def arrivals(self) -> list[Arrival]:
        """The source's: a replay trains what its source trained, in that order."""
        return self.source.arrivals()

    def record_arrival(self, arrival: Arrival) -> NoReturn:
        raise StorageError(
            f"run {self.run_id} is a replay and trains what {self.source.run_id} took as it arrived; that run has come "
            f"to {arrival.number} shards only. Train {self.source.run_id} further, or replay fewer steps."
        )

    def find_scores(self, teacher: str, shard: IndexRange) -> Manifest | None:
        return self.view.find(shard) if teacher == self.view.name else super().find_scores(teacher, shard)

    def read_scores(self, teacher: str, shard: IndexRange) -> list[TeacherScores]:
        """Of one of the source's folders, or, under the view's name, what the replay trains on."""
        return self.view.read_scores(shard) if teacher == self.view.name else super().read_scores(teacher, shard)

    @cached_property
    def view(self) -> ScoresView:
        """What the replay trains on."""
        loss = RunConfig.model_validate(self.record["config"]).loss
        return ScoresView(self.source, self.replay.scores, loss.requirements())

    def publish_trajectories(self, shard: IndexRange, *args: Any, **kwargs: Any) -> NoReturn:
        raise StorageError(
            f"run {self.run_id} is a replay and reads the shards of {self.source.run_id}; shard {shard.name} cannot be "
            f"written to it. Write to {self.source.run_id}."
        )

    def publish_scores(self, teacher: str, shard: IndexRange, *args: Any, **kwargs: Any) -> NoReturn:
        self.publish_trajectories(shard)


# -- what can be asked of a run -----------------------------------------------------------------------------------
def check(log: StoredRunLog, asked: Request) -> list[Replay]:
    """Refuse what can be refused without a model.

    Returns:
        The replays that the work will train, by which their runs are named; none where only the tokenizer could tell,
        nor of other requests.
    Raises:
        ConfigError: the run and the request do not go together.
    """
    config = RunConfig.model_validate(log.config())
    is_bytes = config.task.kind != "text" or config.task.tokenizer == "bytes"
    # A Hugging Face tokenizer takes transformers to load.
    vocab_size = build_task(config.task, seed=config.seed).tokenizer.vocab_size if is_bytes else None
    match asked:
        case ReplayRequest():
            replays = replays_asked(log, config, asked)
            if vocab_size is not None:
                return [resolved_replay(log, config, replay, vocab_size=vocab_size)[0] for replay in replays]
        case BackfillRequest():
            backfill_asked(log, config, asked, vocab_size=vocab_size)
        case _:
            check_counterfactual(log)
    return []


def replays_asked(log: StoredRunLog, config: RunConfig, asked: ReplayRequest) -> list[Replay]:
    """The replay that is asked for, or one for each arm; scores as they were named.

    Raises:
        ConfigError: nothing to replay, or settings or scores that cannot work.
    """
    num_steps = num_trained(log)
    if not num_steps:
        raise ConfigError(f"run {log.run_id} has not trained a step yet; there is nothing to replay.")
    replays = replays_of(asked, log.run_id, num_steps=num_steps)
    for replay in replays:
        replay_config(config, replay)
        _check_named(log, replay.scores)
    return replays


def resolved_replay(
    log: StoredRunLog, config: RunConfig, asked: Replay, *, vocab_size: int
) -> tuple[Replay, RunConfig]:
    """The replay with its scores named, which decides its child's id, and the child's configuration.

    The scores are those asked for, else the run's own, else, where those lack something, a back-fill by its teacher.

    Raises:
        ConfigError: settings or a log that it cannot work with; names missing columns and the back-fill command.
    """
    child = replay_config(config, asked)
    shards = shards_of_plan(log, child.plan, first_step(config, child, asked))
    source, required = log.source, child.loss.requirements()
    _check_named(source, asked.scores)
    own = scores_view(log, config).weights
    # Not of a mixture, whose back-fills would be several.
    teachers = {f"{name.partition('@')[0]}@" for name in own} if len(own) == 1 else set()
    wider = [{name: 1.0} for name in source.teachers() for teacher in teachers if name.startswith(teacher)]
    refusals = []
    for scores in [asked.scores] if asked.scores else [own, *wider]:
        try:
            ScoresView(source, scores, required).check(shards, vocab_size=vocab_size)
        except ConfigError as refusal:
            refusals.append(refusal)
        else:
            return asked.model_copy(update={"scores": scores}), child
    raise refusals[0]


def backfill_asked(log: StoredRunLog, config: RunConfig, asked: BackfillRequest, *, vocab_size: int | None) -> Backfill:
    """What to ask about the rollouts of a run; of a replay, those it reads.

    Raises:
        ConfigError: settings that cannot work, nothing to do, or no trajectories.
    """
    source = log.source
    config = config if source is log else RunConfig.model_validate(source.config())
    backfill = backfill_of(config, asked, vocab_size=vocab_size)
    if not source.trajectory_shards():
        raise ConfigError(f"run {source.run_id} has no trajectories yet; train it before back-filling.")
    return backfill


def check_counterfactual(log: StoredRunLog) -> None:
    """Raise ConfigError for a run that cannot be re-ordered."""
    if isinstance(log, ReplayLog):
        raise ConfigError(
            f"run {log.run_id} is a replay: nothing arrived while it trained. Ask about {log.source.run_id}."
        )
    if not num_trained(log):
        raise ConfigError(f"run {log.run_id} has not trained a step yet; there is nothing to re-order.")


def num_trained(log: StoredRunLog) -> int:
    """Steps of the surviving lineage, by its newest version."""
    latest = log.latest_policy()
    return latest.number if latest is not None else 0


# -- what the work reads ------------------------------------------------------------------------------------------
def scores_view(log: StoredRunLog, config: RunConfig) -> ScoresView:
    """What the run itself trained on."""
    if isinstance(log, ReplayLog):
        return log.view
    return ScoresView(log, {config.teacher.name: 1.0}, config.loss.requirements())


def read_step(log: StoredRunLog, config: RunConfig, step: int) -> list[ScoredTrajectory]:
    """The batch that a run trained in a step, in the order in which it took it."""
    view, plan = scores_view(log, config), config.plan
    if plan.order == "index":
        return [scored for shard in plan.shards_of_step(step) for scored in view.read_shard(shard)]
    batch = []
    for arrival in arrivals_of_step(log.arrivals(), step, plan.batch_size):
        if taken := arrival.taken_by(step, plan.batch_size):
            rows = {scored.trajectory.index: scored for scored in view.read_shard(arrival.shard)}
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


def _check_named(log: StoredRunLog, wanted: Mapping[str, float]) -> None:
    known = log.teachers()
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"run {log.run_id} has no scores {', '.join(unknown)}; it has {', '.join(known) or 'none'}. "
            f"Make them with `asyncopd backfill {log.run_id}`."
        )
