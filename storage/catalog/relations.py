"""Every relation a query can name: its meaning, its documented columns, and where its rows come from.

    records    runs, policies, steps, evals, claims, shards, ...    Arrow tables built from JSON objects and manifests
    rows       trajectory_rows, score_rows                          Arrow datasets over the Parquet shards
    derived    trajectories, scores, tokens, candidates, ...        views over the two: views/*.sql

List columns are expanded side by side: several `unnest` in one SELECT go through their lists together, and a shorter
list (or NULL) is filled up with NULL. A flat list of T·K numbers has entry i at position i // K and rank i % K. Times
are TIMESTAMP WITH TIME ZONE in UTC; indices and positions count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pyarrow as pa

from storage.parquet import COLUMNS


@dataclass(frozen=True)
class Field:
    """One column of a relation."""

    name: str
    doc: str
    """Meaning, unit and shape; the column's comment in DuckDB."""
    type: Any = None
    """Arrow type of a record's or row's column; None in derived relations, whose types follow from their view."""


@dataclass(frozen=True)
class Relation:
    """Something a query can select from."""

    name: str
    doc: str
    fields: tuple[Field, ...]
    view: str = ""
    """SELECT of a derived relation, with the header of its file; empty for records and rows."""
    reads: tuple[str, ...] = ()
    """Relations named in `view`."""

    @property
    def schema(self) -> Any:
        """Arrow schema of records and rows; every column may be null, for files of older schemas."""
        return pa.schema([pa.field(field.name, field.type) for field in self.fields])


_TEXT, _BIG, _INT, _REAL = pa.string(), pa.int64(), pa.int32(), pa.float64()
_TIME = pa.timestamp("us", tz="UTC")

_RUN = Field("run", "Run id.", _TEXT)
_SHARD = Field("shard", "Name of the shard the row is stored in: first and last index, both inclusive.", _TEXT)
_START = Field("index_start", "First index.", _BIG)
_STOP = Field("index_stop", "One beyond the last index.", _BIG)
_WORKER = Field("worker", "Name of the process that did it.", _TEXT)


def _rows(kind: str, *labels: Field) -> tuple[Field, ...]:
    return (_RUN, _SHARD, *labels, *(Field(column.name, column.doc, column.type) for column in COLUMNS[kind]))


_STEPS = (
    _RUN,
    Field("step", "Optimizer step, from 0. It starts from policy version `step`.", _BIG),
    Field("rewind", "How often the learner had gone back to a checkpoint before; 0 in an undisturbed run.", _INT),
    Field("version", "Policy version published after the step.", _BIG),
    Field("index_start", "Lowest trajectory index of the step.", _BIG),
    Field("index_stop", "One beyond its highest index.", _BIG),
    Field("indices", "The indices it decided about, ascending; in index order all of the range.", pa.list_(_BIG)),
    Field("num_tokens", "Response tokens trained.", _BIG),
    Field("num_dropped", "Indices of the step that were not trained (relation `dropped` says why).", _BIG),
    Field("finished", "When the step was recorded.", _TIME),
    Field(
        "metrics",
        "Name -> value; docs/metrics.md has meaning and unit. metrics['train/kl_nats'] is one.",
        pa.map_(_TEXT, _REAL),
    ),
    Field("staleness_tokens", "Staleness in versions -> trained tokens that had it.", pa.map_(_INT, _BIG)),
)

RECORDS = (
    Relation(
        "runs",
        "One row per run.",
        (
            _RUN,
            Field("created", "When the run was created.", _TIME),
            Field("name", "The configuration's name.", _TEXT),
            Field("task", "Kind of task: walk or text.", _TEXT),
            Field("teacher", "Name of the run's own teacher, whose scores `tokens` shows.", _TEXT),
            Field("loss", "Estimator the learner minimises.", _TEXT),
            Field("seed", "Seed of prompts and sampling.", _BIG),
            Field("batch_size", "B, trajectory indices per optimizer step.", _BIG),
            Field("shard_size", "Consecutive indices per shard.", _BIG),
            Field("max_staleness", "τ, oldest admissible weights, versions.", _BIG),
            Field("num_steps", "Planned optimizer steps.", _BIG),
            Field("config_hash", "Digest of the configuration.", _TEXT),
            Field("code_version", "Version of the code that created the run.", _TEXT),
            Field("parent", "Run it was derived from; empty for none.", _TEXT),
            Field("config", "The whole configuration as JSON: config->>'$.learner.lr'.", _TEXT),
        ),
    ),
    Relation(
        "policies",
        "One row per policy version of the surviving lineage.",
        (
            _RUN,
            Field("version", "Learner steps behind the weights; 0 is the initial student.", _BIG),
            Field("rewind", "How often the learner had gone back to a checkpoint before.", _INT),
            Field("created", "When the version was published.", _TIME),
            _WORKER,
            Field("size_bytes", "Size of the weights, bytes.", _BIG),
            Field("sha256", "Digest of the weights.", _TEXT),
        ),
    ),
    Relation("steps", "One row per optimizer step of the surviving lineage.", _STEPS),
    Relation("superseded_steps", "Steps that no longer count, because the learner went back before them.", _STEPS),
    Relation(
        "evals",
        "One row per evaluated policy version of the surviving lineage.",
        (
            _RUN,
            Field("version", "Policy version evaluated.", _BIG),
            Field("rewind", "Rewind it was published under.", _INT),
            Field("num_prompts", "Held-out prompts asked.", _BIG),
            Field("accuracy", "Fraction of responses the verifier accepts; null without a verifier.", _REAL),
            Field("accuracy_by_group", "Prompt group -> accuracy, fraction.", pa.map_(_TEXT, _REAL)),
            Field("kl_nats", "KL(p‖q) student to teacher on the student's own responses, nats per token.", _REAL),
            Field("kl_standard_error_nats", "Standard error of kl_nats, nats.", _REAL),
            Field("mean_response_tokens", "Mean response length, tokens, EOS included.", _REAL),
            Field("finished", "When the evaluation was done.", _TIME),
        ),
    ),
    Relation(
        "claims",
        "One row per claim of a shard; a second attempt means that the first holder died.",
        (
            _RUN,
            Field("stage", "`rollout` or `score-<teacher>`.", _TEXT),
            _SHARD,
            _START,
            _STOP,
            Field("attempt", "1 for the first claim of the shard; one more each time it was taken over.", _INT),
            _WORKER,
            Field("claimed", "When; null where a power cut lost the record.", _TIME),
        ),
    ),
    Relation(
        "shards",
        "One row per complete shard of trajectories or scores.",
        (
            _RUN,
            Field("stage", "`rollout` or `score`.", _TEXT),
            Field("teacher", "Whose scores; empty for trajectories.", _TEXT),
            _SHARD,
            _START,
            _STOP,
            Field("num_rows", "Trajectories in it; dropped indices have none.", _BIG),
            Field("num_tokens", "Response tokens in it.", _BIG),
            Field("num_dropped", "Indices without a row.", _BIG),
            Field("seconds", "Wall time from start to publication, s; shards of one engine overlap.", _REAL),
            _WORKER,
            Field("published", "When its manifest was written.", _TIME),
            Field("size_bytes", "Size of its Parquet file, bytes.", _BIG),
        ),
    ),
    Relation(
        "dropped",
        "One row per index that was left out, and the stage that recorded it.",
        (
            _RUN,
            Field("index", "Trajectory index.", _BIG),
            Field("stage", "`rollout`, `score` or `learn`.", _TEXT),
            Field("teacher", "Whose scores left it out; empty for other stages.", _TEXT),
            Field("reason", "Why.", _TEXT),
        ),
    ),
    Relation(
        "rewinds",
        "One row each time the learner went back to a checkpoint.",
        (
            _RUN,
            Field("rewind", "1 for the first.", _INT),
            Field("to_step", "Steps behind the state it went back to.", _BIG),
            _WORKER,
            Field("recorded", "When.", _TIME),
        ),
    ),
    Relation(
        "spans",
        "One row per stretch of wall time a worker spent on one activity.",
        (
            _RUN,
            Field("role", "rollout, score, learn, evaluate or pretrain.", _TEXT),
            _WORKER,
            Field("activity", "docs/metrics.md; `wait:` and `orchestrate:` prefix what is not work.", _TEXT),
            Field("started", "When it began.", _TIME),
            Field("ended", "When it ended.", _TIME),
            Field("seconds", "Its length, s.", _REAL),
            Field("detail", "For example the shard or the step.", _TEXT),
        ),
    ),
    Relation(
        "failures",
        "One row per recorded failure of a role.",
        (
            _RUN,
            Field("role", "Which role failed.", _TEXT),
            _WORKER,
            Field("reason", "Its own words.", _TEXT),
            Field("failed", "When.", _TIME),
        ),
    ),
    Relation(
        "vocabulary",
        "One row per token of each run's tokenizer.",
        (
            _RUN,
            Field("token_id", "Token id.", _INT),
            Field("text", "The token's own text.", _TEXT),
            Field(
                "class",
                "Walk: special, noise, operation or state. Text: special, number, word, blank, symbol, mixed.",
                _TEXT,
            ),
        ),
    ),
)

_LABELS = (
    Field("folder", "Folder of the scores: the teacher's name, then after an @ what a back-fill asked for.", _TEXT),
    Field("origin", "`run`: what the run itself asked its teacher, which `tokens` shows; or `backfill`.", _TEXT),
    Field("candidates_from", "Which candidates were scored: `trajectories`, or the name of a back-filled set.", _TEXT),
)

ROWS = (
    Relation(
        "trajectory_rows", "Trajectories exactly as stored, flat candidate lists included.", _rows("trajectories")
    ),
    Relation("score_rows", "Teacher scores exactly as stored, flat lists included.", _rows("scores", *_LABELS)),
)


def documented(sql: str) -> dict[str, str]:
    """Column -> meaning, in order, of the lines `-- column name: meaning` of a .sql file."""
    return dict(re.findall(r"-- column (\w+): (.+)", sql))


def _derived(name: str) -> Relation:
    """What views/NAME.sql says: `-- relation: meaning`, `-- reads a, b`, its columns, and its SELECT."""
    sql = (files("storage.catalog") / "views" / f"{name}.sql").read_text("utf-8")
    (doc,) = re.findall(r"-- relation: (.+)", sql)
    reads = tuple(found for line in re.findall(r"-- reads (.+)", sql) for found in line.split(", "))
    return Relation(name, doc, tuple(Field(column, about) for column, about in documented(sql).items()), sql, reads)


# A view comes after those it reads.
DERIVED = tuple(map(_derived, ("trained_indices", "trajectories", "scores", "tokens", "candidates", "documentation")))
RELATIONS: tuple[Relation, ...] = (*RECORDS, *ROWS, *DERIVED)
BY_NAME = {relation.name: relation for relation in RELATIONS}
TEXT_FUNCTION = "text_of"
"""SQL function text_of(run, ids): the ids as text."""


def closure(names: Collection[str]) -> set[str]:
    """`names` and everything their views read."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += BY_NAME[name].reads
    return found


def mentioned(sql: str) -> set[str]:
    """Every relation `sql` can refer to, views resolved: those whose name occurs in its text as a word.

    A superset, which is all that deciding what to read needs; nobody else's SQL is parsed in this process.
    """
    return closure(set(re.findall(r"\w+", sql.lower())) & BY_NAME.keys())
