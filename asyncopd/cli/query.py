"""`asyncopd sql` and `asyncopd export`: what a query selects, on the screen, in a file, or as a dataset.

Every query runs in the sandbox. Rows leave as a table for the screen, CSV, JSON lines or Parquet.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from asyncopd.config import parse_override
from asyncopd.errors import QueryError
from storage.catalog.child import QueryLimits
from storage.catalog.export import ExportFormat, plain
from storage.catalog.export import export as export_dataset
from storage.catalog.rows import AsOf
from storage.catalog.sandbox import Sandbox
from storage.catalog.snapshot import Catalog
from storage.catalog.stored_queries import find_query, stored_queries
from storage.runs import list_runs
from storage.stores import open_store

Format = Literal["table", "csv", "json", "parquet"]
BY_ENDING: dict[str, Format] = {".csv": "csv", ".json": "json", ".parquet": "parquet"}
DEFAULT_LIMIT = 1000
"""Rows: more than anyone reads on a screen, little enough to print at once."""
MAX_CELL = 200
"""Characters of a cell on the screen."""
EXPORT_MEMORY_BYTES = 2 * 2**30
"""An export may sort and join more than a question does; it is the user's own machine."""


@Parameter(name="*")
@dataclass(frozen=True)
class Scope:
    """Which runs a query sees, as of when, and how long it may take.

    Attributes:
        root: Storage root.
        runs: Only this run; may be repeated.
        as_of_version: As it was when policy version V was published.
        as_of_time: As it was then: ISO time (UTC unless it says) or Unix s.
        timeout: Seconds a query may take.
    """

    root: str = "runs"
    runs: Annotated[tuple[str, ...], Parameter("--run", metavar="RUN_ID")] = ()
    as_of_version: Annotated[int | None, Parameter(metavar="V")] = None
    as_of_time: Annotated[str | None, Parameter(metavar="TIME")] = None
    timeout: Annotated[float, Parameter(metavar="S")] = 60.0

    def catalog(self) -> Catalog:
        """Raises QueryError when the root has no runs."""
        store = open_store(self.root)
        if not list_runs(store):
            # An empty catalog would answer, and a mistyped root would look like a log without rows.
            raise QueryError(f"there are no runs in {self.root}. Name the storage root with --root.")
        return Catalog(store, self.runs or None)

    def as_of(self) -> AsOf | None:
        """The moment that is looked at; None for now."""
        if self.as_of_version is None and self.as_of_time is None:
            return None
        return AsOf(version=self.as_of_version, time=None if self.as_of_time is None else parse_time(self.as_of_time))


EVERYTHING = Scope()


def sql(
    query: str | None = None,
    /,
    *,
    list_: Annotated[bool, Parameter("--list")] = False,
    parameters: Annotated[tuple[str, ...], Parameter("-p", metavar="NAME=VALUE")] = (),
    format: Format | None = None,
    output: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    limit: int = DEFAULT_LIMIT,
    scope: Scope = EVERYTHING,
) -> int:
    """Ask the run log.

    Args:
        query: A SELECT, or the name of a stored query (--list); without it, read from standard input.
        list_: List the stored queries.
        parameters: A parameter of a stored query, or $NAME of a SELECT; may be repeated.
        format: Default: by the ending of --output, else table.
        output: Write there instead of the screen; must not exist.
        limit: Rows; 0 for all.
    """
    console = Console()
    if list_:
        console.print(_stored())
        return 0
    if limit < 0:
        raise QueryError(f"--limit {limit}: expected a number of rows, or 0 for all.")
    if query is None and sys.stdin.isatty():
        raise QueryError(
            'there is no query. Give a SELECT, for example asyncopd sql "select run, max(version) from policies group '
            'by run", or the name of a stored query: asyncopd sql --list.'
        )
    catalog, as_of = scope.catalog(), scope.as_of()
    text, given = resolve(sys.stdin.read() if query is None else query, parameters)
    style = format or (BY_ENDING.get(output.suffix, "table") if output else "table")
    sandbox = Sandbox(catalog, QueryLimits(max_rows=limit, timeout_s=scope.timeout))
    result = sandbox.query(text, given, as_of=as_of)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    if output is not None or style == "parquet":
        _write(result.table, style, output)
        if output is not None:
            notes.print(f"{_num_rows(result.table)} written to {output} ({style})")
    else:
        print(_text(result.table, style, width=console.width if console.is_terminal else None), end="")
    if result.truncated:
        notes.print(f"only the first {limit} rows; --limit 0 gives all.")
    return 0


def export(
    query: str, /, *, format: ExportFormat, output: Annotated[Path, Parameter(metavar="DIR")], scope: Scope = EVERYTHING
) -> int:
    """Write a dataset.

    Args:
        query: A SELECT with columns run and index, for example: "select run, index from trajectories where correct".
        format: What is written (docs/queries.md).
        output: New folder; must not exist.
    """
    limits = QueryLimits(max_rows=0, timeout_s=scope.timeout, memory_bytes=EXPORT_MEMORY_BYTES, max_result_bytes=0)
    sandbox = Sandbox(scope.catalog(), limits)
    num_rows = export_dataset(sandbox, query, format, output, limits=limits, as_of=scope.as_of())
    Console().print(f"{num_rows} rows in {output}", highlight=False, soft_wrap=True)
    return 0


def parse_time(text: str) -> float:
    """Unix seconds of an ISO time, UTC unless it names a zone, or of a number. Raises QueryError."""
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise QueryError(f"--as-of-time {text!r}: expected 2026-11-21T06:00:00, or Unix seconds.") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def resolve(query: str, assignments: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(SQL, parameters) of a query or of a stored query's name. Raises QueryError."""
    given = dict(parse_override(text) for text in assignments)
    stored = find_query(query)
    if stored is not None:
        return stored.sql, stored.arguments(given)
    if query.replace("-", "_").strip().isidentifier():
        raise QueryError(f"there is no stored query {query.strip()}. List them with: asyncopd sql --list")
    return query, given


def _stored() -> Table:
    table = Table("name", "question", "parameters")
    for query in stored_queries().values():
        parameters = ", ".join(f"{parameter.name}={parameter.default}" for parameter in query.parameters)
        table.add_row(query.name, query.question, parameters)
    return table


# -- rows as text and files -----------------------------------------------------------------------------------------
def _text(rows: Any, style: str, *, width: int | None = None) -> str:
    """A pyarrow.Table as text; a `table` is as wide as it takes, or as the screen with `width` characters."""
    if style == "csv":
        return _csv(rows)
    if style == "json":
        return "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows.to_pylist())
    return _table(rows, width)


def _write(rows: Any, style: str, output: Path | None) -> None:
    """Write a pyarrow.Table to `output`, which must not exist; to stdout for None. Raises QueryError."""
    body = io.BytesIO()
    if style == "parquet":
        pq.write_table(rows, body, compression="zstd")
    else:
        body.write(_text(rows, style).encode())
    if output is None:
        if sys.stdout.isatty():
            raise QueryError("Parquet is not for the screen. Name a file with --output rows.parquet, or redirect it.")
        sys.stdout.buffer.write(body.getvalue())
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        temporary.write_bytes(body.getvalue())
        # A link, not a rename: it refuses to replace.
        os.link(temporary, output)
    except FileExistsError:
        raise QueryError(f"{output} exists; remove it or name another file.") from None
    except OSError as error:
        raise QueryError(f"could not write {output}: {error.strerror}. Name a file in a folder that exists.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _csv(rows: Any) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(rows.column_names)
    for row in rows.to_pylist():
        writer.writerow(_cell(value) for value in row.values())
    return sink.getvalue()


def _table(rows: Any, width: int | None) -> str:
    table = Table()
    for field in rows.schema:
        is_number = str(field.type) in ("int64", "int32", "double", "float", "uint64") or "decimal" in str(field.type)
        table.add_column(field.name, justify="right" if is_number else "left", overflow="fold")
    for row in rows.to_pylist():
        table.add_row(*(_shown(value) for value in row.values()))
    sink = io.StringIO()
    Console(file=sink, width=width or 10_000, markup=False, emoji=False, highlight=False).print(table)
    return f"{sink.getvalue()}{_num_rows(rows)}\n"


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else _cell(value)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    shown = plain(value)
    return json.dumps(shown, ensure_ascii=False) if isinstance(shown, dict | list) else str(shown)


def _num_rows(rows: Any) -> str:
    return f"{rows.num_rows:,} row{'' if rows.num_rows == 1 else 's'}"
