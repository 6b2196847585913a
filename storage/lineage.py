"""Which versions, steps and checkpoints count after the learner went back to a checkpoint.

    number n of rewind r survives  iff  no later rewind r' > r went back to a state before n  (to_step < n)

`n` counts learner steps behind a state: a policy version, a checkpoint, or step s as the state s + 1 it made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

from asyncopd.errors import StorageError
from asyncopd.types import PolicyVersion
from storage.layout import RunLayout
from storage.objects import ObjectStore
from storage.records import Rewind, from_json, rewind_from_json, rewind_to_json


class Lineage:
    """The rewinds of one run, cached: they are numbered without gaps, so one probe tells whether there is a new one."""

    def __init__(self, store: ObjectStore, layout: RunLayout) -> None:
        self._store = store
        self._layout = layout
        self._rewinds: list[Rewind] = []
        self._lock = threading.Lock()

    def rewinds(self) -> list[Rewind]:
        """All rewinds recorded so far, oldest first; costs one request when there is no new one."""
        with self._lock:
            while True:
                number = len(self._rewinds) + 1
                key = self._layout.rewind(number)
                if not self._store.exists(key):
                    return list(self._rewinds)
                self._rewinds.append(from_json(self._store.get(key), key, rewind_from_json))

    def record(self, to_step: int, worker: str) -> int:
        """Append a rewind; returns its number. Several writers get different numbers."""
        if to_step < 0:
            raise StorageError(f"cannot rewind {self._layout.run_id} to step {to_step}; expected 0 or more.")
        while True:
            number = len(self.rewinds()) + 1
            rewind = Rewind(number=number, to_step=to_step, worker=worker, recorded=time.time())
            if self._store.put_if_absent(self._layout.rewind(number), rewind_to_json(rewind)):
                return number


def survives(number: int, rewind: int, rewinds: Iterable[Rewind]) -> bool:
    """Does the state after `number` steps, published under `rewind`, count in the surviving lineage?"""
    return all(later.to_step >= number for later in rewinds if later.number > rewind)


def surviving(versions: Iterable[PolicyVersion], rewinds: list[Rewind]) -> list[PolicyVersion]:
    """The versions that count, oldest first; of a number published under several rewinds, the latest rewind's."""
    newest = {
        version.number: version for version in sorted(versions) if survives(version.number, version.rewind, rewinds)
    }
    return list(newest.values())


def possible_rewinds(number: int, rewinds: list[Rewind]) -> Iterator[int]:
    """The rewinds under which state `number` may have been published and count, latest first."""
    for rewind in range(len(rewinds), -1, -1):
        yield rewind
        if rewind and rewinds[rewind - 1].to_step < number:
            return
