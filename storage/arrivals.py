"""The arrivals of a run of order `arrival`: numbered records, each written once, which no rewind supersedes."""

from __future__ import annotations

import threading

from asyncopd.arrivals import Arrival
from storage.layout import RunLayout
from storage.objects import ObjectStore
from storage.records import arrival_from_json, arrival_to_json, from_json


class ArrivalLog:
    """Which shards the learner of one run came to, in which order, and what it decided."""

    store: ObjectStore
    layout: RunLayout

    def __init__(self) -> None:
        self._arrivals: list[Arrival] = []
        self._arrival_lock = threading.Lock()

    def arrivals(self) -> list[Arrival]:
        """All arrivals, in order. They are numbered without gaps, so one request tells that there is no new one."""
        with self._arrival_lock:
            while (body := self.store.find(key := self.layout.arrival(len(self._arrivals)))) is not None:
                self._arrivals.append(from_json(body, key, arrival_from_json))
            return list(self._arrivals)

    def record_arrival(self, arrival: Arrival) -> bool:
        """False when this number was recorded before, by another learner or before a crash; that record counts."""
        return self.store.put_if_absent(self.layout.arrival(arrival.number), arrival_to_json(arrival))
