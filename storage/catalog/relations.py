"""Every relation a query can name: its meaning, its documented columns, and where its rows come from.

    records    runs, policies, steps, evals, claims, ...    Arrow tables of JSON objects and manifests: records.sql
    rows       trajectory_rows, score_rows                  Arrow datasets over the Parquet shards
    derived    trajectories, scores, tokens, ...            views over the two: views/*.sql

List columns are expanded side by side: several `unnest` in one SELECT go through their lists together, and a shorter
list (or NULL) is filled up with NULL. A flat list of T·K numbers has entry i at position i // K and rank i % K. Times
are TIMESTAMP WITH TIME ZONE in UTC; indices and positions count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
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

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The Arrow table of records. Moments are given in Unix seconds; what is no column is left out."""

        def column(field: Field) -> list[Any]:
            values = [row.get(field.name) for row in rows]
            if field.type != _MOMENT:
                return values
            return [None if value is None else datetime.fromtimestamp(value, UTC) for value in values]

        return pa.table([column(field) for field in self.fields], schema=self.schema)


_MOMENT = pa.timestamp("us", tz="UTC")
_TEXT, _BIG = pa.string(), pa.int64()
_TYPES = {
    "VARCHAR": _TEXT,
    "BIGINT": _BIG,
    "BIGINT[]": pa.list_(_BIG),
    "INTEGER": pa.int32(),
    "DOUBLE": pa.float64(),
    "TIMESTAMPTZ": _MOMENT,
    "MAP(VARCHAR, DOUBLE)": pa.map_(_TEXT, pa.float64()),
    "MAP(INTEGER, BIGINT)": pa.map_(pa.int32(), _BIG),
}
_TABLE = re.compile(r"-- (.+)\nCREATE TABLE (\w+) \((?:LIKE (\w+)|\n((?:    .+\n)+))\);")
_COLUMN = re.compile(r"^    (\w+) ([^-]+?),? -- (.+)$", re.MULTILINE)


def _sql(name: str) -> str:
    return (files("storage.catalog") / f"{name}.sql").read_text("utf-8")


def _records() -> tuple[Relation, ...]:
    found: dict[str, Relation] = {}
    for doc, name, like, columns in _TABLE.findall(_sql("records")):
        own = tuple(Field(column, about, _TYPES[kind]) for column, kind, about in _COLUMN.findall(columns))
        found[name] = Relation(name, doc, found[like].fields if like else own)
    return tuple(found.values())


def _rows(name: str, doc: str, kind: str, **labels: str) -> Relation:
    """A relation over the shards of `kind`; `labels` are the columns that say what the shard's place says."""
    labelled = tuple(Field(label, about, _TEXT) for label, about in labels.items())
    stored = tuple(Field(column.name, column.doc, column.type) for column in COLUMNS[kind])
    return Relation(name, doc, (*labelled, *stored))


_PLACE = {"run": "Run id.", "shard": "Name of the shard the row is stored in: first and last index, both inclusive."}
RECORDS = _records()
ROWS = (
    _rows(
        "trajectory_rows", "Trajectories exactly as stored, flat candidate lists included.", "trajectories", **_PLACE
    ),
    _rows(
        "score_rows",
        "Teacher scores exactly as stored, flat lists included.",
        "scores",
        **_PLACE,
        folder="Folder of the scores: the teacher's name, then after an @ what a back-fill asked for.",
        origin="`run`: what the run itself asked its teacher, which `tokens` shows; or `backfill`.",
        candidates_from="Which candidates were scored: `trajectories`, or the name of a back-filled set.",
    ),
)


def documented(sql: str) -> dict[str, str]:
    """Column -> meaning, in order, of the lines `-- column name: meaning` of a .sql file."""
    return dict(re.findall(r"-- column (\w+): (.+)", sql))


def _derived(name: str) -> Relation:
    """What views/NAME.sql says: `-- relation: meaning`, `-- reads a, b`, its columns, and its SELECT."""
    sql = _sql(f"views/{name}")
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
