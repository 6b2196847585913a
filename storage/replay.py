"""The log of a replay: trajectories and scores are another run's, everything else is its own.

    source run    trajectories/  scores/  candidates/ --read--> learner --publish--> policies/ steps/ ...   replay
                  (never written)                                                    (run.json: parent)

The source is the parent, or, where that is a replay itself, the run that it reads. Nothing is copied. Which folders of
scores are read, and how they are mixed, stands in the replay's run.json.

What can be checked of a replay, back-fill or re-ordering without loading a model. A mistake should not wait for one.

options of the command line, or of a request --> these --> Replay, Backfill     or ConfigError, at once

What offline work reads of a run: the shards and trajectories of its steps, and scores that serve a loss. No torch.

    order index      step s --> its own shards
    order arrival    step s --arrivals--> positions [s·B, (s+1)·B) --> rows of the shards that arrived there

Replay as asked for --folders named, else the run's own, else a back-fill by its own teacher--> Replay as it is stored
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn

from asyncopd.config import RunConfig
from asyncopd.config.recorded import CacheRequirements, check_cache
from asyncopd.config.requests import (
    Backfill,
    Replay,
    Start,
    candidates_of,
    first_step,
    folder_of,
    parse_settings,
    parse_steps,
    replay_config,
    split_arm,
    teacher_of,
    with_settings,
)
from asyncopd.errors import ConfigError, StorageError
from asyncopd.schedule import Arrival, Plan, arrivals_of_step, num_taken
from asyncopd.tasks.build import build_task
from asyncopd.teacher.mixture import mix
from asyncopd.types import IndexRange, Manifest, ScoredTrajectory, TeacherScores, Trajectory
from storage.candidates import with_candidates
from storage.run_log import StoredRunLog
from storage.stores.base import ObjectStore


class ScoresView:
    """Trajectories with the scores of one or several teachers, read from one run's log.

    All the folders named must have scored the same candidates: the trajectories' own, or one back-filled set.
    """

    def __init__(self, log: StoredRunLog, weights: Mapping[str, float], *, needs_top_k: bool) -> None:
        """
        Args:
            weights: folder of scores -> weight; they add up to 1.
            needs_top_k: the loss reads the teacher's top-k, which not every mixture has (asyncopd/teacher/mixture.py).
        """
        self.log, self.weights, self._needs_top_k = log, dict(weights), needs_top_k
        self.name = next(iter(weights)) if len(weights) == 1 else " + ".join(f"{w:g} {n}" for n, w in weights.items())

    def find(self, shard: IndexRange) -> Manifest | None:
        """A manifest of the shard's scores once every teacher has scored it."""
        found = [self.log.find_scores(name, shard) for name in self.weights]
        return None if None in found else found[0]

    def read_trajectories(self, shard: IndexRange) -> list[Trajectory]:
        """The shard's trajectories with the candidates that were scored."""
        trajectories = self.log.read_trajectories(shard)
        candidates = self._candidates(shard)
        return with_candidates(self.log, candidates, shard, trajectories) if candidates else trajectories

    def read_scores(self, shard: IndexRange) -> list[TeacherScores]:
        """The shard's scores, mixed where there are several teachers."""
        parts = [(weight, self.log.read_scores(name, shard)) for name, weight in self.weights.items()]
        if len(parts) == 1:
            return parts[0][1]
        return [
            mix([(weight, scores[row]) for weight, scores in parts], name=self.name, needs_top_k=self._needs_top_k)
            for row in range(len(parts[0][1]))
        ]

    def _candidates(self, shard: IndexRange) -> str | None:
        """Name of the back-filled candidates that the scores speak of; None for the trajectories' own."""
        names = {}
        for folder in self.weights:
            manifest = self.log.find_scores(folder, shard)
            if manifest is None:
                raise self.log.store.missing(self.log.layout.shard_manifest(self.log.layout.scores(folder), shard))
            names[folder] = manifest.facts.get("candidates")
        if len(set(names.values())) > 1:
            raise ConfigError(
                f"run {self.log.run_id}: the teachers of a mixture have scored different candidates: "
                f"{ {folder: name or 'recorded' for folder, name in names.items()} }. Back-fill all of them with the "
                "same --candidates."
            )
        return next(iter(names.values()))


class ReplayLog(StoredRunLog):
    """`asyncopd.ports.RunLog` of a replay. Its shards are read through the source's log and cannot be written."""

    def __init__(self, store: ObjectStore, run_id: str, source: StoredRunLog, **options: Any) -> None:
        """Use `open_run` rather than this constructor."""
        super().__init__(store, run_id, **options)
        self.source = source

    @cached_property
    def replay(self) -> Replay:
        """What is replayed, as run.json says."""
        return Replay.from_record(self.record["parent"])

    def find_trajectories(self, shard: IndexRange) -> Manifest | None:
        return self.source.find_trajectories(shard)

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

    def trajectory_shards(self) -> list[IndexRange]:
        return self.source.trajectory_shards()

    def find_scores(self, teacher: str, shard: IndexRange) -> Manifest | None:
        return self.view.find(shard) if teacher == self.view.name else self.source.find_scores(teacher, shard)

    def read_scores(self, teacher: str, shard: IndexRange) -> list[TeacherScores]:
        """Of one of the source's folders, or, under the view's name, what the replay trains on."""
        return self.view.read_scores(shard) if teacher == self.view.name else self.source.read_scores(teacher, shard)

    def score_shards(self, teacher: str) -> list[IndexRange]:
        return self.source.score_shards(teacher)

    def teachers(self) -> list[str]:
        return self.source.teachers()

    @cached_property
    def view(self) -> ScoresView:
        """What the replay trains on."""
        required = RunConfig.model_validate(self.record["config"]).loss.requirements()
        needs_top_k = required.top_k > 0 or required.full_vocabulary
        return ScoresView(self.source, self.replay.scores, needs_top_k=needs_top_k)

    def publish_trajectories(
        self, shard: IndexRange, trajectories: Sequence[Trajectory], *, worker: str, facts: Mapping[str, Any]
    ) -> NoReturn:
        raise self._read_only(shard)

    def publish_scores(
        self, teacher: str, shard: IndexRange, scores: Sequence[TeacherScores], *, worker: str, facts: Mapping[str, Any]
    ) -> NoReturn:
        raise self._read_only(shard)

    def _read_only(self, shard: IndexRange) -> StorageError:
        return StorageError(
            f"run {self.run_id} is a replay and reads the shards of {self.source.run_id}; shard {shard.name} cannot be "
            f"written to it. Write to {self.source.run_id}."
        )


def check_scores(run_id: str, wanted: Iterable[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a folder of scores that the run with the shards does not have."""
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(
            f"run {run_id} has no scores {', '.join(unknown)}; it has {', '.join(known) or 'none'}. "
            f"Make them with `asyncopd backfill {run_id}`."
        )


def replay_of(
    run_id: str,
    config: RunConfig,
    *,
    num_steps: int,
    steps: str = ":",
    start: Start = "checkpoint",
    overrides: Sequence[str] = (),
    compare: Sequence[str] = (),
) -> tuple[Replay, list[Replay]]:
    """The replay that is asked for, and the arms of its comparison.

    Args:
        config: of the run `run_id`, which has trained `num_steps` steps.
        overrides: KEY=VALUE texts, and `compare`, texts of several, as the command line takes them.
    Raises:
        ConfigError: nothing to replay, one arm only, or settings that cannot work.
    """
    if not num_steps:
        raise ConfigError(f"run {run_id} has not trained a step yet; there is nothing to replay.")
    if len(compare) == 1:
        raise ConfigError(
            f"--compare {compare[0]!r}: a comparison needs at least two arms; give --compare once for each."
        )
    first, last = parse_steps(steps, num_steps=num_steps)
    replay = Replay(run_id, first, last, start, *parse_settings(list(overrides)))
    arms = [with_settings(replay, *parse_settings(split_arm(text))) for text in compare]
    for asked in (replay, *arms):
        replay_config(config, asked)
    return replay, arms


def check_backfill(config: RunConfig, backfill: Backfill) -> None:
    """Raise ConfigError for what the work would refuse; the vocabulary's size is known only there."""
    cached = config.cached()
    is_all = backfill.top_k == "all"
    folder_of(
        config,
        teacher_of(config, backfill),
        top_k=cached.top_k + 1 if is_all else max(cached.top_k, int(backfill.top_k)),
        num_teacher_draws=max(cached.num_teacher_draws, backfill.num_teacher_draws),
        candidates=candidates_of(config, backfill),
    )


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


def steps_from(steps: str, from_version: int | None) -> str:
    """FIRST:LAST, where `--from-version` says FIRST."""
    return steps if from_version is None else f"{from_version}:{steps.partition(':')[2]}"


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
