"""What may be asked of a log that exists, one value each behind every door, and what it comes to once the run is known.

    asyncopd replay RUN --steps 40:100 …       texts --.                        steps trained
    prefect deployment run replay/run -p …     either --+--> ReplayRequest --replays_of--> Replay --> child's RunConfig
    POST /v1/runs/RUN/replay                   JSON  --'     BackfillRequest --backfill_of--> Backfill

Texts (`40:100`, `KEY=VALUE`, `head=4,law=tail`, `0:64`) are read here, so all doors take the same and refuse it in the
same words. What only the log can tell is checked in storage/replay.py. Loads no torch.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from asyncopd.config.base import Frozen
from asyncopd.config.engines import TeacherConfig
from asyncopd.config.load import load_config, parse_override
from asyncopd.config.schema import RunConfig
from asyncopd.errors import ConfigError
from asyncopd.schedule import OnStale, Order
from asyncopd.types import DrawLaw

Start = Literal["checkpoint", "weights"]
_REPLAYABLE = ("loss", "learner", "evaluate", "limits")
_VARIANTS = {"loss": "name", "teacher": "engine", "student": "kind", "task": "kind"}
STEPS = r"^[0-9]{0,9}:[0-9]{0,9}$"


def _settings(value: Any) -> Any:
    """`KEY=VALUE …` in one text, or one to a text -> settings by dotted key; weights of `scores` by folder."""
    if isinstance(value, str):
        # Values may hold blanks: a new setting starts where a key and its `=` do.
        value = [part for part in re.split(r"\s+(?=[a-z_][a-z0-9_.]*=)", value.strip()) if part]
    if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        value = dict(map(_setting, value))
    if not isinstance(value, dict):
        return value
    for key, of_key in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", str(key)):
            raise ConfigError(f"{key!r}: {of_key!r} is no setting; expected a dotted key, for example loss.name.")
    return {**value, "scores": _weights(value["scores"])} if "scores" in value else value


def _setting(text: str) -> tuple[str, Any]:
    value = text.partition("=")[2]
    try:
        # An alias in an alias … is a page of text in memory and the whole of it once written out.
        is_alias = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(value))
        yaml.safe_load(value)  # `parse_override` would refuse it in the words of a `--set`, which only one door has
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{text[:80]!r}: its value cannot be read: {str(error)[:200]}") from None
    if is_alias:
        raise ConfigError(f"{text[:80]!r}: expected a value without YAML aliases (*name); write it out.")
    return parse_override(text)


def _weights(named: Any) -> Any:
    """NAME, or the weights of several -> weight by folder of scores."""
    weights = {named: 1.0} if isinstance(named, str) else named
    given = weights.values() if isinstance(weights, Mapping) else [None]
    if not all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in given):
        raise ConfigError(f"scores={named!r}: expected NAME or {{NAME: WEIGHT, …}} with weights above 0.")
    return {str(name): weight for name, weight in weights.items()}


def _steps(text: str) -> str:
    if not re.fullmatch(STEPS, text):
        raise ConfigError(f"steps {text!r}: expected FIRST:LAST, either side of which may be left out, like 40:100.")
    return text


def _arms(arms: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    if len(arms) == 1:
        raise ConfigError(f"compare {arm_name(arms[0])!r}: a comparison needs at least two arms; name each of them.")
    return arms


def _top_k(text: str) -> str:
    if text != "all" and not text.isdecimal():
        raise ConfigError(f"top_k {text!r}: expected a number of ids, or all.")
    return text


def _candidates(text: str) -> dict[str, str] | None:
    parts = text.split(",") if text else []
    for part in parts:
        if not re.fullmatch(r"(head|num_draws)=\d+|law=(policy|tail)", part):
            raise ConfigError(
                f"candidates {text!r}: {part!r} is not understood; expected head=K, num_draws=N and law=policy or "
                "law=tail, joined by commas, for example head=4,num_draws=4,law=tail."
            )
    return dict(part.split("=") for part in parts) or None


def _staleness(text: str) -> list[str] | list[int]:
    """`0,2,8` as it stands; `0:64` as 0, 1, 2, 4, … 64."""
    if not re.fullmatch(r"\d+:\d+|\d+(,\d+)*", text):
        raise ConfigError(f"{text!r}: expected bounds in versions, like 0,2,8, or FIRST:LAST, like 0:64.")
    if ":" not in text:
        return text.split(",")
    first, last = map(int, text.split(":"))
    if first > last:
        raise ConfigError(f"{text!r}: expected FIRST:LAST with FIRST <= LAST.")
    return sorted({first, *(2**n for n in range(last.bit_length()) if 2**n > first), last})


def _texts(read: Callable[[str], Any], accepted: Any) -> BeforeValidator:
    """Texts are read by `read`, other values are taken as they are; the OpenAPI says what is accepted."""
    return BeforeValidator(lambda v: read(v) if isinstance(v, str) else v, json_schema_input_type=accepted)


Settings = Annotated[
    dict[str, Any], BeforeValidator(_settings, json_schema_input_type=dict[str, Any] | list[str] | str)
]
"""Values by dotted key; also KEY=VALUE texts."""
Weights = Annotated[dict[str, float], BeforeValidator(_weights, json_schema_input_type=dict[str, float] | str)]
"""Weight by folder of scores; also the name of one."""
TopK = Annotated[int, Field(ge=0, le=1_000_000)] | Literal["all"]
Bounds = tuple[Annotated[int, Field(ge=0)], ...]


def arm_name(arm: Mapping[str, Any]) -> str:
    """An arm of a comparison as it is typed."""
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in arm.items())


class Request(Frozen):
    """What is asked of one run."""

    verb: ClassVar[str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The request of texts or values by field. Raises ConfigError, whatever is wrong with them."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False)]
            raise ConfigError("; ".join(found)) from None

    def command(self, root: str, run_id: str, *, out: str | None = None, watch_parent: bool = False) -> list[str]:
        """The process that does what is asked, without Prefect (flows/offline.py)."""
        flags = [*(["--out", out] if out else []), *(["--watch-parent"] if watch_parent else [])]
        return [sys.executable, "-m", "flows.offline", *flags, self.verb, root, run_id, self.model_dump_json()]


class ReplayRequest(Request):
    """Train again from a run's log, with other settings (docs/replay.md)."""

    verb = "replay"
    steps: Annotated[str, AfterValidator(_steps)] = Field(
        ":", examples=["40:100"], json_schema_extra={"pattern": STEPS}
    )
    """Optimizer steps of the run, counted from 0, LAST not included: 40:100 starts from policy version 40 and ends with
    version 100. All it trained by default."""
    from_version: int | None = Field(None, ge=0, le=10**9, examples=[40])
    """Fork at policy version N: the same as steps N:."""
    start: Start = Field("checkpoint", examples=["checkpoint"])
    """checkpoint: the run's exact state, optimizer included (steps after the checkpoint before it are trained again on
    the way). weights: the published weights and a new optimizer."""
    overrides: Settings = Field({}, max_length=100, examples=[{"learner.lr": 0.001}])
    """A changed setting (loss.*, learner.*, …), or scores=FOLDER, or scores={FOLDER: WEIGHT, …} for a mixture."""
    scores: Weights = Field({}, max_length=20, examples=[{"oracle": 1.0}])
    """Folder of scores -> weight of that teacher; the run's own when empty."""
    compare: Annotated[tuple[Settings, ...], AfterValidator(_arms)] = Field(
        (), max_length=20, examples=[[{"learner.lr": 0.001}, {"learner.lr": 0.002}]]
    )
    """One arm of a comparison on identical rollouts; give at least two."""
    evaluate: bool = Field(False, examples=[True])
    """Evaluate the first and last version after training."""
    num_prompts: int = Field(0, ge=0, le=100_000, examples=[300])
    """How many held-out prompts each arm of a comparison answers; the run's evaluate.num_prompts when 0."""


class CandidateSettings(Frozen):
    """Candidates to recompute from the published weights of the student that sampled; what is left out is the run's."""

    head: int | None = Field(None, ge=0, le=100_000, examples=[4])
    """Most likely ids."""
    num_draws: int | None = Field(None, ge=0, le=100_000, examples=[4])
    """Drawn ids."""
    law: DrawLaw | None = Field(None, examples=["tail"])
    """What they are drawn from."""


class BackfillRequest(Request):
    """Score a run's trajectories again, with another teacher or wider (docs/replay.md)."""

    verb = "backfill"
    teacher: Settings = Field({}, max_length=100, examples=[{"name": "hard", "smoothing": 1e-4}])
    """A changed setting of the run's teacher; another teacher has another name and something else that differs, like
    name=hard and smoothing=1e-4."""
    top_k: Annotated[TopK, _texts(_top_k, TopK)] = Field(0, examples=[16])
    """Most likely ids per token, or `all`."""
    num_teacher_draws: int = Field(0, ge=0, le=100_000, examples=[8])
    """Ids per token drawn by the teacher."""
    candidates: Annotated[CandidateSettings | None, _texts(_candidates, CandidateSettings | str | None)] = Field(
        None, examples=[{"head": 4, "num_draws": 4, "law": "tail"}]
    )
    """Recompute the sampling student's candidates from its published weights."""
    cache: bool = Field(False, examples=[True])
    """Share answers with other runs of the storage root."""


class CounterfactualRequest(Request):
    """Consume a run's log later, in another order, under other bounds (docs/replay.md)."""

    verb = "counterfactual"
    staleness: Annotated[Bounds, _texts(_staleness, Bounds | str)] = Field(
        (0, 1, 2, 4, 8, 16, 32, 64), min_length=1, examples=["0:64"]
    )
    """Bounds in policy versions: 0,2,8, or 0:64 for 0, 1, 2, 4 … 64."""
    order: Annotated[tuple[Order, ...], _texts(lambda text: text.split(","), tuple[Order, ...] | str)] = Field(
        ("index", "arrival"), min_length=1, examples=["index"]
    )
    """Some of index, arrival."""
    on_stale: Annotated[tuple[OnStale, ...], _texts(lambda text: text.split(","), tuple[OnStale, ...] | str)] = Field(
        ("train", "drop", "hold"), min_length=1, examples=["train,drop"]
    )
    """Some of train, drop, hold."""
    lag: int | None = Field(None, ge=0)
    """Optimizer steps of delay for all bounds; as much as each allows by default."""
    from_version: int | None = Field(None, ge=0)
    """Policy version every setting starts from; the largest lag by default."""


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
        steps = {"first_version": first, "last_version": last, "start": asked.start}
        found.append(Replay(run_id=run_id, **steps, settings=settings, scores=scores))
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
    settings = {"evaluate.every": 0, **replay.settings}
    for key in list(settings):
        section, _, tag = key.partition(".")
        if tag and _VARIANTS.get(section) == tag and settings[key] != raw[section][tag]:
            # Another variant: the old one's options mean nothing to it.
            raw[section] = {tag: settings.pop(key)}
    # Valid while only the batch size of the new settings matters; the real number of steps follows from it.
    draft = load_config(raw, settings)
    size, parent_size = draft.learner.batch_size, parent.learner.batch_size
    for version in (replay.last_version, replay.first_version):
        if (index := version * parent_size) % size:
            raise ConfigError(
                f"learner.batch_size {size}: the parent's version {version} lies after index {index}, which is not a "
                f"whole number of steps of {size}. Choose steps whose ends are."
            )
    changed = {"num_steps": replay.last_version * parent_size // size}
    if "learner.schedule_steps" not in settings:
        schedule_steps = parent.learner.schedule_steps or parent.learner.num_steps
        changed["schedule_steps"] = round(schedule_steps * parent_size / size)
    return draft.model_copy(update={"learner": draft.learner.model_copy(update=changed)})


def first_step(parent: RunConfig, child: RunConfig, replay: Replay) -> int:
    """The child's number of the step that starts at the replay's first index."""
    return replay.first_version * parent.learner.batch_size // child.learner.batch_size


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
    named = 0 if asked.top_k == "all" else asked.top_k
    all_ids = vocab_size if vocab_size is not None else max(cached.top_k, named) + 1
    wanted = all_ids if asked.top_k == "all" else named
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
