"""Shards come back from Parquet as they went in, bit by bit, and say what they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from storage_builders import assert_same, make_scores, make_trajectory

from asyncopd.errors import ShapeError, ShardCorruptError
from asyncopd.types import Candidates, TeacherScores, Trajectory, VersionRun
from storage.parquet import (
    COLUMNS,
    decode_scores,
    decode_trajectories,
    encode_scores,
    encode_trajectories,
    shard_schema,
)

IDS = st.integers(0, 2**31 - 1)
LOGPROBS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def _ids(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int32, shape, elements=IDS)


def _logprobs(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=LOGPROBS)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    num_tokens = draw(st.integers(1, 7))
    head_k, num_draws = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    cut = draw(st.integers(0, num_tokens - 1))
    runs = [VersionRun(draw(st.integers(0, 99)), length) for length in (cut, num_tokens - cut) if length]
    return Trajectory(
        index=draw(st.integers(0, 2**40)),
        prompt_id=draw(st.text(max_size=9)),
        prompt_ids=draw(_ids(draw(st.integers(1, 5)))),
        response_ids=draw(_ids(num_tokens)),
        behaviour_logprobs_T=draw(_logprobs(num_tokens)),
        version_runs=tuple(runs),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        candidates=Candidates(
            head_ids_TK=draw(_ids(num_tokens, head_k)),
            head_logprobs_TK=draw(_logprobs(num_tokens, head_k)),
            tail_logmass_T=draw(_logprobs(num_tokens)),
            draw_ids_TN=draw(_ids(num_tokens, num_draws)),
            draw_logprobs_TN=draw(_logprobs(num_tokens, num_draws)),
            law=draw(st.sampled_from(["policy", "tail"])),
        ),
        group=draw(st.text(max_size=4)),
        correct=draw(st.sampled_from([None, True, False])),
    )


@st.composite
def teacher_scores(draw: st.DrawFn) -> TeacherScores:
    num_tokens = draw(st.integers(1, 7))
    top_k, head_k, num_draws, num_teacher_draws = (draw(st.integers(0, 3)) for _ in range(4))
    return TeacherScores(
        index=draw(st.integers(0, 2**40)),
        teacher=draw(st.text(min_size=1, max_size=9)),
        teacher_digest=draw(st.text(max_size=9)),
        temperature=draw(st.floats(0.1, 9)),
        sampled_logprobs_T=draw(_logprobs(num_tokens)),
        topk_ids_TK=draw(_ids(num_tokens, top_k)),
        topk_logprobs_TK=draw(_logprobs(num_tokens, top_k)),
        head_logprobs_TK=draw(_logprobs(num_tokens, head_k)),
        draw_logprobs_TN=draw(_logprobs(num_tokens, num_draws)),
        teacher_draw_ids_TM=draw(_ids(num_tokens, num_teacher_draws)),
        teacher_draw_logprobs_TM=draw(_logprobs(num_tokens, num_teacher_draws)),
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(trajectories(), max_size=4))
def test_trajectories_come_back_bit_by_bit(rows: list[Trajectory]) -> None:
    assert_same(decode_trajectories(encode_trajectories(rows, "run"), "key"), rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(teacher_scores(), max_size=4))
def test_scores_come_back_bit_by_bit(rows: list[TeacherScores]) -> None:
    assert_same(decode_scores(encode_scores(rows, "run"), "key"), rows)


def test_special_floats_keep_their_bits() -> None:
    payload_nan = np.array([0x7FC12345, 0xFF812345, 0x80000000, 0x7F800000, 1], np.uint32).view(np.float32)
    row = dataclasses.replace(make_trajectory(num_tokens=5), behaviour_logprobs_T=payload_nan)
    (found,) = decode_trajectories(encode_trajectories([row], "run"), "key")
    assert found.behaviour_logprobs_T.tobytes() == payload_nan.tobytes()


def test_one_shard_may_mix_widths() -> None:
    rows = [make_trajectory(0, head_k=0, num_draws=4), make_trajectory(1, head_k=5, num_draws=0)]
    assert_same(decode_trajectories(encode_trajectories(rows, "run"), "key"), rows)


def test_what_is_read_cannot_be_changed() -> None:
    (found,) = decode_trajectories(encode_trajectories([make_trajectory()], "run"), "key")
    with pytest.raises(ValueError, match="read-only"):
        found.response_ids[0] = 1


def test_half_precision_rounds_the_top_k_only() -> None:
    row = make_scores(make_trajectory())
    (found,) = decode_scores(encode_scores([row], "run", "float16"), "key")
    assert found.topk_logprobs_TK.dtype == np.float32
    np.testing.assert_array_equal(found.topk_logprobs_TK, row.topk_logprobs_TK.astype(np.float16).astype(np.float32))
    assert_same([dataclasses.replace(found, topk_logprobs_TK=row.topk_logprobs_TK)], [row])


def test_an_array_of_another_type_is_refused() -> None:
    row = dataclasses.replace(make_trajectory(), response_ids=np.arange(3))
    with pytest.raises(ShapeError, match="response_ids was given int64, expected int32"):
        encode_trajectories([row], "run")


def test_scores_without_a_row_per_token_are_refused() -> None:
    row = make_scores(make_trajectory(7))
    for name in ("topk_logprobs_TK", "head_logprobs_TK", "draw_logprobs_TN", "teacher_draw_logprobs_TM"):
        short = dataclasses.replace(row, **{name: getattr(row, name)[:-1]})
        with pytest.raises(ShapeError, match=rf"index 7: scores.{name} is"):
            encode_scores([short], "run")
    with pytest.raises(ShapeError, match="head_logprobs_TK"):
        encode_scores([dataclasses.replace(row, head_logprobs_TK=np.zeros(3, np.float32))], "run")


@pytest.mark.parametrize("kind", ["trajectories", "scores"])
def test_a_file_documents_itself(kind: str) -> None:
    rows = [make_trajectory()]
    body = encode_trajectories(rows, "run") if kind == "trajectories" else encode_scores([make_scores(rows[0])], "run")
    file = pq.ParquetFile(pa.BufferReader(body))
    assert file.schema_arrow.equals(shard_schema(kind, "run"), check_metadata=True)
    assert file.schema_arrow.metadata == {b"schema_version": b"1", b"kind": kind.encode(), b"run_id": b"run"}
    assert all(field.metadata[b"doc"] for field in file.schema_arrow)
    group = file.metadata.row_group(0)
    for column, number in zip(COLUMNS[kind], range(group.num_columns), strict=True):
        chunk = group.column(number)
        assert chunk.path_in_schema == column.parquet_path
        assert chunk.compression == "ZSTD"
        assert ("RLE_DICTIONARY" in chunk.encodings) == column.is_label
        assert ("BYTE_STREAM_SPLIT" in chunk.encodings) == column.is_list


def test_the_manual_describes_every_column() -> None:
    manual = (Path(__file__).parent.parent / "docs" / "storage.md").read_text()
    for column in (*COLUMNS["trajectories"], *COLUMNS["scores"]):
        kind = f"list<{column.type.value_type}>" if column.is_list else str(column.type)
        assert f"| `{column.name}` | {kind} | {column.doc} |" in manual, column.name


def test_files_of_another_kind_or_version_are_refused() -> None:
    scores = encode_scores([make_scores(make_trajectory())], "run")
    with pytest.raises(ShardCorruptError, match=r"key is not a trajectories file.*holds scores of schema version 1"):
        decode_trajectories(scores, "key")
    with pytest.raises(ShardCorruptError, match="key is not a scores file"):
        decode_scores(b"PAR1 but not really", "key")
    table = pq.read_table(pa.BufferReader(scores))
    newer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"schema_version": b"2"}), newer)
    with pytest.raises(ShardCorruptError, match=r"schema version 2.*Read it with the code version that wrote it"):
        decode_scores(newer.getvalue().to_pybytes(), "key")
