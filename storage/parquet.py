"""Trajectories and TeacherScores to Parquet bytes and back, exactly: what is read equals what was written, bit by bit.

Arrays that `decode_*` returns are read-only views of the file's columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from asyncopd.errors import ShapeError, ShardCorruptError
from asyncopd.types import Candidates, DrawLaw, FinishReason, TeacherScores, Trajectory, VersionRun
from storage.schema import SCHEMA_VERSION, TopkPrecision, parquet_options, shard_schema

Array = NDArray[Any]


def encode_trajectories(trajectories: Sequence[Trajectory], run_id: str) -> bytes:
    """One Parquet file, rows in the given order.

    Raises:
        ShapeError: an array is not int32 or float32 as the types say.
    """
    runs = [trajectory.version_runs for trajectory in trajectories]
    candidates = [trajectory.candidates for trajectory in trajectories]
    values: dict[str, Any] = {
        "index": [t.index for t in trajectories],
        "prompt_id": [t.prompt_id for t in trajectories],
        "prompt_group": [t.group for t in trajectories],
        "prompt_ids": [t.prompt_ids for t in trajectories],
        "num_tokens": [len(t.response_ids) for t in trajectories],
        "response_ids": [t.response_ids for t in trajectories],
        "behaviour_logprobs": [t.behaviour_logprobs_T for t in trajectories],
        "version_first": [t.version_first for t in trajectories],
        "version_last": [t.version_last for t in trajectories],
        "version_run_versions": [np.array([run.version for run in row], np.int32) for row in runs],
        "version_run_lengths": [np.array([run.length for run in row], np.int32) for row in runs],
        "finish_reason": [t.finish_reason for t in trajectories],
        "correct": [t.correct for t in trajectories],
        **_candidate_values(candidates),
    }
    return _write("trajectories", values, shard_schema("trajectories", run_id))


def decode_trajectories(body: bytes, key: str) -> list[Trajectory]:
    """The trajectories of a file, in its order. `key` is for the message.

    Raises:
        ShardCorruptError: `body` is no trajectories file of this schema version.
    """
    rows = _Rows(body, key, "trajectories")
    try:
        return [_trajectory(rows, row) for row in range(rows.num_rows)]
    except (ValueError, KeyError, IndexError, TypeError, ShapeError) as exc:
        raise rows.corrupt(str(exc)) from exc


def encode_candidates(candidates: Mapping[int, Candidates], run_id: str) -> bytes:
    """One Parquet file of back-filled candidates, by trajectory index, in index order."""
    indices = sorted(candidates)
    ordered = [candidates[index] for index in indices]
    lengths = [len(row.tail_logmass_T) for row in ordered]
    values = {"index": indices, "num_tokens": lengths, **_candidate_values(ordered)}
    return _write("candidates", values, shard_schema("candidates", run_id))


def decode_candidates(body: bytes, key: str) -> dict[int, Candidates]:
    """The inverse of `encode_candidates`. `key` is for the message.

    Raises:
        ShardCorruptError: `body` is no candidates file of this schema version.
    """
    rows = _Rows(body, key, "candidates")
    try:
        return {rows.values["index"][row]: _candidates(rows, row) for row in range(rows.num_rows)}
    except (ValueError, KeyError, IndexError, TypeError, ShapeError) as exc:
        raise rows.corrupt(str(exc)) from exc


def encode_scores(scores: Sequence[TeacherScores], run_id: str, topk_precision: TopkPrecision = "float32") -> bytes:
    """One Parquet file, rows in the given order.

    Raises:
        ShapeError: an array has the wrong type, or does not have one row per response token.
    """
    for row in scores:
        _check_shapes(row)
    values: dict[str, Any] = {
        "index": [s.index for s in scores],
        "teacher": [s.teacher for s in scores],
        "teacher_digest": [s.teacher_digest for s in scores],
        "temperature": [s.temperature for s in scores],
        "num_tokens": [len(s.sampled_logprobs_T) for s in scores],
        "sampled_logprobs": [s.sampled_logprobs_T for s in scores],
        "topk_k": [s.topk_ids_TK.shape[1] for s in scores],
        "topk_ids": [s.topk_ids_TK for s in scores],
        "topk_logprobs": [s.topk_logprobs_TK for s in scores],
        "head_k": [s.head_logprobs_TK.shape[1] for s in scores],
        "head_logprobs": [s.head_logprobs_TK for s in scores],
        "num_draws": [s.draw_logprobs_TN.shape[1] for s in scores],
        "draw_logprobs": [s.draw_logprobs_TN for s in scores],
        "num_teacher_draws": [s.teacher_draw_ids_TM.shape[1] for s in scores],
        "teacher_draw_ids": [s.teacher_draw_ids_TM for s in scores],
        "teacher_draw_logprobs": [s.teacher_draw_logprobs_TM for s in scores],
    }
    return _write("scores", values, shard_schema("scores", run_id, topk_precision))


def decode_scores(body: bytes, key: str) -> list[TeacherScores]:
    """The scores of a file, in its order. `key` is for the message.

    float16 log-probs come back as float32.

    Raises:
        ShardCorruptError: `body` is no scores file of this schema version.
    """
    rows = _Rows(body, key, "scores")
    try:
        return [_scores(rows, row) for row in range(rows.num_rows)]
    except (ValueError, KeyError, IndexError, TypeError, ShapeError) as exc:
        raise rows.corrupt(str(exc)) from exc


def _trajectory(rows: _Rows, row: int) -> Trajectory:
    num_tokens: int = rows.values["num_tokens"][row]
    finish_reason: FinishReason = rows.choice("finish_reason", row, get_args(FinishReason))
    versions, lengths = rows.flat("version_run_versions", row).tolist(), rows.flat("version_run_lengths", row).tolist()
    return Trajectory(
        index=rows.values["index"][row],
        prompt_id=rows.values["prompt_id"][row],
        prompt_ids=rows.flat("prompt_ids", row),
        response_ids=rows.flat("response_ids", row).reshape(num_tokens),
        behaviour_logprobs_T=rows.flat("behaviour_logprobs", row),
        version_runs=tuple(VersionRun(*run) for run in zip(versions, lengths, strict=True)),
        finish_reason=finish_reason,
        candidates=_candidates(rows, row),
        group=rows.values["prompt_group"][row],
        correct=rows.values["correct"][row],
    )


def _candidate_values(candidates: Sequence[Candidates]) -> dict[str, Any]:
    return {
        "head_k": [c.head_ids_TK.shape[1] for c in candidates],
        "head_ids": [c.head_ids_TK for c in candidates],
        "head_logprobs": [c.head_logprobs_TK for c in candidates],
        "tail_logmass": [c.tail_logmass_T for c in candidates],
        "num_draws": [c.draw_ids_TN.shape[1] for c in candidates],
        "draw_ids": [c.draw_ids_TN for c in candidates],
        "draw_logprobs": [c.draw_logprobs_TN for c in candidates],
        "draw_law": [c.law for c in candidates],
    }


def _candidates(rows: _Rows, row: int) -> Candidates:
    num_tokens: int = rows.values["num_tokens"][row]
    law: DrawLaw = rows.choice("draw_law", row, get_args(DrawLaw))
    head_TK = (num_tokens, rows.values["head_k"][row])
    draws_TN = (num_tokens, rows.values["num_draws"][row])
    return Candidates(
        head_ids_TK=rows.flat("head_ids", row).reshape(head_TK),
        head_logprobs_TK=rows.flat("head_logprobs", row).reshape(head_TK),
        tail_logmass_T=rows.flat("tail_logmass", row),
        draw_ids_TN=rows.flat("draw_ids", row).reshape(draws_TN),
        draw_logprobs_TN=rows.flat("draw_logprobs", row).reshape(draws_TN),
        law=law,
    )


def _scores(rows: _Rows, row: int) -> TeacherScores:
    num_tokens: int = rows.values["num_tokens"][row]
    topk_TK = (num_tokens, rows.values["topk_k"][row])
    teacher_draws_TM = (num_tokens, rows.values["num_teacher_draws"][row])
    return TeacherScores(
        index=rows.values["index"][row],
        teacher=rows.values["teacher"][row],
        teacher_digest=rows.values["teacher_digest"][row],
        temperature=rows.values["temperature"][row],
        sampled_logprobs_T=rows.flat("sampled_logprobs", row).reshape(num_tokens),
        topk_ids_TK=rows.flat("topk_ids", row).reshape(topk_TK),
        topk_logprobs_TK=rows.flat("topk_logprobs", row).reshape(topk_TK),
        head_logprobs_TK=rows.flat("head_logprobs", row).reshape(num_tokens, rows.values["head_k"][row]),
        draw_logprobs_TN=rows.flat("draw_logprobs", row).reshape(num_tokens, rows.values["num_draws"][row]),
        teacher_draw_ids_TM=rows.flat("teacher_draw_ids", row).reshape(teacher_draws_TM),
        teacher_draw_logprobs_TM=rows.flat("teacher_draw_logprobs", row).reshape(teacher_draws_TM),
    )


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
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_list(column.type):
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

    def choice(self, name: str, row: int, allowed: Sequence[str]) -> Any:
        value = self.values[name][row]
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {list(allowed)}")
        return value

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


def _check_shapes(scores: TeacherScores) -> None:
    num_tokens = len(scores.sampled_logprobs_T)
    for name, array, expected in (
        ("sampled_logprobs_T", scores.sampled_logprobs_T, (num_tokens,)),
        ("topk_logprobs_TK", scores.topk_logprobs_TK, scores.topk_ids_TK.shape),
        ("teacher_draw_logprobs_TM", scores.teacher_draw_logprobs_TM, scores.teacher_draw_ids_TM.shape),
        ("head_logprobs_TK", scores.head_logprobs_TK, (num_tokens, *scores.head_logprobs_TK.shape[1:2])),
        ("draw_logprobs_TN", scores.draw_logprobs_TN, (num_tokens, *scores.draw_logprobs_TN.shape[1:2])),
    ):
        is_flat = name == "sampled_logprobs_T"
        if array.shape != expected or len(array) != num_tokens or (array.ndim == 2) == is_flat:
            raise ShapeError(
                f"index {scores.index}: scores.{name} is {array.shape}, expected {expected} with one row for each of "
                f"{num_tokens} response tokens."
            )
