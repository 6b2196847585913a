"""Records numbered 1, 2, 3, ... without gaps: each is written once, and one probe finds whether there is a new one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from storage.objects import ObjectStore
from storage.records import from_json, to_json


class NumberedRecords:
    """An append-only list of small JSON objects with any number of writers. Reads every record once."""

    def __init__(self, store: ObjectStore, key_of: Callable[[int], str]) -> None:
        self._store, self._key_of = store, key_of
        self._records: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All records so far, oldest first; one request when there is no new one."""
        with self._lock:
            while True:
                key = self._key_of(len(self._records) + 1)
                body = self._store.find(key)
                if body is None:
                    return list(self._records)
                self._records.append(from_json(body, key, dict))

    def append(self, fields: Mapping[str, Any]) -> int:
        """Write the next record; returns its number. Several writers get different numbers."""
        while True:
            number = len(self.read()) + 1
            if self._store.put_if_absent(self._key_of(number), to_json(fields)):
                return number
