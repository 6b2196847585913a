"""Finished cells of a study or a counterfactual: one JSON object each, never written twice, so that a killed one loses
at most the cells in work; and their rows as one Parquet object."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from asyncopd.ports import NamedBytes


def digest(settings: Any) -> str:
    """First 12 hex digits of the sha256 of the canonical JSON: equal settings, equal digest."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class CellStore:
    """Cells of one study under one set of settings; other settings have other cells."""

    def __init__(self, store: NamedBytes, study: str, settings: Mapping[str, Any]) -> None:
        """
        Args:
            store: at the study's output directory.
            settings: everything that decides a cell's numbers, besides its name; JSON.
        """
        self._store = store
        self.folder = f"cells/{study}-{digest(settings)}"
        self._store.put_if_absent(f"{self.folder}/settings.json", json.dumps(settings, indent=1).encode())

    def find(self, name: str) -> dict[str, Any] | None:
        """The finished cell, or None."""
        body = self._store.find(self._key(name))
        cell: dict[str, Any] | None = None if body is None else json.loads(body)
        return cell

    def put(self, name: str, cell: Mapping[str, Any]) -> bool:
        """Store a finished cell. False when it was there before; that one is kept."""
        return self._store.put_if_absent(self._key(name), json.dumps(cell, sort_keys=True).encode())

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}.json"


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of equal keys as one Parquet object."""
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), body)
    return body.getvalue()
