"""Trajectories and TeacherScores to Parquet bytes and back, exactly: what is read equals what was written, bit by bit.

One row per trajectory; lists are flat with their width (`head_k`, ...) beside them. A list of T·K numbers is row-major:
entry t·K + k speaks of response token t. A column is called as the field that it holds, without the field's shape
suffix: `head_ids` holds `head_ids_TK`. Arrays that `decode_*` returns are read-only views of the file's columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from asyncopd.errors import ShapeError, ShardCorruptError
from asyncopd.types import Candidates, DrawLaw, FinishReason, TeacherScores, Trajectory, VersionRun

Array = NDArray[Any]
T = TypeVar("T")

SCHEMA_VERSION = 1
"""Raise it with every change that an older reader would misread."""
TopkPrecision = Literal["float32", "float16"]
"""Of stored teacher top-k log-probs. float16 saves a third of a top-16 shard and costs 1.2e-4 nats of KL on average."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its Arrow type, what it holds, and how Parquet encodes it."""

    name: str
    type: Any
    doc: str
    """Meaning, unit and shape; written into the file as field metadata `doc`."""
    is_label: bool = False
    """Few distinct values: dictionary-encoded, which would slow numbers down and enlarge them."""
    nullable: bool = False

    @property
    def is_list(self) -> bool:
        return bool(pa.types.is_list(self.type))

    @property
    def parquet_path(self) -> str:
        return f"{self.name}.list.element" if self.is_list else self.name


def _numbers(value_type: Any) -> Any:
    return pa.list_(pa.field("element", value_type, nullable=False))


_IDS = _numbers(pa.int32())
_LOGPROBS = _numbers(pa.float32())

_INDEX = Column("index", pa.int64(), "Trajectory index in the run; rows are in index order.")
_NUM_TOKENS = Column("num_tokens", pa.int32(), "T, response tokens, EOS included.")
_OF_CANDIDATES = (
    Column("head_k", pa.int32(), "K, ids in the head per token; 0 for none."),
    Column("head_ids", _IDS, "[T·K] the sampling student's most likely ids, most likely first."),
    Column("head_logprobs", _LOGPROBS, "[T·K] log p_old at head_ids, nats."),
    Column("tail_logmass", _LOGPROBS, "[T] log of p_old's mass outside the head, nats."),
    Column("num_draws", pa.int32(), "N, draws per token; 0 for none."),
    Column("draw_ids", _IDS, "[T·N] ids drawn i.i.d. from draw_law."),
    Column("draw_logprobs", _LOGPROBS, "[T·N] log p_old at draw_ids, nats."),
    Column("draw_law", pa.string(), "`policy` (p_old) or `tail` (p_old outside the head).", is_label=True),
)

_OF_TRAJECTORIES = (
    _INDEX,
    Column("prompt_id", pa.string(), "Stable id of the question; may repeat at other indices."),
    Column("prompt_group", pa.string(), "The prompt's label for reports; may be empty.", is_label=True),
    Column("prompt_ids", _IDS, "[P] token ids of the prompt."),
    _NUM_TOKENS,
    Column("response_ids", _IDS, "[T] token ids of the response."),
    Column("behaviour_logprobs", _LOGPROBS, "[T] log p_old of each response token, nats, of the law sampled from."),
    Column("version_first", pa.int32(), "Policy version that produced the first response token."),
    Column("version_last", pa.int32(), "Policy version that produced the last response token."),
    Column("version_run_versions", _IDS, "[R] policy version of each run of consecutive tokens."),
    Column("version_run_lengths", _IDS, "[R] tokens in each run; they add up to T."),
    Column("finish_reason", pa.string(), "`stop` (EOS) or `length` (token limit).", is_label=True),
    Column("correct", pa.bool_(), "The verifier's answer; null where the task has no verifier.", nullable=True),
    *_OF_CANDIDATES,
)

_OF_SCORES = (
    _INDEX,
    Column("teacher", pa.string(), "The teacher's name.", is_label=True),
    Column("teacher_digest", pa.string(), "Hash of everything that decides the numbers.", is_label=True),
    Column("temperature", pa.float64(), "Softmax temperature of every log-prob in the row."),
    _NUM_TOKENS,
    Column("sampled_logprobs", _LOGPROBS, "[T] log q of each response token, nats."),
    Column("topk_k", pa.int32(), "K, teacher top-k ids per token; 0 for none."),
    Column("topk_ids", _IDS, "[T·K] the teacher's most likely ids, descending."),
    Column("topk_logprobs", _LOGPROBS, "[T·K] log q at topk_ids, nats; float32, or float16 where the run chose it."),
    Column("head_k", pa.int32(), "K', head ids per token of the trajectory; 0 for none."),
    Column("head_logprobs", _LOGPROBS, "[T·K'] log q at the trajectory's head_ids, nats."),
    Column("num_draws", pa.int32(), "N, draws per token of the trajectory; 0 for none."),
    Column("draw_logprobs", _LOGPROBS, "[T·N] log q at the trajectory's draw_ids, nats."),
    Column("num_teacher_draws", pa.int32(), "M, ids per token drawn from the teacher; 0 for none."),
    Column("teacher_draw_ids", _IDS, "[T·M] ids drawn i.i.d. from q."),
    Column("teacher_draw_logprobs", _LOGPROBS, "[T·M] log q at teacher_draw_ids, nats."),
)

COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "trajectories": _OF_TRAJECTORIES,
    "scores": _OF_SCORES,
    "candidates": (_INDEX, _NUM_TOKENS, *_OF_CANDIDATES),  # back-filled: what replaces the trajectory's own
}
"""Kind of file -> its columns."""


@lru_cache(maxsize=64)
def shard_schema(kind: str, run_id: str, topk_precision: TopkPrecision = "float32") -> Any:
    """The Arrow schema of the files of one kind of one run, with file and field metadata."""
    fields = []
    for column in COLUMNS[kind]:
        halved = column.name == "topk_logprobs" and topk_precision == "float16"
        value_type = _numbers(pa.float16()) if halved else column.type
        fields.append(pa.field(column.name, value_type, nullable=column.nullable, metadata={"doc": column.doc}))
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION), "kind": kind, "run_id": run_id})


# -- values to files and back ---------------------------------------------------------------------------------------
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
    return _write("trajectories", values, run_id)


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
    indices, ordered = sorted(candidates), [candidates[index] for index in sorted(candidates)]
    lengths = [len(row.tail_logmass_T) for row in ordered]
    return _write("candidates", {"index": indices, "num_tokens": lengths, **_values(ordered, Candidates)}, run_id)


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
    return _write("scores", values, run_id, topk_precision)


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
        expected = shard_schema(self._kind, run_id="")
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


def _write(kind: str, values: dict[str, Any], run_id: str, topk_precision: TopkPrecision = "float32") -> bytes:
    schema, columns, sink = shard_schema(kind, run_id, topk_precision), COLUMNS[kind], pa.BufferOutputStream()
    arrays = [
        _list_array(field, values[field.name])
        if pa.types.is_list(field.type)
        else pa.array(values[field.name], field.type)
        for field in schema
    ]
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema),
        sink,
        # Queries read single columns of single row groups, so they cannot check an object's sha256.
        write_page_checksum=True,
        compression="zstd",
        compression_level=1,
        use_dictionary=[column.parquet_path for column in columns if column.is_label],
        column_encoding={column.parquet_path: "BYTE_STREAM_SPLIT" for column in columns if column.is_list},
        write_statistics=[column.parquet_path for column in columns if not column.is_list],
    )
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
