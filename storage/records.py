"""The JSON objects of a run and the values they stand for.

    value --fields by name--> JSON, sealed with its own sha256          to_json
    JSON --seal and version checked--> pydantic's TypeAdapter --> value   from_json

Every object carries `schema_version` and, last, the `sha256` of all its bytes before that field, checked on every read.
NaN is written as null; infinities as "Infinity" and "-Infinity". What the key says is not stored again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from asyncopd.errors import ShapeError, ShardCorruptError, StorageError
from asyncopd.records import Claim, Facts, Heartbeat, Manifest, Rewind, RunState, WorkerStatus
from asyncopd.schedule import Arrival
from asyncopd.types import Evaluation, IndexRange, IndexSet, Span, TrainStep
from storage.layout import RunLayout, parse
from storage.stores.base import ObjectStore

T = TypeVar("T")

SCHEMA_VERSION = 2
"""2: the object ends in its own sha256."""
_CHECKSUM = "sha256"
_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}')
_SEAL_BYTES = len(b',\n "sha256": ""\n}') + 64
_BAD_FIELDS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, ShapeError)
"""What building a value raises when a field is missing or has the wrong type."""


def to_json(value: Any) -> bytes:
    """A value, or a mapping of fields, and the schema version as UTF-8 JSON, in its order, sealed with a sha256.

    A field `sha256` is left out: a record that was read and is written again gets a seal of its own.
    """
    write: Callable[[Any], dict[str, Any]] = _WRITE.get(type(value), _plain)
    named = {
        "schema_version": SCHEMA_VERSION,
        **{name: field for name, field in write(value).items() if name != _CHECKSUM},
    }
    text = json.dumps(named, allow_nan=False, ensure_ascii=False, indent=1).encode()
    # The seal covers bytes, not values: 1e5 and 1E5 are one number, and one of them is a flipped bit.
    promised = text.removesuffix(b"\n}")
    return promised + f',\n "{_CHECKSUM}": "{hashlib.sha256(promised).hexdigest()}"\n}}'.encode()


def from_json(body: bytes, key: str, kind: type[T]) -> T:
    """The value of type `kind` that is stored under `key`, which may say some of its fields; `dict` for plain fields.

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
    if seal is None:
        raise _corrupt(key, body, f"schema version {written_by} without its sha256 at the end")
    try:
        if kind is not dict:
            fields = {**parse(key).fields, **fields}
        value: T = _adapter(cast(Hashable, kind)).validate_python(_READ.get(kind, dict)(fields))
        return value
    except ValidationError as exc:
        wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
        raise _corrupt(key, body, wrong) from exc
    except _BAD_FIELDS as exc:
        raise _corrupt(key, body, f"{type(exc).__name__}: {exc}") from exc


class NumberedRecords(Generic[T]):
    """Records numbered `first`, `first` + 1, ... without gaps: each is written once, by any number of writers.

    Reads every record once; one probe finds whether there is a new one. Safe to share between threads.
    """

    def __init__(self, store: ObjectStore, layout: RunLayout, kind: str, type_: type[T], *, first: int = 1) -> None:
        self._store, self._layout, self._kind, self._type, self._first = store, layout, kind, type_, first
        self._records: list[T] = []
        self._lock = threading.Lock()

    def read(self) -> list[T]:
        """All records so far, oldest first; one request when there is no new one."""
        with self._lock:
            while (body := self._store.find(key := self._key(self._first + len(self._records)))) is not None:
                self._records.append(from_json(body, key, self._type))
            return list(self._records)

    def append(self, build: Callable[[int], T]) -> int:
        """Write what `build` makes of the next number; returns that number. Several writers get different ones."""
        while True:
            number = self._first + len(self.read())
            if self.write(number, build(number)):
                return number

    def write(self, number: int, record: T) -> bool:
        """Write a record under its number; False when there is one, which counts."""
        return self._store.put_if_absent(self._key(number), to_json(record))

    def _key(self, number: int) -> str:
        return self._layout.key(self._kind, number=number)


# -- stored fields that are not those of the value --------------------------------------------------------------------
def _write_step(step: TrainStep) -> dict[str, Any]:
    """A set of indices is written out under `index_list`; `indices` is then the smallest range around it."""
    fields: dict[str, Any] = {"step": step.step, "rewind": step.rewind}
    if isinstance(step.indices, IndexSet):
        around = IndexRange(min(step.indices.indices), max(step.indices.indices) + 1)
        fields |= {"indices": _plain(around), "index_list": list(step.indices.indices)}
    own: dict[str, Any] = _plain(step)
    return {**fields, **{name: value for name, value in own.items() if name not in fields}}


def _read_step(fields: dict[str, Any]) -> dict[str, Any]:
    listed = fields.get("index_list")
    indices = IndexRange(*fields["indices"]) if listed is None else IndexSet(tuple(listed))
    return {**_nan_for_null(fields), "indices": indices}


_SPAN_FIELDS = [field.name for field in dataclasses.fields(Span)]
_WRITE: Mapping[type, Callable[[Any], dict[str, Any]]] = {
    Evaluation: lambda made: _without(made, *([] if made.examples else ["examples"])),
    Claim: lambda claim: _without(claim, "stage", "shard", "attempt"),
    Heartbeat: lambda beat: _plain(vars(beat) | {"status": _told(beat.status)}),
    Manifest: lambda manifest: _plain(vars(manifest) | {"facts": _told(manifest.facts)}),
    Rewind: lambda rewind: {"rewind": rewind.number, **_without(rewind, "number")},
    RunState: lambda state: _without(state, "number"),
    TrainStep: _write_step,
    list: lambda spans: {"spans": [_plain(dataclasses.astuple(span)) for span in spans]},
}
_READ: Mapping[Any, Callable[[dict[str, Any]], Any]] = {
    Arrival: lambda fields: {**fields, "shard": IndexRange(*fields["shard"])},
    Evaluation: lambda fields: _nan_for_null(fields),
    TrainStep: _read_step,
    list[Span]: lambda fields: [dict(zip(_SPAN_FIELDS, row, strict=True)) for row in fields["spans"]],
}


def _told(value: WorkerStatus | Facts) -> dict[str, Any]:
    """The fields that say something."""
    return {name: field for name, field in vars(value).items() if field is not None and field not in ({}, ())}


@lru_cache(maxsize=64)
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))


def _without(value: Any, *in_key: str) -> dict[str, Any]:
    """The fields of a record but those that its key says."""
    return {name: field for name, field in _plain(value).items() if name not in in_key}


def _nan_for_null(value: Any) -> Any:
    """Undoes `_plain` in a record whose numbers are all floats."""
    if isinstance(value, dict):
        return {name: _nan_for_null(item) for name, item in value.items()}
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: string keys, lists, and no NaN or infinite number."""
    if isinstance(value, IndexRange):
        return [value.start, value.stop]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
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


def _corrupt(key: str, body: bytes, reason: str) -> ShardCorruptError:
    return ShardCorruptError(
        f"{key} is not a readable record: {reason} ({len(body)} bytes, starting {body[:40]!r}). Restore the object, or "
        f"run `asyncopd maintain quarantine {key}`, which sets it aside and says what follows."
    )
