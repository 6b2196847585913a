"""Reads what the report of a run is made of: its steps, evaluations and timelines, and a bounded number of shards."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asyncopd.config import RunConfig
from asyncopd.errors import StorageError
from asyncopd.report.measure import Observations, Responses, measure
from asyncopd.report.summary import Summary
from asyncopd.report.write import Report, write_report
from asyncopd.types import IndexRange
from storage.run_log import StoredRunLog
from storage.run_view import RunView

logger = logging.getLogger(__name__)

MAX_SHARDS_READ = 200
"""Parquet shards read for the length statistics: a few seconds of work, and tens of thousands of responses."""


def report_run(log: StoredRunLog, config: RunConfig, folder: Path) -> Report:
    """Write the report of a run, finished or not, into `folder`, as `write_report` says."""
    return write_report(observe(RunView(log), config.teacher.name), config, folder)


def summarise(log: StoredRunLog, config: RunConfig) -> Summary:
    """The figures of a run, finished or not, without plots."""
    return measure(observe(RunView(log), config.teacher.name), config)


def observe(view: RunView, teacher: str) -> Observations:
    """Read a run, finished or not. `teacher` is the name of its score shards."""
    history = view.refresh().read("scores", "trajectories", "spans").history
    shards, scored = view.trajectories(), view.scores(teacher)
    tokens = {shard: manifest.facts.num_tokens or 0 for shard, manifest in shards.items()}
    return Observations(
        run_id=view.run_id,
        steps=history.steps,
        evaluations=history.evaluations,
        spans=view.spans(),
        failures=tuple(f"{failure.role}: {failure.reason}" for failure in history.failures),
        num_rewinds=len(history.rewinds),
        # A retired worker's status may be empty, but its name begins with its role.
        workers=Counter(worker.partition("-")[0] for worker in history.beats),
        tokens_generated=sum(tokens.values()),
        tokens_scored=sum(tokens.get(shard, 0) for shard in scored),
        responses=_read_responses(view.log, list(shards)),
    )


def evenly(shards: Sequence[IndexRange], at_most: int) -> list[IndexRange]:
    """Up to `at_most` of `shards`, spread evenly over them, first and last included."""
    if len(shards) <= at_most:
        return list(shards)
    return [shards[int(position)] for position in np.linspace(0, len(shards) - 1, at_most)]


def _read_responses(log: StoredRunLog, shards: Sequence[IndexRange]) -> Responses:
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
