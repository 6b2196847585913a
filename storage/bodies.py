"""The verified bytes behind a shard's manifest: its own object, a row group of a compacted one, or none any more.

Several shards share a compacted object, so the last few of those are remembered: reading shard after shard fetches
and hashes each object once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from asyncopd.errors import ObjectMissingError, ShardCorruptError
from asyncopd.types import Manifest
from storage.manifests import read_objects, what_to_do
from storage.objects import ObjectStore

ROW_GROUP = "row_group"
"""Fact of a compacted shard: which row group of its object holds its rows."""
REPLACED = "replaced"
"""Fact of a compacted shard: {`key`, `size_bytes`, `at`} of the object it had before."""
REMOVED = "removed"
"""Fact of a shard without data: {`reason`, `at`, `advice`}. The manifest stays, so that nobody makes it again."""
_MAX_BODIES = 4
"""Trajectories and scores of one object being read and the next one prefetched."""


class ShardBodies:
    """Reads shards' data objects. Safe to share between threads."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, store: ObjectStore, manifest_key: str, manifest: Manifest) -> tuple[str, bytes]:
        """(data key, verified bytes).

        Raises:
            ObjectMissingError: the data is gone, or was removed on purpose; the message says which.
            ShardCorruptError: the data is not what the manifest promises.
        """
        if REMOVED in manifest.facts:
            raise removed_error(manifest_key, manifest)
        if len(manifest.objects) != 1:
            raise ShardCorruptError(
                f"{manifest_key} names {len(manifest.objects)} data objects, a shard has one. "
                f"{what_to_do(manifest_key, manifest.kind)}"
            )
        if ROW_GROUP not in manifest.facts:
            ((key, body),) = read_objects(store, manifest_key, manifest).items()
            return key, body
        ((key, promise),) = manifest.objects.items()
        with self._lock:
            recent = self._recent.get((key, promise["sha256"]))
        if recent is not None:
            return key, recent
        body = read_objects(store, manifest_key, manifest)[key]
        with self._lock:
            self._recent[key, promise["sha256"]] = body
            while len(self._recent) > _MAX_BODIES:
                self._recent.popitem(last=False)
        return key, body


def removed_error(manifest_key: str, manifest: Manifest) -> ObjectMissingError:
    """The error that says that a shard's data was removed on purpose."""
    removed: Mapping[str, Any] = manifest.facts[REMOVED]
    return ObjectMissingError(
        f"{manifest_key}: the data of this shard was removed ({removed['reason']}) after its indices were trained, "
        f"so they cannot be replayed. {removed.get('advice', '')}".rstrip()
    )
