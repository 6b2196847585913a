"""Sees from outside what a run makes durable and when, by looking at storage many times a second.

Nothing the disturbed processes say about themselves is needed: only objects in storage and this process's clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asyncopd.records import Manifest
from asyncopd.types import IndexRange
from storage.run_log import StoredRunLog
from storage.run_view import RunView

LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Durable:
    """A shard that was seen complete."""

    seen: float
    """Unix time of the first look that found it, seconds."""
    manifest: Manifest


class Observer:
    """Remembers every shard since it was first seen, and when each step was trained for the first time."""

    def __init__(self, log: StoredRunLog, *, teacher: str) -> None:
        self.log, self._teacher = log, teacher
        self.stages = {"rollout": log.layout.trajectories, f"score-{teacher}": log.layout.scores(teacher)}
        """Stage of a claim -> folder of the shards it claims."""
        self.durable: dict[str, dict[IndexRange, Durable]] = {stage: {} for stage in self.stages}
        self.step_times: list[float] = []
        """When the n-th step was first seen in the surviving lineage, monotonic seconds."""
        self.error: Exception | None = None
        self._stop = threading.Event()

    @property
    def num_steps(self) -> int:
        """Steps ever trained; a step that is trained again after a rewind counts once."""
        return len(self.step_times)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look again and again while the body runs, and once more at its end."""
        thread = threading.Thread(target=self._watch, name="observer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        self.look()

    def look(self) -> None:
        """Note what is new."""
        for stage in self.stages:
            known = self.durable[stage]
            for shard in self._shards(stage):
                if shard not in known and (manifest := self.manifest(stage, shard)) is not None:
                    known[shard] = Durable(time.time(), manifest)
        while self.log.find_step(self.num_steps) is not None:
            self.step_times.append(time.monotonic())

    def manifest(self, stage: str, shard: IndexRange) -> Manifest | None:
        """The manifest of a shard as it is in storage now."""
        if stage == "rollout":
            return self.log.find_trajectories(shard)
        return self.log.find_scores(self._teacher, shard)

    def claims_after_durable(self) -> list[Any]:
        """Claims that were made on a shard after it had been seen complete: each stands for work done twice."""
        return [
            claim
            for claim in RunView(self.log).read("claim").claims()
            if (seen := self.durable.get(claim.stage, {}).get(claim.shard)) is not None and claim.claimed > seen.seen
        ]

    def _shards(self, stage: str) -> list[IndexRange]:
        return self.log.trajectory_shards() if stage == "rollout" else self.log.score_shards(self._teacher)

    def _watch(self) -> None:
        try:
            while not self._stop.wait(LOOK_EVERY_S):
                self.look()
        except Exception as error:
            # In a thread nobody would see it; `Striker` raises it as soon as it looks.
            self.error = error
