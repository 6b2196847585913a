"""The JSON objects of a run and the values they stand for, converted field by field.

Every object carries `schema_version`. NaN is written as null; infinities as "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from asyncopd.arrivals import Arrival
from asyncopd.errors import ShardCorruptError, StorageError
from asyncopd.types import Evaluation, IndexRange, IndexSet, Manifest, PolicyVersion, Span, TrainStep

T = TypeVar("T")

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Claim:
    """`worker` took a shard; the claim with the highest attempt counts."""

    stage: str
    shard: IndexRange
    attempt: int
    """1 for the first claim; one more each time a dead worker's claim was taken over."""
    worker: str
    claimed: float
    """Unix time, seconds."""


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a worker."""

    worker: str
    beaten: float
    """Unix time, seconds, of the worker's clock."""
    retired: bool
    """The worker stopped in good order."""
    status: Mapping[str, Any]
    """Whatever the worker tells about itself."""


@dataclass(frozen=True)
class Rewind:
    """The learner went back: versions and checkpoints above `to_step` of earlier rewinds are superseded."""

    number: int
    """1 for the first."""
    to_step: int
    """State after this many steps."""
    worker: str
    recorded: float
    """Unix time, seconds."""


RunStateName = Literal["running", "stopped", "failed", "completed"]


@dataclass(frozen=True)
class RunState:
    """What the flow of a run last said about it."""

    number: int
    """1 for the first."""
    state: RunStateName
    reason: str
    """Why it stopped or failed; may be empty."""
    by: str
    """The flow run that said so."""
    recorded: float
    """Unix time, seconds."""

    @property
    def ended(self) -> bool:
        """Was the run stopped from outside or by an error? Then its workers stop too, wherever they are."""
        return self.state in ("stopped", "failed")


@dataclass(frozen=True)
class RunChange:
    """Settings that were changed when a run was resumed."""

    settings: Mapping[str, tuple[Any, Any]]
    """Dotted key -> (old value, new value)."""
    recorded: float
    """Unix time, seconds."""


@dataclass(frozen=True)
class Failure:
    """Why a role failed."""

    role: str
    worker: str
    reason: str
    failed: float
    """Unix time, seconds."""


def to_json(fields: Mapping[str, Any]) -> bytes:
    """`fields` and the schema version as UTF-8 JSON, in the given order."""
    return json.dumps(
        _plain({"schema_version": SCHEMA_VERSION, **fields}), allow_nan=False, ensure_ascii=False, indent=1
    ).encode()


def from_json(body: bytes, key: str, build: Callable[[dict[str, Any]], T]) -> T:
    """What `build` makes of the JSON object under `key`.

    Raises:
        ShardCorruptError: `body` is not such an object.
        StorageError: a newer code version wrote it.
    """
    try:
        fields = json.loads(body)
        written_by = int(fields["schema_version"])
    except (ValueError, KeyError, TypeError) as exc:
        raise _corrupt(key, body, exc) from exc
    if written_by > SCHEMA_VERSION:
        raise StorageError(
            f"{key} has schema version {written_by}, this code reads up to {SCHEMA_VERSION}. "
            "Use the code version that wrote it (run.json names it)."
        )
    try:
        return build(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _corrupt(key, body, exc) from exc


def manifest_to_json(manifest: Manifest) -> bytes:
    return to_json(
        {
            "kind": manifest.kind,
            "objects": manifest.objects,
            "created": manifest.created,
            "worker": manifest.worker,
            "facts": manifest.facts,
        }
    )


def manifest_from_json(fields: Mapping[str, Any]) -> Manifest:
    facts = dict(fields["facts"])
    if "dropped" in facts:
        facts["dropped"] = _int_keys(facts["dropped"])
    return Manifest(
        kind=fields["kind"],
        objects={key: dict(promise) for key, promise in fields["objects"].items()},
        created=fields["created"],
        worker=fields["worker"],
        facts=facts,
    )


def step_to_json(step: TrainStep) -> bytes:
    return to_json(
        {
            "step": step.step,
            "rewind": step.rewind,
            **_indices_fields(step.indices),
            "version": _version_fields(step.version),
            "num_tokens": step.num_tokens,
            "metrics": step.metrics,
            "staleness_tokens": step.staleness_tokens,
            "finished": step.finished,
            "dropped": step.dropped,
            "held": step.held,
        }
    )


def step_from_json(fields: Mapping[str, Any]) -> TrainStep:
    return TrainStep(
        step=fields["step"],
        rewind=fields["rewind"],
        indices=IndexSet(tuple(fields["index_list"])) if "index_list" in fields else IndexRange(*fields["indices"]),
        version=_version(fields["version"]),
        num_tokens=fields["num_tokens"],
        metrics=_floats(fields["metrics"]),
        staleness_tokens=_int_keys(fields["staleness_tokens"]),
        finished=fields["finished"],
        dropped=_int_keys(fields["dropped"]),
        held=_int_keys(fields.get("held", {})),
    )


def arrival_to_json(arrival: Arrival) -> bytes:
    return to_json(
        {
            "number": arrival.number,
            "shard": [arrival.shard.start, arrival.shard.stop],
            "num_taken_before": arrival.num_taken_before,
            "dropped": arrival.dropped,
            "held": arrival.held,
        }
    )


def arrival_from_json(fields: Mapping[str, Any]) -> Arrival:
    return Arrival(
        number=fields["number"],
        shard=IndexRange(*fields["shard"]),
        num_taken_before=fields["num_taken_before"],
        dropped=_int_keys(fields["dropped"]),
        held=_int_keys(fields["held"]),
    )


def evaluation_to_json(evaluation: Evaluation) -> bytes:
    return to_json(
        {
            "version": _version_fields(evaluation.version),
            "num_prompts": evaluation.num_prompts,
            "accuracy": evaluation.accuracy,
            "accuracy_by_group": evaluation.accuracy_by_group,
            "kl_nats": evaluation.kl_nats,
            "kl_standard_error_nats": evaluation.kl_standard_error_nats,
            "mean_response_tokens": evaluation.mean_response_tokens,
            "finished": evaluation.finished,
        }
    )


def evaluation_from_json(fields: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        version=_version(fields["version"]),
        num_prompts=fields["num_prompts"],
        accuracy=_float(fields["accuracy"]),
        accuracy_by_group=_floats(fields["accuracy_by_group"]),
        kl_nats=_float(fields["kl_nats"]),
        kl_standard_error_nats=_float(fields["kl_standard_error_nats"]),
        mean_response_tokens=_float(fields["mean_response_tokens"]),
        finished=fields["finished"],
    )


def spans_to_json(spans: Sequence[Span]) -> bytes:
    return to_json(
        {"spans": [[span.role, span.worker, span.activity, span.start, span.end, span.detail] for span in spans]}
    )


def spans_from_json(fields: Mapping[str, Any]) -> list[Span]:
    return [Span(*row) for row in fields["spans"]]


def _indices_fields(indices: IndexRange | IndexSet) -> dict[str, list[int]]:
    """A set is written out under `index_list`; `indices` is then the smallest range around it."""
    if isinstance(indices, IndexRange):
        return {"indices": [indices.start, indices.stop]}
    return {"indices": [min(indices.indices), max(indices.indices) + 1], "index_list": list(indices.indices)}


def _version_fields(version: PolicyVersion) -> dict[str, int]:
    return {"number": version.number, "rewind": version.rewind}


def _version(fields: Mapping[str, int]) -> PolicyVersion:
    return PolicyVersion(number=fields["number"], rewind=fields["rewind"])


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: string keys, lists, and no NaN or infinite number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    raise StorageError(
        f"a {type(value).__name__} ({value!r}) cannot be stored as JSON; convert it to numbers, strings, lists or maps."
    )


def _float(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: _float(value) for key, value in values.items()}


def _int_keys(values: Mapping[str, T]) -> dict[int, T]:
    return {int(key): value for key, value in values.items()}


def _corrupt(key: str, body: bytes, exc: Exception) -> ShardCorruptError:
    return ShardCorruptError(
        f"{key} is not a readable record: {type(exc).__name__}: {exc} ({len(body)} bytes, starting {body[:40]!r}). "
        "Expected a JSON object with schema_version. Restore the object, or delete it to have its work done again."
    )
