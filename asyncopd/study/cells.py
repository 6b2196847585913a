"""Finished cells of a study, one JSON object each: written whole or not at all, and never twice.

A worker process's stdin: lines to work on, and the sign that its parent is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from storage.stores.base import ObjectStore


def digest(settings: Any) -> str:
    """First 12 hex digits of the sha256 of the canonical JSON: equal settings, equal digest."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class CellStore:
    """Cells of one study under one set of settings; other settings have other cells."""

    def __init__(self, store: ObjectStore, study: str, settings: Mapping[str, Any]) -> None:
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


def lines_while_parent_lives() -> Iterator[bytes]:
    """Lines of stdin, one at a time. At the end of stdin the process ends at once, in the middle of work or not:
    either the parent closed it because there is no more work, or the parent died."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        # Not sys.stdin: a daemon thread inside its lock makes the interpreter abort at exit.
        buffer = b""
        while chunk := os.read(0, 65536):
            *whole, buffer = (buffer + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
        os._exit(0)

    threading.Thread(target=read, name="read-stdin", daemon=True).start()
    while True:
        yield lines.get()
