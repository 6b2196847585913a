"""Who works on which shard: claims that expire when their holder's heartbeat stands still.

    claims/<stage>/<shard>.1.json   put-if-absent: exactly one worker gets attempt 1
    claims/<stage>/<shard>.2.json   put by whoever saw the holder of attempt 1 dead; again exactly one

Time is only ever the observer's own monotonic clock: it measures how long a heartbeat's bytes did not change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from asyncopd.errors import ShardCorruptError
from asyncopd.records import Claim, Heartbeat, WorkerStatus
from asyncopd.types import IndexRange
from storage.layout import RunLayout
from storage.records import from_json, to_json
from storage.stores.base import ObjectStore


class ClaimLog:
    """Claims and heartbeats of one run, as seen by this process."""

    store: ObjectStore
    layout: RunLayout

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sightings: dict[str, tuple[bytes | None, float]] = {}
        """Worker -> the bytes of its heartbeat, and when this observer saw them first, by its own clock."""
        self._newest: dict[tuple[str, IndexRange], Claim] = {}
        self._beats: dict[str, int] = {}
        self._retired: set[str] = set()
        """Workers of this process that stopped: what a thread of theirs still does afterwards must not revive them."""
        self._claim_lock = threading.Lock()
        # Of its own, so that a claim that waits for a slow store does not hold up the heartbeat.
        self._beat_lock = threading.Lock()

    def claim(self, stage: str, shard: IndexRange, *, worker: str, lease_s: float) -> Claim | None:
        """The claim by which `worker` now holds the shard: nobody did, or the holder's heartbeat stood still for
        `lease_s`; its attempt says whether somebody held the shard before. None when somebody else holds it."""
        with self._claim_lock:
            if worker in self._retired:
                return None
            if worker not in self._beats:
                # Otherwise an old heartbeat of this name, perhaps a retired one, would make the new claim look dead.
                self.heartbeat(worker, WorkerStatus())
            claim = self._newest.get((stage, shard))
            while True:
                if claim is not None and claim.worker == worker:
                    successor = self._find_claim(stage, shard, claim.attempt + 1)
                    if successor is None:
                        return claim
                    claim = self._newest[stage, shard] = successor
                    continue
                if claim is not None and not self._dead(claim.worker, lease_s):
                    return None
                attempt = 1 if claim is None else claim.attempt + 1
                mine = Claim(stage=stage, shard=shard, attempt=attempt, worker=worker, claimed=time.time())
                key, body = self.layout.key("claim", stage=stage, shard=shard, attempt=attempt), to_json(mine)
                won = self.store.put_if_absent(key, body, durable=False)
                claim = mine if won else self._find_claim(stage, shard, attempt)
                if claim is not None:
                    self._newest[stage, shard] = claim

    def holder(self, stage: str, shard: IndexRange, *, lease_s: float) -> str | None:
        """Who holds the shard now; None when nobody claimed it, or the last holder retired or stood still.

        A holder that this process never saw before counts as alive until its heartbeat stood still for `lease_s`.
        """
        with self._claim_lock:
            claim, attempt = None, 1
            while (successor := self._find_claim(stage, shard, attempt)) is not None:
                claim, attempt = successor, attempt + 1
            return None if claim is None or self._dead(claim.worker, lease_s) else claim.worker

    def heartbeat(self, worker: str, status: WorkerStatus) -> None:
        """Renew every lease of `worker` and tell what it does; overwrites the worker's previous heartbeat.

        Nothing happens after `retire`: a beat that was on its way in another thread must not revive the worker.
        """
        self._beat(worker, status, retired=False)

    def retire(self, worker: str) -> None:
        """The worker stops in good order: its unfinished claims are free at once. Its last status stays readable.

        Final within this process; a process that takes the name again works as any other.
        """
        last = self._read_heartbeat(key := self.layout.key("heartbeat", worker=worker), self.store.find(key))
        self._beat(worker, last.status if last else WorkerStatus(), retired=True)

    def retire_process(self, *, host: str, pid: int) -> list[str]:
        """Retire the workers of a process that is known to be dead, so that nobody waits for its leases to run out.

        For the parent that reaped it: a dead child can neither beat nor publish any more. Returns their names.
        """
        workers = [
            worker
            for worker, beat in self.heartbeats().items()
            if not beat.retired and (beat.status.host, beat.status.pid) == (host, pid)
        ]
        for worker in workers:
            self.retire(worker)
        return workers

    def heartbeats(self) -> dict[str, Heartbeat]:
        """The last heartbeat of every worker, by worker."""
        beats = (
            self._read_heartbeat(key, self.store.find(key)) for key in self.store.list(self.layout.folder("heartbeat"))
        )
        return {beat.worker: beat for beat in beats if beat is not None}

    # -- private --------------------------------------------------------------------------------------------------
    def _beat(self, worker: str, status: WorkerStatus, *, retired: bool) -> None:
        # The write is inside the lock: of a beat and a retirement at once, the retirement is written last.
        with self._beat_lock:
            if worker in self._retired:
                return
            if retired:
                self._retired.add(worker)
            number = self._beats[worker] = self._beats.get(worker, 0) + 1
            beat = Heartbeat(worker=worker, beaten=time.time(), retired=retired, status=status, beat=number)
            self.store.put(self.layout.key("heartbeat", worker=worker), to_json(beat), durable=False)

    def _dead(self, worker: str, lease_s: float) -> bool:
        """Has `worker` retired, or has its heartbeat not changed for `lease_s` while this process was looking?"""
        key = self.layout.key("heartbeat", worker=worker)
        body, now_s = self.store.find(key), self._clock()
        sighting = self._sightings.get(worker)
        if sighting is None or sighting[0] != body:
            sighting = self._sightings[worker] = body, now_s
        beat = self._read_heartbeat(key, body)
        return (beat is not None and beat.retired) or now_s - sighting[1] >= lease_s

    def _find_claim(self, stage: str, shard: IndexRange, attempt: int) -> Claim | None:
        key = self.layout.key("claim", stage=stage, shard=shard, attempt=attempt)
        body = self.store.find(key)
        try:
            return from_json(body, key, Claim) if body is not None else None
        except ShardCorruptError:
            # Claims are not flushed, so a power cut can leave an empty one: held by nobody, and free after a lease.
            return Claim(stage=stage, shard=shard, attempt=attempt, worker="?", claimed=0.0)

    def _read_heartbeat(self, key: str, body: bytes | None) -> Heartbeat | None:
        try:
            return from_json(body, key, Heartbeat) if body is not None else None
        except ShardCorruptError:
            # Not flushed either: a heartbeat that a power cut destroyed is one that stands still.
            return None
