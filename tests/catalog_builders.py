"""A small log with everything a query can ask about, made once per test process, and the values behind it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from query_log import LogSize, write_log

from asyncopd.types import ScoredTrajectory
from storage.catalog.connection import connect
from storage.catalog.relations import mentioned
from storage.catalog.rows import AsOf
from storage.catalog.snapshot import Catalog
from storage.run_log import StoredRunLog
from storage.stores import open_store

SIZE = LogSize(num_tokens=1500, batch_size=8, shard_size=4, mean_tokens=12)


@functools.cache
def written_log() -> StoredRunLog:
    """A finished run in a folder of its own. Do not write to it."""
    folder = tempfile.mkdtemp(prefix="asyncopd-catalog-")
    return write_log(open_store(folder), "first", SIZE, seed=1)


def root_of(log: StoredRunLog) -> Path:
    return Path(log.store.url)


def scored(log: StoredRunLog, teacher: str = "oracle") -> list[ScoredTrajectory]:
    """Everything in the log as typed values, read by the run log's own readers."""
    return [
        ScoredTrajectory(trajectory, scores)
        for shard in log.trajectory_shards()
        for trajectory, scores in zip(log.read_trajectories(shard), log.read_scores(teacher, shard), strict=True)
    ]


def ask(catalog: Catalog, sql: str, parameters: dict[str, Any] | None = None, as_of: AsOf | None = None) -> list[Any]:
    """Rows of a query in this process, as tuples."""
    snapshot = catalog.snapshot(mentioned(sql), as_of)
    with connect(snapshot, sql=sql, memory_bytes=2**29) as connection:
        return connection.execute(sql, parameters).fetchall()
