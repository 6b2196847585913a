"""Trajectories and TeacherScores to Parquet bytes and back, exactly: what is read equals what was written, bit by bit.

A column is called as the field that it holds, without the field's shape suffix: `head_ids` holds `head_ids_TK`.
Arrays that `decode_*` returns are read-only views of the file's columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from asyncopd.errors import ShapeError, ShardCorruptError
from asyncopd.types import Candidates, DrawLaw, FinishReason, TeacherScores, Trajectory, VersionRun
from storage.schema import SCHEMA_VERSION, TopkPrecision, parquet_options, shard_schema

Array = NDArray[Any]
T = TypeVar("T")

_OTHER_NAMES = {"group": "prompt_group", "law": "draw_law"}
_WIDTHS = {"topk": "topk_k", "head": "head_k", "draw": "num_draws", "teacher_draw": "num_teacher_draws"}
"""Start of a matrix column's name -> the column with its second dimension, row by row."""
_CHOICES = {"finish_reason": get_args(FinishReason), "draw_law": get_args(DrawLaw)}


def encode_trajectories(trajectories: Sequence[Trajectory], run_id: str) -> bytes:
    """One Parquet file, rows in the given order.

    Raises:
        ShapeError: an array is not int32 or float32 as the types say.
    """
    runs = [trajectory.version_runs for trajectory in trajectories]
    values = {
        **_values(trajectories, Trajectory),
        **_values([trajectory.candidates for trajectory in trajectories], Candidates),
        "num_tokens": [len(trajectory.response_ids) for trajectory in trajectories],
        "version_first": [trajectory.version_first for trajectory in trajectories],
        "version_last": [trajectory.version_last for trajectory in trajectories],
        "version_run_versions": [np.array([run.version for run in row], np.int32) for row in runs],
        "version_run_lengths": [np.array([run.length for run in row], np.int32) for row in runs],
    }
    return _write("trajectories", values, shard_schema("trajectories", run_id))


def decode_trajectories(body: bytes, key: str) -> list[Trajectory]:
    """The trajectories of a file, in its order. `key` is for the message.

    Raises:
        ShardCorruptError: `body` is no trajectories file of this schema version.
    """

    def trajectory(rows: _Rows, row: int) -> Trajectory:
        versions, lengths = rows.flat("version_run_versions", row), rows.flat("version_run_lengths", row)
        runs = tuple(VersionRun(*run) for run in zip(versions.tolist(), lengths.tolist(), strict=True))
        candidates = Candidates(**rows.fields(Candidates, row))
        return Trajectory(**rows.fields(Trajectory, row), version_runs=runs, candidates=candidates)

    return _decoded(body, key, "trajectories", trajectory)


def encode_candidates(candidates: Mapping[int, Candidates], run_id: str) -> bytes:
    """One Parquet file of back-filled candidates, by trajectory index, in index order."""
    indices = sorted(candidates)
    ordered = [candidates[index] for index in indices]
    lengths = [len(row.tail_logmass_T) for row in ordered]
    values = {"index": indices, "num_tokens": lengths, **_values(ordered, Candidates)}
    return _write("candidates", values, shard_schema("candidates", run_id))


def decode_candidates(body: bytes, key: str) -> dict[int, Candidates]:
    """The inverse of `encode_candidates`. `key` is for the message.

    Raises:
        ShardCorruptError: `body` is no candidates file of this schema version.
    """

    def of_index(rows: _Rows, row: int) -> tuple[int, Candidates]:
        return rows.values["index"][row], Candidates(**rows.fields(Candidates, row))

    return dict(_decoded(body, key, "candidates", of_index))


def encode_scores(scores: Sequence[TeacherScores], run_id: str, topk_precision: TopkPrecision = "float32") -> bytes:
    """One Parquet file, rows in the given order.

    Raises:
        ShapeError: an array has the wrong type, or does not have one row per response token.
    """
    for row in scores:
        _check_shapes(row)
    values = {**_values(scores, TeacherScores), "num_tokens": [len(row.sampled_logprobs_T) for row in scores]}
    return _write("scores", values, shard_schema("scores", run_id, topk_precision))


def decode_scores(body: bytes, key: str) -> list[TeacherScores]:
    """The scores of a file, in its order. `key` is for the message.

    float16 log-probs come back as float32.

    Raises:
        ShardCorruptError: `body` is no scores file of this schema version.
    """
    return _decoded(body, key, "scores", lambda rows, row: TeacherScores(**rows.fields(TeacherScores, row)))


# -- fields and columns -----------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of a value that is a column of its file."""

    name: str
    column: str
    num_dims: int
    """1 and 2: an array with one row per response token. 0: any other value."""
    width: str
    """Column with the second dimension; empty when there is none."""


@lru_cache(maxsize=8)
def _schema_of(kind: str) -> Any:
    return shard_schema(kind, run_id="")


@lru_cache(maxsize=8)
def _fields(kind: type) -> list[_Field]:
    found = []
    for name in (field.name for field in dataclasses.fields(kind)):
        if name not in ("version_runs", "candidates"):
            column, _, dims = name.rpartition("_") if name[-1].isupper() else (name, "", "")
            width = _WIDTHS[column.rpartition("_")[0]] if len(dims) == 2 else ""
            found.append(_Field(name, _OTHER_NAMES.get(column, column), len(dims), width))
    return found


def _values(rows: Sequence[Any], kind: type) -> dict[str, list[Any]]:
    """The columns of what `rows` hold, and of their widths."""
    values = {}
    for field in _fields(kind):
        values[field.column] = [getattr(row, field.name) for row in rows]
        if field.width:
            values[field.width] = [array.shape[1] for array in values[field.column]]
    return values


def _check_shapes(scores: TeacherScores) -> None:
    num_tokens = len(scores.sampled_logprobs_T)
    widths: dict[str, int] = {}
    for field in _fields(TeacherScores):
        if not field.num_dims:
            continue
        shape = getattr(scores, field.name).shape
        expected = (num_tokens, widths.setdefault(field.width, shape[-1]))[: field.num_dims]
        if shape != expected:
            raise ShapeError(
                f"index {scores.index}: scores.{field.name} is {shape}, expected {expected} with one row for each of "
                f"{num_tokens} response tokens."
            )


# -- files ------------------------------------------------------------------------------------------------------------
def _decoded(body: bytes, key: str, kind: str, build: Callable[[_Rows, int], T]) -> list[T]:
    rows = _Rows(body, key, kind)
    try:
        return [build(rows, row) for row in range(rows.num_rows)]
    except (ValueError, KeyError, IndexError, TypeError, ShapeError) as exc:
        raise rows.corrupt(str(exc)) from exc


class _Rows:
    """The columns of one file: numbers and strings as Python lists, list columns as one array with offsets."""

    def __init__(self, body: bytes, key: str, kind: str) -> None:
        self._key, self._kind = key, kind
        try:
            table = pq.ParquetFile(pa.BufferReader(body)).read(use_threads=False)
            metadata = table.schema.metadata or {}
            found = (metadata.get(b"kind", b"?").decode(), metadata.get(b"schema_version", b"?").decode())
            if found != (kind, str(SCHEMA_VERSION)):
                raise self.corrupt(f"it holds {found[0]} of schema version {found[1]}")
            self._unpack(table)
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError) as exc:
            raise self.corrupt(str(exc)) from exc

    def _unpack(self, table: Any) -> None:
        self.num_rows: int = table.num_rows
        self.values: dict[str, list[Any]] = {}
        self._flat: dict[str, tuple[list[int], Array]] = {}
        expected = _schema_of(self._kind)
        for name, column in zip(table.column_names, table.columns, strict=True):
            is_list = pa.types.is_list(column.type)
            if name in expected.names and is_list != pa.types.is_list(expected.field(name).type):
                raise ValueError(f"column {name} is {column.type}, expected {expected.field(name).type}")
            if is_list:
                array = column.combine_chunks()
                numbers = array.values.to_numpy()
                if numbers.dtype == np.float16:
                    numbers = numbers.astype(np.float32)
                self._flat[name] = array.offsets.to_numpy().tolist(), numbers
            else:
                self.values[name] = column.to_pylist()

    def flat(self, name: str, row: int) -> Array:
        offsets, numbers = self._flat[name]
        return numbers[offsets[row] : offsets[row + 1]]

    def fields(self, kind: type, row: int) -> dict[str, Any]:
        """The fields of one row's value that are columns, by name."""
        num_tokens, found = self.values["num_tokens"][row], {}
        for field in _fields(kind):
            if field.column in self._flat:
                array = self.flat(field.column, row)
                shape = (num_tokens, self.values[field.width][row]) if field.width else (num_tokens,)
                found[field.name] = array.reshape(shape) if field.num_dims else array
            else:
                value = found[field.name] = self.values[field.column][row]
                if value not in (allowed := _CHOICES.get(field.column, (value,))):
                    raise ValueError(f"{field.column} is {value!r}, expected one of {list(allowed)}")
        return found

    def corrupt(self, reason: str) -> ShardCorruptError:
        return ShardCorruptError(
            f"{self._key} is not a {self._kind} file of schema version {SCHEMA_VERSION}: {reason}. Read it with the "
            "code version that wrote it (run.json names it), or restore the object."
        )


def _write(kind: str, values: dict[str, Any], schema: Any) -> bytes:
    arrays = [
        _list_array(field, values[field.name])
        if pa.types.is_list(field.type)
        else pa.array(values[field.name], field.type)
        for field in schema
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, **parquet_options(kind))
    return bytes(sink.getvalue().to_pybytes())


def _list_array(field: Any, rows: Sequence[Array]) -> Any:
    """The rows of one list column, each flattened row-major, without a Python object per number."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([row.size for row in rows], out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ShapeError(f"column {field.name} would hold {offsets[-1]} numbers, at most 2^31. Use smaller shards.")
    value_type = field.type.value_type
    expected = np.dtype(np.int32 if pa.types.is_integer(value_type) else np.float32)
    flat = np.concatenate([row.reshape(-1) for row in rows]) if rows else np.zeros(0, expected)
    if flat.dtype != expected:
        raise ShapeError(f"column {field.name} was given {flat.dtype}, expected {expected}; convert with .astype.")
    values = pa.array(flat.astype(np.float16) if pa.types.is_float16(value_type) else flat, value_type)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, type=field.type)
