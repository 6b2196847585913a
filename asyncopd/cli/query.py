"""`asyncopd sql`: one query, a stored one, the list of those, or a shell. Every query runs in the sandbox.

Rows of a query as a table for the screen, CSV, JSON lines or Parquet.

`asyncopd export`: what a query selects, as a dataset to train on elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from asyncopd.config import parse_override
from asyncopd.errors import QueryError
from asyncopd.sql_shell import run_shell
from storage.catalog.export import export, plain
from storage.catalog.rows import AsOf
from storage.catalog.sandbox import QueryLimits, Sandbox
from storage.catalog.snapshot import Catalog
from storage.catalog.stored_queries import find_query, stored_queries
from storage.runs import list_runs
from storage.stores import open_store

DEFAULT_LIMIT = 1000
"""Rows: more than anyone reads on a screen, little enough to print at once."""


def add_sql(commands: Any) -> None:
    """Add `sql` to the parser's commands."""
    parser = commands.add_parser("sql", help="ask the run log in SQL (docs/queries.md); without a query: a shell")
    parser.add_argument("query", nargs="?", help="a SELECT, or the name of a stored query (--list)")
    parser.add_argument("--list", action="store_true", help="list the stored queries")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --output, else table")
    parser.add_argument("--output", metavar="FILE", help="write there instead of the screen; must not exist")
    parser.add_argument("--limit", type=int, default=DEFAULT_LIMIT, help=f"rows (default {DEFAULT_LIMIT}, 0: all)")
    add_scope(parser)
    parser.set_defaults(run=_run)


def add_scope(parser: argparse.ArgumentParser) -> None:
    """Options that say which runs, at which moment, with which limits."""
    parser.add_argument("--root", default="runs", help="storage root (default: runs)")
    parser.add_argument("--run", dest="runs", action="append", metavar="RUN_ID", help="only this run; may be repeated")
    parser.add_argument("--as-of-version", type=int, metavar="V", help="as it was when policy version V was published")
    parser.add_argument("--as-of-time", metavar="TIME", help="as it was then: ISO time (UTC unless it says) or Unix s")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds a query may take (default 60)"
    )


def scope_of(arguments: argparse.Namespace) -> tuple[Catalog, AsOf | None]:
    """The catalog and the moment that `add_scope`'s options name."""
    as_of = None
    if arguments.as_of_version is not None or arguments.as_of_time is not None:
        moment = None if arguments.as_of_time is None else parse_time(arguments.as_of_time)
        as_of = AsOf(version=arguments.as_of_version, time=moment)
    store = open_store(arguments.root)
    if not list_runs(store):
        # An empty catalog would answer, and a mistyped root would look like a log without rows.
        raise QueryError(f"there are no runs in {arguments.root}. Name the storage root with --root.")
    return Catalog(store, arguments.runs), as_of


def parse_time(text: str) -> float:
    """Unix seconds of an ISO time, UTC unless it names a zone, or of a number. Raises QueryError."""
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise QueryError(f"--as-of-time {text!r}: expected 2026-11-21T06:00:00, or Unix seconds.") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _run(arguments: argparse.Namespace) -> int:
    console = Console()
    if arguments.list:
        print_stored(console)
        return 0
    if arguments.limit < 0:
        raise QueryError(f"--limit {arguments.limit}: expected a number of rows, or 0 for all.")
    catalog, as_of = scope_of(arguments)
    limits = QueryLimits(max_rows=arguments.limit, timeout_s=arguments.timeout)
    if arguments.query is None and sys.stdin.isatty():
        with Sandbox(catalog, limits, prestart=True) as sandbox:
            return run_shell(sandbox, as_of, console=console)
    sql, parameters = resolve(arguments.query or sys.stdin.read(), arguments.parameters)
    output = Path(arguments.output) if arguments.output else None
    style = arguments.format or (_format_of(output) if output else "table")
    with Sandbox(catalog, limits) as sandbox:
        result = sandbox.query(sql, parameters, as_of=as_of)
    if output is not None or style == "parquet":
        write_result(result.table, style, output)
        if output is not None:
            rows = f"{result.table.num_rows:,} row{'' if result.table.num_rows == 1 else 's'}"
            written = f"{rows} written to {output} ({style})"
            Console(stderr=True).print(written, highlight=False, soft_wrap=True)
    else:
        print(text_of_result(result.table, style, width=console.width if console.is_terminal else None), end="")
    if result.truncated:
        note = f"only the first {arguments.limit} rows; --limit 0 gives all."
        Console(stderr=True).print(note, highlight=False, soft_wrap=True)
    return 0


def resolve(query: str, assignments: list[str]) -> tuple[str, dict[str, Any]]:
    """(SQL, parameters) of a query or of a stored query's name. Raises QueryError."""
    given = dict(parse_override(text) for text in assignments)
    stored = find_query(query)
    if stored is not None:
        return stored.sql, stored.arguments(given)
    if query.replace("-", "_").strip().isidentifier():
        raise QueryError(f"there is no stored query {query.strip()}. List them with: asyncopd sql --list")
    return query, given


def print_stored(console: Console) -> None:
    """All stored queries with their parameters."""
    table = Table("name", "question", "parameters")
    for query in stored_queries().values():
        parameters = ", ".join(f"{parameter.name}={parameter.default}" for parameter in query.parameters)
        table.add_row(query.name, query.question, parameters)
    console.print(table)


def _format_of(output: Path) -> str:
    return {".csv": "csv", ".json": "json", ".parquet": "parquet"}.get(output.suffix, "table")


FORMATS = ("table", "csv", "json", "parquet")
_MAX_CELL = 200
"""Characters of a cell on the screen."""


def text_of_result(rows: Any, style: str, *, width: int | None = None) -> str:
    """A pyarrow.Table as text: `table`, `csv`, or `json` (one object per line).

    Args:
        width: of the screen in characters; None for as wide as it takes.
    """
    if style == "csv":
        return _csv(rows)
    if style == "json":
        return "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows.to_pylist())
    return _table(rows, width)


def write_result(rows: Any, style: str, output: Path | None) -> None:
    """Write a pyarrow.Table to `output`, which must not exist; to stdout for None. Raises QueryError."""
    body = io.BytesIO()
    if style == "parquet":
        pq.write_table(rows, body, compression="zstd")
    else:
        body.write(text_of_result(rows, style).encode())
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
    return f"{sink.getvalue()}{rows.num_rows} row{'' if rows.num_rows == 1 else 's'}\n"


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else _cell(value)
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    shown = plain(value)
    return json.dumps(shown, ensure_ascii=False) if isinstance(shown, dict | list) else str(shown)


_MEMORY_BYTES = 2 * 2**30
"""An export may sort and join more than a question does; it is the user's own machine."""


def add_export(commands: Any) -> None:
    """Add `export` to the parser's commands."""
    description = "write what a query selects as a dataset, every row with its run, index, policy versions and teacher"
    parser = commands.add_parser("export", help="write selected trajectories as a dataset", description=description)
    parser.add_argument(
        "query",
        help='a SELECT with columns run and index, for example: "select run, index from trajectories where correct"',
    )
    parser.add_argument("--format", choices=("sft", "parquet", "hf"), required=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder; must not exist")
    add_scope(parser)
    parser.set_defaults(run=_run_export)


def _run_export(arguments: argparse.Namespace) -> int:
    catalog, as_of = scope_of(arguments)
    limits = QueryLimits(max_rows=0, timeout_s=arguments.timeout, memory_bytes=_MEMORY_BYTES, max_result_bytes=0)
    with Sandbox(catalog, limits) as sandbox:
        num_rows = export(
            sandbox, arguments.query, arguments.format, Path(arguments.output), limits=limits, as_of=as_of
        )
    Console().print(f"{num_rows} rows in {arguments.output}", highlight=False, soft_wrap=True)
    return 0
