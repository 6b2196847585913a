"""What a request comes to, once the run is known: which steps from which state, which teacher is asked for what.

    ReplayRequest + steps trained --replays_of--> Replay --replay_config--> the child's RunConfig
    BackfillRequest + RunConfig --backfill_of--> Backfill, with the folder that its scores go to

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from asyncopd.config.base import Frozen
from asyncopd.config.engines import TeacherConfig
from asyncopd.config.load import load_config
from asyncopd.config.requests import BackfillRequest, ReplayRequest, Start, arm_name
from asyncopd.config.schema import RunConfig
from asyncopd.errors import ConfigError
from asyncopd.types import DrawLaw

_REPLAYABLE = ("loss", "learner", "evaluate", "limits")
_VARIANTS = {"loss": "name", "teacher": "engine", "student": "kind", "task": "kind"}


# -- replay -------------------------------------------------------------------------------------------------------
class Replay(Frozen):
    """A run trained again from another run's log: `parent` of the child's run.json, from which it can be made again."""

    run_id: str
    """Of the parent, whose trajectories and scores are read."""
    first_version: int
    """The parent's version that the replay starts from: its first index (in order arrival: its first position, see
    asyncopd/schedule.py) is first_version · (parent's batch size)."""
    last_version: int
    """The parent's steps [first_version, last_version) are trained."""
    start: Start = "checkpoint"
    """`checkpoint`: the parent's exact state, optimizer included. `weights`: its published weights, a new optimizer."""
    settings: dict[str, Any] = Field({})
    """Dotted keys whose values differ from the parent's configuration."""
    scores: dict[str, float] = Field({})
    """Folder of scores -> weight of that teacher in the mixture; weights add up to 1."""

    @property
    def child_id(self) -> str:
        """The same replay has the same id, so that asking for it again goes on with it."""
        return f"{self.run_id[:80]}-replay-{self.digest()[:8]}"


def replays_of(asked: ReplayRequest, run_id: str, *, num_steps: int) -> list[Replay]:
    """What is asked of a run that has trained `num_steps` steps: a replay per arm, or the one without arms.

    Raises:
        ConfigError: steps that it has not trained, or none.
    """
    start, _, end = asked.steps.partition(":")
    first = asked.from_version if asked.from_version is not None else int(start or 0)
    last = int(end or num_steps)
    if not 0 <= first < last <= num_steps:
        raise ConfigError(
            f"steps {first}:{end}: expected FIRST:LAST with 0 <= FIRST < LAST <= {num_steps}, the steps that the run "
            f"has trained, for example 0:{num_steps}."
        )
    found = []
    for arm in asked.compare or ({},):
        settings = {**asked.overrides, **({"scores": asked.scores} if asked.scores else {}), **arm}
        weights = settings.pop("scores", {})
        scores = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        replay = Replay(run_id=run_id, first_version=first, last_version=last, start=asked.start)
        found.append(replay.model_copy(update={"settings": settings, "scores": scores}))
    return found


def replay_config(parent: RunConfig, replay: Replay) -> RunConfig:
    """The child's configuration: the parent's, with the replay's settings, numbered as the parent's steps are.

    With another batch size a step is another stretch of the same indices, so the child's steps are renumbered. No
    version is evaluated as it appears (`evaluate.every` 0): that would need a sampler and a teacher.

    Raises:
        ConfigError: a setting that a log cannot be replayed with, or a configuration that cannot work.
    """
    for key in replay.settings:
        if key == "learner.num_steps":
            raise ConfigError("learner.num_steps: a replay trains the steps that its FIRST:LAST names.")
        if key.partition(".")[0] not in _REPLAYABLE:
            raise ConfigError(
                f"{key}: the log was made with it and cannot be replayed with another. A replay changes "
                f"{', '.join(_REPLAYABLE)} and scores; for anything else start a new run."
            )
    raw = parent.model_dump(mode="json")
    settings = dict(replay.settings)
    for key in list(settings):
        section, _, tag = key.partition(".")
        if tag and _VARIANTS.get(section) == tag and settings[key] != raw[section][tag]:
            # Another variant: the old one's options mean nothing to it.
            raw[section] = {tag: settings.pop(key)}
    settings.setdefault("evaluate.every", 0)
    schedule_steps = parent.learner.schedule_steps or parent.learner.num_steps
    # Valid while only the batch size of the new settings matters; the real number of steps follows from it.
    draft = load_config(raw, settings)
    size, parent_size = draft.learner.batch_size, parent.learner.batch_size
    num_steps = _steps_before(replay.last_version, parent_size, size)
    _steps_before(replay.first_version, parent_size, size)
    changed = {"num_steps": num_steps}
    if "learner.schedule_steps" not in settings:
        changed["schedule_steps"] = round(schedule_steps * parent_size / size)
    return draft.model_copy(update={"learner": draft.learner.model_copy(update=changed)})


def first_step(parent: RunConfig, child: RunConfig, replay: Replay) -> int:
    """The child's number of the step that starts at the replay's first index."""
    return _steps_before(replay.first_version, parent.learner.batch_size, child.learner.batch_size)


def parent_version(step: int, *, parent_batch_size: int, batch_size: int) -> int:
    """The version under which the parent trained the last index of the child's `step`.

    Staleness in a replay is measured on this clock, since tokens carry the parent's version numbers. The last index,
    not the first: a larger batch reaches rollouts of versions that its first index came before.
    """
    return ((step + 1) * batch_size - 1) // parent_batch_size


def _steps_before(version: int, parent_size: int, size: int) -> int:
    steps, rest = divmod(version * parent_size, size)
    if rest:
        raise ConfigError(
            f"learner.batch_size {size}: the parent's version {version} lies after index {version * parent_size}, "
            f"which is not a whole number of steps of {size}. Choose steps whose ends are."
        )
    return steps


# -- back-fill ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CandidateWidths:
    """Candidates to recompute."""

    head: int
    num_draws: int
    law: DrawLaw

    @property
    def name(self) -> str:
        """Of the folder that holds them, for example `head4-draws4-tail`."""
        return f"head{self.head}-draws{self.num_draws}-{self.law}"


@dataclass(frozen=True)
class Backfill:
    """What is asked of which teacher, and under which name the answers are stored."""

    teacher: TeacherConfig
    top_k: int
    num_teacher_draws: int
    candidates: CandidateWidths | None
    """None for the recorded ones."""
    folder: str
    """The teacher's name, `@`, and what is asked beyond what the run records."""


def backfill_of(config: RunConfig, asked: BackfillRequest, *, vocab_size: int | None) -> Backfill:
    """What to ask, never less than the run recorded, so that a back-fill serves its loss too.

    Args:
        vocab_size: None where only the tokenizer could tell; refuses what it can, and the widths are a guess.
    Raises:
        ConfigError: settings that cannot work, another teacher under the name of the run's own, or nothing to do.
    """
    cached, teacher = config.cached(), _teacher_of(config, asked.teacher)
    all_ids = (
        vocab_size if vocab_size is not None else max(cached.top_k, 0 if asked.top_k == "all" else asked.top_k) + 1
    )
    wanted = all_ids if asked.top_k == "all" else asked.top_k
    if wanted > all_ids:
        raise ConfigError(f"top_k {wanted}: the vocabulary has {all_ids} ids. Ask for all of them with `all`.")
    top_k = max(wanted, all_ids if cached.full_vocabulary else cached.top_k)
    num_teacher_draws = max(cached.num_teacher_draws, asked.num_teacher_draws)
    candidates = None
    if asked.candidates is not None:
        recorded = {"head": cached.head, "num_draws": cached.num_draws, "law": cached.law or "policy"}
        candidates = CandidateWidths(**{**recorded, **asked.candidates.model_dump(exclude_none=True)})
    parts = [f"top{top_k}"] if top_k > cached.top_k and not cached.full_vocabulary else []
    parts += [f"teacher-draws{num_teacher_draws}"] if num_teacher_draws > cached.num_teacher_draws else []
    parts += [candidates.name] if candidates else []
    if not parts and teacher.name == config.teacher.name:
        raise ConfigError(
            "there is nothing to back-fill: the run has its own teacher's scores with these widths already. Ask for "
            "a larger top_k, for more teacher draws, for candidates, or for another teacher."
        )
    folder = "@".join([teacher.name, *(["-".join(parts)] if parts else [])])
    return Backfill(teacher, top_k, num_teacher_draws, candidates, folder)


def _teacher_of(config: RunConfig, settings: Mapping[str, Any]) -> TeacherConfig:
    """The run's own teacher, with the given settings changed."""
    if not settings:
        return config.teacher
    raw: dict[str, Any] = config.model_dump(mode="json")
    if settings.get("engine", raw["teacher"]["engine"]) != raw["teacher"]["engine"]:
        raw["teacher"] = {"engine": settings["engine"]}
    changed = load_config(raw, {f"teacher.{key}": value for key, value in settings.items()}).teacher
    if changed != config.teacher and changed.name == config.teacher.name:
        raise ConfigError(
            f"teacher {arm_name(settings)}: this is another teacher than the run's own, under its name "
            f"{changed.name!r}. Give it a name, for example name=other; names tell score folders apart."
        )
    return changed
