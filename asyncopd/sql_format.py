"""Rows of a query as a table for the screen, CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from asyncopd.errors import QueryError

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
            raise QueryError(
                "Parquet is not for the screen. Name a file with --output rows.parquet, or redirect it."
            )
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


def plain(value: Any) -> Any:
    """`value` in JSON's own types: times as ISO text, maps as objects, NaN as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        is_map = bool(value) and all(isinstance(item, tuple) and len(item) == 2 for item in value)
        return {str(key): plain(item) for key, item in value} if is_map else [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return value.isoformat() if isinstance(value, datetime) else str(value)


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
