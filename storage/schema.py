"""The Parquet schemas of shards, column by column. One row per trajectory; lists are flat with their width beside them.

A list of T·K numbers is row-major: entry t·K + k speaks of response token t. Widths (`head_k`, ...) are per row.
Raise SCHEMA_VERSION with every change that an older reader would misread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 1
TopkPrecision = Literal["float32", "float16"]
"""Of stored teacher top-k log-probs. float16 saves a third of a top-16 shard and costs 1.2e-4 nats of KL on average."""


@dataclass(frozen=True)
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
_HALF_LOGPROBS = _numbers(pa.float16())

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

TRAJECTORY_COLUMNS = (
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

SCORE_COLUMNS = (
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

CANDIDATE_COLUMNS = (_INDEX, _NUM_TOKENS, *_OF_CANDIDATES)
"""Of back-filled candidates: the columns that replace the trajectory's own."""


def columns(kind: str) -> tuple[Column, ...]:
    """The columns of `trajectories`, `scores` or `candidates`."""
    return {"trajectories": TRAJECTORY_COLUMNS, "scores": SCORE_COLUMNS, "candidates": CANDIDATE_COLUMNS}[kind]


@lru_cache(maxsize=64)
def shard_schema(kind: str, run_id: str, topk_precision: TopkPrecision = "float32") -> Any:
    """The Arrow schema of the files of one kind of one run, with file and field metadata."""
    fields = []
    for column in columns(kind):
        halved = column.name == "topk_logprobs" and topk_precision == "float16"
        value_type = _HALF_LOGPROBS if halved else column.type
        fields.append(pa.field(column.name, value_type, nullable=column.nullable, metadata={"doc": column.doc}))
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION), "kind": kind, "run_id": run_id})


@lru_cache(maxsize=8)
def parquet_options(kind: str) -> dict[str, Any]:
    """Keyword arguments of `pyarrow.parquet.write_table`, the same for every file of one kind (docs/storage.md)."""
    return {
        # Queries read single columns of single row groups, so they cannot check an object's sha256.
        "write_page_checksum": True,
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [column.parquet_path for column in columns(kind) if column.is_label],
        "column_encoding": {column.parquet_path: "BYTE_STREAM_SPLIT" for column in columns(kind) if column.is_list},
        "write_statistics": [column.parquet_path for column in columns(kind) if not column.is_list],
    }
