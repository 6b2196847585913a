"""What a replay is made of: which steps of which run, from which state, with which settings changed. Loads no torch.

parent's RunConfig + Replay --replay_config--> the child's RunConfig
Replay.to_record() is the child's `parent` in run.json: whoever has it can make the child again

What is asked of a teacher about rollouts that exist, and under which names answers are stored. Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from asyncopd.config.engines import TeacherConfig
from asyncopd.config.load import load_config, parse_override
from asyncopd.config.schema import RunConfig
from asyncopd.errors import ConfigError
from asyncopd.types import DrawLaw

Start = Literal["checkpoint", "weights"]
"""`checkpoint`: the parent's exact state, optimizer included. `weights`: its published weights, a new optimizer."""

_VARIANTS = {"loss": "name", "teacher": "engine", "student": "kind", "task": "kind"}
_REPLAYABLE = ("loss", "learner", "evaluate", "limits")


@dataclass(frozen=True)
class Replay:
    """A run trained again from another run's log."""

    run_id: str
    """Of the parent, whose trajectories and scores are read."""
    first_version: int
    """The parent's version that the replay starts from: its first index (in order arrival: its first position, see
    asyncopd/schedule.py) is first_version · (parent's batch size)."""
    last_version: int
    """The parent's steps [first_version, last_version) are trained."""
    start: Start = "checkpoint"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys whose values differ from the parent's configuration."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Folder of scores -> weight of that teacher in the mixture; weights add up to 1."""

    @property
    def child_id(self) -> str:
        """The same replay has the same id, so that asking for it again goes on with it."""
        canonical = json.dumps(asdict(self), sort_keys=True)
        return f"{self.run_id[:80]}-replay-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Replay:
        return cls(**record)


def parse_steps(text: str, *, num_steps: int) -> tuple[int, int]:
    """`40:200` -> (40, 200); either side may be left out. Raises ConfigError unless 0 <= first < last <= num_steps."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    first, last = (int(match[1] or 0), int(match[2] or num_steps)) if match else (0, 0)
    if match is None or not 0 <= first < last <= num_steps:
        raise ConfigError(
            f"--steps {text}: expected FIRST:LAST with 0 <= FIRST < LAST <= {num_steps}, the steps that the run has "
            f"trained, for example --steps 0:{num_steps}."
        )
    return first, last


def parse_settings(texts: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """KEY=VALUE texts -> (settings by dotted key, weights by folder of scores).

    `scores=NAME` and `scores={NAME: WEIGHT, …}` name what to train on; everything else is a key of the configuration.

    Raises:
        ConfigError: no `=`, or weights that are not positive.
    """
    settings = dict(parse_override(text) for text in texts)
    named = settings.pop("scores", {})
    weights = {named: 1.0} if isinstance(named, str) else named
    if not isinstance(weights, Mapping) or not all(isinstance(w, int | float) and w > 0 for w in weights.values()):
        raise ConfigError(f"scores={named!r}: expected NAME or {{NAME: WEIGHT, …}} with weights above 0.")
    total = sum(weights.values())
    return settings, {str(name): weight / total for name, weight in weights.items()}


def split_arm(text: str) -> list[str]:
    """`loss.name=npd loss.top_k=4` -> its KEY=VALUE parts; values may hold blanks."""
    return [part for part in re.split(r"\s+(?=[a-z_][a-z0-9_.]*=)", text.strip()) if part]


def replay_config(parent: RunConfig, replay: Replay) -> RunConfig:
    """The child's configuration: the parent's, with the replay's settings, numbered as the parent's steps are.

    With another batch size a step is another stretch of the same indices, so the child's steps are renumbered. No
    version is evaluated as it appears (`evaluate.every` 0): that would need a sampler and a teacher.

    Raises:
        ConfigError: a setting that a log cannot be replayed with, or a configuration that cannot work.
    """
    for key in replay.settings:
        _check_replayable(key)
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


def with_settings(replay: Replay, settings: Mapping[str, Any], scores: Mapping[str, float]) -> Replay:
    """An arm of a comparison: the same replay with more settings; `scores` replaces the replay's unless empty."""
    return replace(replay, settings={**replay.settings, **settings}, scores=dict(scores) or replay.scores)


def _steps_before(version: int, parent_size: int, size: int) -> int:
    steps, rest = divmod(version * parent_size, size)
    if rest:
        raise ConfigError(
            f"learner.batch_size {size}: the parent's version {version} lies after index {version * parent_size}, "
            f"which is not a whole number of steps of {size}. Choose --steps whose ends are."
        )
    return steps


def _check_replayable(key: str) -> None:
    section = key.partition(".")[0]
    if key == "learner.num_steps":
        raise ConfigError("learner.num_steps: a replay trains the steps that --steps names.")
    if section not in _REPLAYABLE:
        raise ConfigError(
            f"--set {key}: the log was made with it and cannot be replayed with another. A replay changes "
            f"{', '.join(_REPLAYABLE)} and scores; for anything else start a new run."
        )


@dataclass(frozen=True)
class CandidateRequest:
    """Candidates to recompute from the student that sampled."""

    head: int
    num_draws: int
    law: DrawLaw

    @property
    def name(self) -> str:
        """Of the folder that holds them, for example `head4-draws4-tail`."""
        return f"head{self.head}-draws{self.num_draws}-{self.law}"


@dataclass(frozen=True)
class Backfill:
    """One back-fill of one run."""

    run_id: str
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of the section `teacher` that differ from the run's own."""
    top_k: int | Literal["all"] = 0
    """At least this many of the teacher's most likely ids; what the run recorded is the least."""
    num_teacher_draws: int = 0
    """At least this many ids drawn from the teacher."""
    candidates: str = ""
    """`head=K,num_draws=N,law=LAW`; empty for the recorded ones."""


def teacher_of(config: RunConfig, backfill: Backfill) -> TeacherConfig:
    """The teacher to ask: the run's own, with the given settings changed.

    Raises:
        ConfigError: settings that cannot work, or another teacher under the name of the run's own.
    """
    if not backfill.teacher:
        return config.teacher
    raw: dict[str, Any] = config.model_dump(mode="json")
    settings = dict(backfill.teacher)
    if settings.get("engine", raw["teacher"]["engine"]) != raw["teacher"]["engine"]:
        raw["teacher"] = {"engine": settings.pop("engine")}
    changed = load_config(raw, {f"teacher.{key}": value for key, value in settings.items()}).teacher
    if changed != config.teacher and changed.name == config.teacher.name:
        raise ConfigError(
            f"--teacher: {backfill.teacher} is another teacher than the run's own, under its name {changed.name!r}. "
            "Give it a name, for example --teacher name=other; names tell score folders apart."
        )
    return changed


def widths(config: RunConfig, backfill: Backfill, *, vocab_size: int) -> tuple[int, int]:
    """(top-k, teacher draws) to ask for: never less than the run recorded, so that a back-fill serves its loss too."""
    cached = config.cached()
    recorded = vocab_size if cached.full_vocabulary else cached.top_k
    top_k = vocab_size if backfill.top_k == "all" else max(recorded, backfill.top_k)
    if top_k > vocab_size:
        raise ConfigError(f"--top-k {backfill.top_k}: the vocabulary has {vocab_size} ids. Use --top-k all.")
    return top_k, max(cached.num_teacher_draws, backfill.num_teacher_draws)


def candidates_of(config: RunConfig, backfill: Backfill) -> CandidateRequest | None:
    """The candidates to recompute; None for the recorded ones.

    Raises:
        ConfigError: `backfill.candidates` is not understood.
    """
    if not backfill.candidates:
        return None
    cached = config.cached()
    values: dict[str, Any] = {"head": cached.head, "num_draws": cached.num_draws, "law": cached.law or "policy"}
    for part in backfill.candidates.split(","):
        name, _, value = part.partition("=")
        if name not in values or not (value in ("policy", "tail") if name == "law" else value.isdigit()):
            raise ConfigError(
                f"--candidates {backfill.candidates!r}: {part!r} is not understood; expected head=K, num_draws=N and "
                "law=policy or law=tail, joined by commas, for example --candidates head=4,num_draws=4,law=tail."
            )
        values[name] = value if name == "law" else int(value)
    return CandidateRequest(**values)


def folder_of(
    config: RunConfig,
    teacher: TeacherConfig,
    *,
    top_k: int,
    num_teacher_draws: int,
    candidates: CandidateRequest | None,
) -> str:
    """Folder of the scores: the teacher's name, `@`, and what was asked beyond what the run records.

    Raises:
        ConfigError: the run has those scores already.
    """
    cached = config.cached()
    parts = [f"top{top_k}"] if top_k > cached.top_k and not cached.full_vocabulary else []
    parts += [f"teacher-draws{num_teacher_draws}"] if num_teacher_draws > cached.num_teacher_draws else []
    parts += [candidates.name] if candidates else []
    if not parts and teacher.name == config.teacher.name:
        raise ConfigError(
            "there is nothing to back-fill: the run has its own teacher's scores with these widths already. Ask for "
            "more with --top-k, --teacher-draws or --candidates, or for another teacher with --teacher."
        )
    return "@".join([teacher.name, *(["-".join(parts)] if parts else [])])
