"""Merges small shards into larger objects without changing any index; readers go on meanwhile.

    [0,8) a.parquet   [8,16) b.parquet  ...        [0,8) ─┐ row group 0
                                          -->      [8,16) ─┼ row group 1   000000-000063.<attempt>.parquet
    every shard keeps its manifest, which now names the merged object and a row group of it

The merged object is written first, then the manifests are replaced one by one, each as a whole. A reader that holds an
old manifest finds the old object until `collect` removes it after the grace, and then reads the manifest again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from asyncopd.errors import ShardCorruptError
from asyncopd.types import IndexRange, Manifest
from storage.layout import parse_shard
from storage.manifests import REMOVED, REPLACED, ROW_GROUP, find_manifest, read_objects, sha256
from storage.records import to_json
from storage.run_view import RunView
from storage.schema import parquet_options
from storage.stores.base import ObjectStore

MAX_ROWS = 1024
"""Trajectories per merged object: a few MB, which one reader fetches and hashes whole."""
MAX_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Shard:
    """One shard to be merged."""

    key: str
    manifest: Manifest
    data_key: str
    size_bytes: int


@dataclass(frozen=True)
class CompactReport:
    """What a compaction merged, or would merge."""

    run_id: str
    dry_run: bool
    num_shards: int
    num_objects: int
    """Merged objects that now hold them."""
    bytes_before: int
    bytes_after: int
    """0 in a dry run. Both count once the replaced objects are collected."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def compact_run(store: ObjectStore, run_id: str, *, max_rows: int = MAX_ROWS, dry_run: bool = False) -> CompactReport:
    """Merge neighbouring shards of steps that lie before the newest checkpoint, up to `max_rows` rows an object.

    Raises:
        ShardCorruptError, ObjectMissingError: a shard is not what its manifest promises; audit the run first.
    """
    snapshot = RunView.everything(store, run_id)
    settled = _settled(snapshot)
    num_shards = num_objects = before = after = 0
    for kind, folder in _folders(snapshot):
        for group in _groups(snapshot, kind, folder, settled, max_rows):
            num_shards, num_objects = num_shards + len(group), num_objects + 1
            before += sum(shard.size_bytes for shard in group)
            if not dry_run:
                after += _merge(snapshot, kind, folder, group)
    return CompactReport(run_id, dry_run, num_shards, num_objects, before, after)


def _settled(snapshot: RunView) -> set[int]:
    """Indices that neither the learner nor a resume will read again, short of a corrupt checkpoint."""
    newest = snapshot.latest_checkpoint()
    before = newest.number if newest else 0
    return {index for step in snapshot.steps() if step.step < before for index in step.indices.indices}


def _folders(snapshot: RunView) -> Iterator[tuple[str, str]]:
    yield "trajectories", snapshot.layout.trajectories
    for folder in sorted({key.rsplit("/", 1)[0] for key in snapshot.records["scores"]}):
        yield "scores", folder


def _groups(snapshot: RunView, kind: str, folder: str, settled: set[int], max_rows: int) -> Iterator[list[_Shard]]:
    """Runs of two or more neighbouring shards that fit one object together."""
    group: list[_Shard] = []
    stop, rows, size = -1, 0, 0
    for shard_range, shard in _candidates(snapshot, kind, folder, settled):
        num_rows = shard.manifest.facts["num_rows"]
        if shard_range.start != stop or rows + num_rows > max_rows or size + shard.size_bytes > MAX_BYTES:
            if len(group) > 1:
                yield group
            group, rows, size = [], 0, 0
        group.append(shard)
        stop, rows, size = shard_range.stop, rows + num_rows, size + shard.size_bytes
    if len(group) > 1:
        yield group


def _candidates(snapshot: RunView, kind: str, folder: str, settled: set[int]) -> Iterator[tuple[IndexRange, _Shard]]:
    """Settled shards that have an object of their own, in index order."""
    shards = {parse_shard(key): key for key in snapshot.records[kind] if key.rsplit("/", 1)[0] == folder}
    for shard_range, key in sorted((shard, key) for shard, key in shards.items() if shard is not None):
        manifest: Manifest = snapshot.records[kind][key]
        has_own = len(manifest.objects) == 1 and not {ROW_GROUP, REMOVED} & manifest.facts.keys()
        if has_own and manifest.facts["num_rows"] and settled.issuperset(shard_range.indices):
            ((data_key, promise),) = manifest.objects.items()
            yield shard_range, _Shard(key, manifest, data_key, promise["size_bytes"])


def _merge(snapshot: RunView, kind: str, folder: str, group: Sequence[_Shard]) -> int:
    """Merge a group, in parts where its Parquet schema changes; returns the size of what it wrote, bytes."""
    read = [(shard, _table(read_objects(snapshot.store, shard.key, shard.manifest)[shard.data_key])) for shard in group]
    parts = [list(part) for _, part in itertools.groupby(read, key=lambda pair: pair[1].schema)]
    return sum(_merge_part(snapshot, kind, folder, part) for part in parts)


def _merge_part(snapshot: RunView, kind: str, folder: str, part: Sequence[tuple[_Shard, Any]]) -> int:
    """Write one merged object and point the shards' manifests to it; returns its size, bytes."""
    store, tables = snapshot.store, [table for _, table in part]
    body = _encode(kind, tables)
    data_key = snapshot.layout.shard_object(folder, _whole([shard.key for shard, _ in part]))
    _check_same(kind, data_key, body, tables)
    store.put(data_key, body)
    for row_group, (shard, _) in enumerate(part):
        if find_manifest(store, shard.key) != shard.manifest:
            continue  # quarantined or emptied since the snapshot
        facts = {
            **shard.manifest.facts,
            ROW_GROUP: row_group,
            REPLACED: {"key": shard.data_key, "size_bytes": shard.size_bytes, "at": time.time()},
        }
        objects = {data_key: {"size_bytes": len(body), "sha256": sha256(body)}}
        store.put(shard.key, to_json(replace(shard.manifest, objects=objects, facts=facts)))
    return len(body)


def _whole(keys: Sequence[str]) -> IndexRange:
    ranges = [shard for key in keys if (shard := parse_shard(key)) is not None]
    return IndexRange(ranges[0].start, ranges[-1].stop)


def _table(body: bytes) -> Any:
    return pq.ParquetFile(pa.BufferReader(body)).read(use_threads=False)


def _encode(kind: str, tables: Sequence[Any]) -> bytes:
    """One Parquet file with one row group a table, so that a shard is read without its neighbours' rows."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, tables[0].schema, **parquet_options(kind)) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)
    return bytes(sink.getvalue().to_pybytes())


def _check_same(kind: str, key: str, body: bytes, tables: Sequence[Any]) -> None:
    """Prove that every row group holds its shard bit by bit: written alone, both give the same file."""
    file = pq.ParquetFile(pa.BufferReader(body))
    for number, table in enumerate(tables):
        if _encode(kind, [file.read_row_group(number, use_threads=False)]) != _encode(kind, [table]):
            raise ShardCorruptError(
                f"{key}: row group {number} of the merged object differs from its shard. Nothing was changed; report "
                "this with the pyarrow version."
            )
