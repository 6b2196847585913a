"""What a relation is: a name, a meaning, documented columns, and for derived ones the view that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa


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
    """SELECT of a derived relation; empty for records and rows."""
    reads: tuple[str, ...] = ()
    """Relations named in `view`."""

    @property
    def schema(self) -> Any:
        """Arrow schema of records and rows; every column may be null, for files of older schemas."""
        return pa.schema([pa.field(field.name, field.type) for field in self.fields])
