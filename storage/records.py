"""The JSON objects of a run and the values they stand for, converted field by field.

Every object carries `schema_version` and, last, the `sha256` of all its bytes before that field, checked on every read.
NaN is written as null; infinities as "Infinity" and "-Infinity".

Records numbered 1, 2, 3, ... without gaps: each is written once, and one probe finds whether there is a new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from asyncopd.errors import ShapeError, ShardCorruptError, StorageError
from asyncopd.schedule import Arrival
from asyncopd.types import (
    Evaluation,
    Failure,
    Heartbeat,
    IndexRange,
    IndexSet,
    Manifest,
    PolicyVersion,
    Removal,
    Rewind,
    Span,
    TrainStep,
)
from storage.stores.base import ObjectStore

T = TypeVar("T")

SCHEMA_VERSION = 2
"""2: the object ends in its own sha256. Objects of version 1 have none and stay readable."""
_CHECKSUM = "sha256"
_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}')
_SEAL_BYTES = len(b',\n "sha256": ""\n}') + 64
_BAD_FIELDS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, ShapeError)
"""What building a value raises when a field is missing or has the wrong type."""


def to_json(fields: Mapping[str, Any]) -> bytes:
    """`fields` and the schema version as UTF-8 JSON, in the given order, sealed with a sha256.

    A field `sha256` is left out: a record that was read and is written again gets a seal of its own.
    """
    named = {"schema_version": SCHEMA_VERSION, **{key: value for key, value in fields.items() if key != _CHECKSUM}}
    text = json.dumps(_plain(named), allow_nan=False, ensure_ascii=False, indent=1).encode()
    # The seal covers bytes, not values: 1e5 and 1E5 are one number, and one of them is a flipped bit.
    promised = text.removesuffix(b"\n}")
    return promised + f',\n "{_CHECKSUM}": "{hashlib.sha256(promised).hexdigest()}"\n}}'.encode()


def from_json(body: bytes, key: str, build: Callable[[dict[str, Any]], T]) -> T:
    """What `build` makes of the JSON object under `key`.

    Raises:
        ShardCorruptError: `body` is not such an object, or not the one that was written.
        StorageError: a newer code version wrote it.
    """
    seal = _SEAL.fullmatch(body[-_SEAL_BYTES:])
    if seal is not None:
        found = hashlib.sha256(memoryview(body)[:-_SEAL_BYTES]).hexdigest()
        if found != seal[1].decode():
            raise _corrupt(key, body, f"sha256 {found[:12]} does not match its own {seal[1].decode()[:12]}")
    try:
        fields = json.loads(body)
        written_by = int(fields["schema_version"])
        fields.pop(_CHECKSUM, None)
    except _BAD_FIELDS as exc:
        raise _corrupt(key, body, f"{type(exc).__name__}: {exc}") from exc
    if written_by > SCHEMA_VERSION:
        raise StorageError(
            f"{key} has schema version {written_by}, this code reads up to {SCHEMA_VERSION}. "
            "Use the code version that wrote it (run.json names it)."
        )
    if seal is None and written_by >= 2:
        raise _corrupt(key, body, f"schema version {written_by} without its sha256 at the end")
    try:
        return build(fields)
    except _BAD_FIELDS as exc:
        raise _corrupt(key, body, f"{type(exc).__name__}: {exc}") from exc


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
        objects={key: _promise(promise) for key, promise in fields["objects"].items()},
        created=fields["created"],
        worker=fields["worker"],
        facts=facts,
    )


def _promise(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**fields, "size_bytes": int(fields["size_bytes"]), "sha256": str(fields["sha256"])}


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


def claim_from_json(fields: Mapping[str, Any]) -> tuple[str, float]:
    """(worker, claimed); stage, shard and attempt are in the key."""
    return fields["worker"], fields["claimed"]


def heartbeat_from_json(fields: Mapping[str, Any]) -> Heartbeat:
    return Heartbeat(
        worker=fields["worker"], beaten=fields["beaten"], retired=fields["retired"], status=fields["status"]
    )


def rewind_to_json(rewind: Rewind) -> bytes:
    return to_json(
        {"rewind": rewind.number, "to_step": rewind.to_step, "worker": rewind.worker, "recorded": rewind.recorded}
    )


def rewind_from_json(fields: Mapping[str, Any]) -> Rewind:
    return Rewind(
        number=fields["rewind"], to_step=fields["to_step"], worker=fields["worker"], recorded=fields["recorded"]
    )


def failure_from_json(fields: Mapping[str, Any]) -> Failure:
    return Failure(role=fields["role"], worker=fields["worker"], reason=fields["reason"], failed=fields["failed"])


def removal_to_json(removal: Removal) -> bytes:
    return to_json({"reason": removal.reason, "keys": removal.keys, "removed": removal.removed})


def removal_from_json(fields: Mapping[str, Any]) -> Removal:
    return Removal(reason=fields["reason"], keys=dict(fields["keys"]), removed=fields["removed"])


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


def _corrupt(key: str, body: bytes, reason: str) -> ShardCorruptError:
    return ShardCorruptError(
        f"{key} is not a readable record: {reason} ({len(body)} bytes, starting {body[:40]!r}). Restore the object, or "
        f"run `asyncopd maintain quarantine {key}`, which sets it aside and says what follows."
    )


class NumberedRecords:
    """An append-only list of small JSON objects with any number of writers. Reads every record once."""

    def __init__(self, store: ObjectStore, key_of: Callable[[int], str]) -> None:
        self._store, self._key_of = store, key_of
        self._records: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All records so far, oldest first; one request when there is no new one."""
        with self._lock:
            while True:
                key = self._key_of(len(self._records) + 1)
                body = self._store.find(key)
                if body is None:
                    return list(self._records)
                self._records.append(from_json(body, key, dict))

    def append(self, fields: Mapping[str, Any]) -> int:
        """Write the next record; returns its number. Several writers get different numbers."""
        while True:
            number = len(self.read()) + 1
            if self._store.put_if_absent(self._key_of(number), to_json(fields)):
                return number
