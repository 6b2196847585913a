"""Reads everything a report is made of, once: steps, evaluations, timelines, and a bounded number of shards."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import StorageError
from asyncopd.ports import RunHistory
from asyncopd.report.intervals import is_busy
from asyncopd.types import Evaluation, IndexRange, IntArray, Span, TrainStep

logger = logging.getLogger(__name__)

PIPELINE = ("rollout", "score", "learn")
"""The roles whose overlap is the point of the platform."""
MAX_SHARDS_READ = 200
"""Parquet shards read for the length statistics: a few seconds of work, and tens of thousands of responses."""
_READERS = 8


@dataclass(frozen=True)
class Responses:
    """Lengths of the responses in the shards that were read."""

    lengths_B: IntArray
    """[B] response tokens, EOS included, in index order."""
    stopped_B: NDArray[np.bool_]
    """[B] ended with EOS rather than at the limit."""
    num_shards_read: int
    num_shards: int
    problems: tuple[str, ...]
    """Why shards that should have been read were not."""


@dataclass(frozen=True)
class Observations:
    """One run, read at one moment."""

    run_id: str
    steps: Sequence[TrainStep]
    evaluations: Sequence[Evaluation]
    spans: Sequence[Span]
    failures: tuple[str, ...]
    """`role: reason`, oldest first."""
    num_rewinds: int
    workers: Mapping[str, int]
    """Role -> processes that ever gave a sign of life."""
    tokens_generated: int
    tokens_scored: int
    responses: Responses

    @functools.cached_property
    def epoch(self) -> float:
        """Unix time at which the pipeline began to work: zero of every wall-time axis. 0 when nothing happened."""
        starts = [span.start for span in self.spans if span.role in PIPELINE and is_busy(span)]
        return min(starts, default=min((step.finished for step in self.steps), default=0.0))

    def published_s(self, version: int) -> float | None:
        """Seconds from `epoch` to the end of the step that made `version`; None when that step is not known."""
        if version == 0:
            return 0.0
        finished = {step.version.number: step.finished for step in self.steps}.get(version)
        return None if finished is None else finished - self.epoch


def observe(log: RunHistory, teacher: str) -> Observations:
    """Read a run, finished or not.

    Args:
        teacher: name of its score shards.
    """
    shards = log.trajectory_shards()
    with ThreadPoolExecutor(_READERS) as readers:
        manifests = readers.map(log.find_trajectories, shards)
        tokens = {
            shard: int(manifest.facts.get("num_tokens", 0))
            for shard, manifest in zip(shards, manifests, strict=True)
            if manifest is not None
        }
    return Observations(
        run_id=log.run_id,
        steps=log.steps(),
        evaluations=log.evaluations(),
        spans=log.spans(),
        failures=tuple(f"{failure.role}: {failure.reason}" for failure in log.failures()),
        num_rewinds=len(log.rewinds()),
        workers=_workers_by_role(log),
        tokens_generated=sum(tokens.values()),
        tokens_scored=sum(tokens.get(shard, 0) for shard in log.score_shards(teacher)),
        responses=_read_responses(log, shards),
    )


def evenly(shards: Sequence[IndexRange], at_most: int) -> list[IndexRange]:
    """Up to `at_most` of `shards`, spread evenly over them, first and last included."""
    if len(shards) <= at_most:
        return list(shards)
    return [shards[int(position)] for position in np.linspace(0, len(shards) - 1, at_most)]


def _read_responses(log: RunHistory, shards: Sequence[IndexRange]) -> Responses:
    lengths: list[int] = []
    stopped: list[bool] = []
    problems: list[str] = []
    chosen = evenly(shards, MAX_SHARDS_READ)
    for shard in chosen:
        try:
            trajectories = log.read_trajectories(shard)
        except StorageError as error:
            # One damaged shard must not cost the report of a whole run; the report names it instead.
            logger.warning("shard %s is left out of the report: %s", shard.name, error)
            problems.append(str(error))
            continue
        lengths += [len(trajectory.response_ids) for trajectory in trajectories]
        stopped += [trajectory.finish_reason == "stop" for trajectory in trajectories]
    return Responses(
        lengths_B=np.array(lengths, np.int32),
        stopped_B=np.array(stopped, np.bool_),
        num_shards_read=len(chosen) - len(problems),
        num_shards=len(shards),
        problems=tuple(problems),
    )


def _workers_by_role(log: RunHistory) -> dict[str, int]:
    counts: dict[str, int] = {}
    for worker in log.heartbeats():
        # A retired worker's status is empty, but its name begins with its role.
        role = worker.partition("-")[0]
        counts[role] = counts.get(role, 0) + 1
    return counts
