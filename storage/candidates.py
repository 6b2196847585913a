"""Back-filled candidates of a run: head and draws that were recomputed after the fact, in shards beside the scores.

    candidates/<name>/000128-000191.json, .parquet      name says what they are, for example head8-draws8-tail

Trajectory shards are never changed. Whoever wants these candidates joins them with `with_candidates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from asyncopd.errors import ShardCorruptError
from asyncopd.records import Facts, Manifest
from asyncopd.types import Candidates, IndexRange, Trajectory
from storage.manifests import find_manifest, publish, read_manifest, read_objects, what_to_do
from storage.parquet import decode_candidates, encode_candidates
from storage.run_log import StoredRunLog
from storage.schema import SCHEMA_VERSION


def find_candidates(log: StoredRunLog, name: str, shard: IndexRange) -> Manifest | None:
    """The manifest of a shard of candidates; None when nobody made it yet."""
    return find_manifest(log.store, log.layout.shard_manifest(log.layout.candidates(name), shard))


def publish_candidates(
    log: StoredRunLog, name: str, shard: IndexRange, candidates: Mapping[int, Candidates], *, worker: str
) -> bool:
    """Make candidates of every trajectory of a shard visible, by index. False when somebody was first."""
    folder = log.layout.candidates(name)
    return publish(
        log.store,
        log.layout.shard_manifest(folder, shard),
        {log.layout.shard_object(folder, shard): encode_candidates(candidates, log.run_id)},
        kind="candidates",
        worker=worker,
        facts=Facts(
            num_rows=len(candidates),
            index_range=(shard.start, shard.stop),
            parquet_schema_version=SCHEMA_VERSION,
        ),
    )


def read_candidates(log: StoredRunLog, name: str, shard: IndexRange) -> dict[int, Candidates]:
    """The candidates of a shard by index.

    Raises:
        ObjectMissingError: the shard was not published, or its data is gone.
        ShardCorruptError: the data is not what the manifest promises.
    """
    key = log.layout.shard_manifest(log.layout.candidates(name), shard)
    ((data_key, body),) = read_objects(log.store, key, read_manifest(log.store, key)).items()
    return decode_candidates(body, data_key)


def with_candidates(
    log: StoredRunLog, name: str, shard: IndexRange, trajectories: list[Trajectory]
) -> list[Trajectory]:
    """The shard's trajectories with back-filled candidates in place of their own.

    Raises as `read_candidates` does, and ShardCorruptError when they belong to other trajectories.
    """
    candidates = read_candidates(log, name, shard)
    if sorted(candidates) != [trajectory.index for trajectory in trajectories]:
        key = log.layout.shard_manifest(log.layout.candidates(name), shard)
        raise ShardCorruptError(
            f"{key}: candidates of indices {sorted(candidates)}, the trajectories are "
            f"{[trajectory.index for trajectory in trajectories]}. {what_to_do(key, 'candidates')}"
        )
    return [replace(trajectory, candidates=candidates[trajectory.index]) for trajectory in trajectories]
