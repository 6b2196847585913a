"""What may be asked of a log that exists: a replay, a back-fill, a counterfactual. One value each, behind every door.

    asyncopd replay RUN --steps 40:100 …       texts --.
    prefect deployment run replay/run -p …     either --+--> ReplayRequest --> Replay --> run.json of the child
    POST /v1/runs/RUN/replay                   JSON  --'       of the run        what is trained, exactly

Texts (`40:100`, `KEY=VALUE`, `head=4,law=tail`, `0:64`) are read here, so all doors take the same and refuse it in the
same words. The run and its storage root are the address, not part of the question. What only the log can tell is
checked in storage/replay.py. Loads no torch.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from asyncopd.config.base import Frozen
from asyncopd.config.load import parse_override
from asyncopd.errors import ConfigError
from asyncopd.schedule import OnStale, Order
from asyncopd.types import DrawLaw

Start = Literal["checkpoint", "weights"]

STEPS = r"^[0-9]{0,9}:[0-9]{0,9}$"


# -- texts --------------------------------------------------------------------------------------------------------
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
    try:
        # An alias in an alias … is a page of text in memory and the whole of it once written out.
        is_alias = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text.partition("=")[2]))
        key, value = parse_override(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{text[:80]!r}: its value cannot be read: {str(error)[:200]}") from None
    if is_alias:
        raise ConfigError(f"{text[:80]!r}: expected a value without YAML aliases (*name); write it out.")
    return key, value


def _weights(named: Any) -> Any:
    """NAME, or the weights of several -> weight by folder of scores."""
    weights = {named: 1.0} if isinstance(named, str) else named
    if not isinstance(weights, Mapping) or not all(
        isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights.values()
    ):
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


def _top_k(value: Any) -> Any:
    if isinstance(value, str) and value != "all" and not value.isdecimal():
        raise ConfigError(f"top_k {value!r}: expected a number of ids, or all.")
    return value


def _candidates(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for part in value.split(",") if value else []:
        if not re.fullmatch(r"(head|num_draws)=\d+|law=(policy|tail)", part):
            raise ConfigError(
                f"candidates {value!r}: {part!r} is not understood; expected head=K, num_draws=N and law=policy or "
                "law=tail, joined by commas, for example head=4,num_draws=4,law=tail."
            )
    return dict(part.split("=") for part in value.split(",")) if value else None


def _staleness(value: Any) -> Any:
    """`0,2,8` as it stands; `0:64` as 0, 1, 2, 4, … 64."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"\d+:\d+|\d+(,\d+)*", value):
        raise ConfigError(f"{value!r}: expected bounds in versions, like 0,2,8, or FIRST:LAST, like 0:64.")
    first, colon, last = value.partition(":")
    if not colon:
        return value.split(",")
    if int(first) > int(last):
        raise ConfigError(f"{value!r}: expected FIRST:LAST with FIRST <= LAST.")
    powers = [2**n for n in range(int(last).bit_length())]
    return sorted({int(first), *(p for p in powers if int(first) <= p <= int(last)), int(last)})


def _listed(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Settings = Annotated[
    dict[str, Any], BeforeValidator(_settings, json_schema_input_type=dict[str, Any] | list[str] | str)
]
"""Values by dotted key; also KEY=VALUE texts."""
Weights = Annotated[dict[str, float], BeforeValidator(_weights, json_schema_input_type=dict[str, float] | str)]
"""Weight by folder of scores; also the name of one."""


TopK = Annotated[int, Field(ge=0, le=1_000_000)] | Literal["all"]


def arm_name(arm: Mapping[str, Any]) -> str:
    """An arm of a comparison as it is typed."""
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in arm.items())


# -- requests -----------------------------------------------------------------------------------------------------
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
    top_k: Annotated[TopK, BeforeValidator(_top_k, json_schema_input_type=TopK)] = Field(0, examples=[16])
    """Most likely ids per token, or `all`."""
    num_teacher_draws: int = Field(0, ge=0, le=100_000, examples=[8])
    """Ids per token drawn by the teacher."""
    candidates: Annotated[
        CandidateSettings | None, BeforeValidator(_candidates, json_schema_input_type=CandidateSettings | str | None)
    ] = Field(None, examples=[{"head": 4, "num_draws": 4, "law": "tail"}])
    """Recompute the sampling student's candidates from its published weights."""
    cache: bool = Field(False, examples=[True])
    """Share answers with other runs of the storage root."""


class CounterfactualRequest(Request):
    """Consume a run's log later, in another order, under other bounds (docs/replay.md)."""

    verb = "counterfactual"
    staleness: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(_staleness, json_schema_input_type=tuple[Annotated[int, Field(ge=0)], ...] | str),
    ] = Field((0, 1, 2, 4, 8, 16, 32, 64), min_length=1, examples=["0:64"])
    """Bounds in policy versions: 0,2,8, or 0:64 for 0, 1, 2, 4 … 64."""
    order: Annotated[tuple[Order, ...], BeforeValidator(_listed, json_schema_input_type=tuple[Order, ...] | str)] = (
        Field(("index", "arrival"), min_length=1, examples=["index"])
    )
    """Some of index, arrival."""
    on_stale: Annotated[
        tuple[OnStale, ...], BeforeValidator(_listed, json_schema_input_type=tuple[OnStale, ...] | str)
    ] = Field(("train", "drop", "hold"), min_length=1, examples=["train,drop"])
    """Some of train, drop, hold."""
    lag: int | None = Field(None, ge=0)
    """Optimizer steps of delay for all bounds; as much as each allows by default."""
    from_version: int | None = Field(None, ge=0)
    """Policy version every setting starts from; the largest lag by default."""
