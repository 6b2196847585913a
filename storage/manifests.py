"""Publication: write the data objects, then the manifest that promises them; and verified reading.

put data (unique keys) ... -> put_if_absent manifest -> True : visible, complete, final
                                                     -> False: somebody was first, our data objects are deleted
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

from asyncopd.errors import ObjectMissingError, ShardCorruptError
from asyncopd.records import NO_FACTS, Facts, Manifest
from storage.layout import quarantined
from storage.records import from_json, to_json
from storage.stores.base import ObjectStore


def publish(
    store: ObjectStore,
    manifest_key: str,
    objects: Mapping[str, bytes],
    *,
    kind: str,
    worker: str,
    facts: Facts = NO_FACTS,
) -> bool:
    """Make `objects` visible under `manifest_key`; their keys must be this writer's own.

    False when `manifest_key` exists already; then nothing of ours remains.
    """
    if store.exists(manifest_key):
        return False
    manifest = Manifest(
        kind=kind,
        objects={key: {"size_bytes": len(body), "sha256": sha256(body)} for key, body in objects.items()},
        created=time.time(),
        worker=worker,
        facts=facts,
    )
    record = to_json(manifest)
    for key, body in objects.items():
        store.put(key, body)
    # Manifest last: a crash before this line leaves unreferenced objects, never a half shard.
    if store.put_if_absent(manifest_key, record):
        return True
    for key in objects:
        store.delete(key)
    return False


def find_manifest(store: ObjectStore, manifest_key: str) -> Manifest | None:
    """The manifest under `manifest_key`; None when nothing was published there. Does not look at the data."""
    body = store.find(manifest_key)
    return None if body is None else from_json(body, manifest_key, Manifest)


def read_manifest(store: ObjectStore, manifest_key: str) -> Manifest:
    """The manifest under `manifest_key`. Raises ObjectMissingError when nothing was published there."""
    return from_json(store.get(manifest_key), manifest_key, Manifest)


def read_objects(store: ObjectStore, manifest_key: str, manifest: Manifest) -> dict[str, bytes]:
    """The bodies `manifest` promises, by key, each checked against its size and sha256.

    Raises:
        ObjectMissingError: a promised object does not exist.
        ShardCorruptError: an object's bytes are not the promised ones.
    """
    return {key: read_object(store, manifest_key, manifest, key) for key in manifest.objects}


def read_named(store: ObjectStore, manifest_key: str) -> dict[str, bytes]:
    """The bodies of a checkpoint, model or architecture, by file name. Raises as `read_manifest` and `read_objects`."""
    bodies = read_objects(store, manifest_key, read_manifest(store, manifest_key))
    return {key.rsplit("/", 1)[1]: body for key, body in bodies.items()}


def read_object(store: ObjectStore, manifest_key: str, manifest: Manifest, key: str) -> bytes:
    """One of the bodies `manifest` promises. Raises as `read_objects` does."""
    promise, advice = manifest.objects[key], what_to_do(manifest_key, manifest.kind)
    body = store.find(key)
    if body is None:
        raise ObjectMissingError(
            f"{key} does not exist in {store.url}, but the manifest {manifest_key} promises "
            f"{promise['size_bytes']} bytes. {advice}"
        )
    if len(body) != promise["size_bytes"]:
        raise ShardCorruptError(
            f"{key}: found {len(body)} bytes, the manifest expects {promise['size_bytes']}. {advice}"
        )
    found, expected = sha256(body), promise["sha256"]
    if found != expected:
        raise ShardCorruptError(
            f"{key}: sha256 {found[:12]} does not match the manifest's {expected[:12]} ({len(body)} bytes read). "
            f"{advice}"
        )
    return body


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def what_to_do(manifest_key: str, kind: str) -> str:
    """Advice for an object that is missing or corrupt, by what the manifest stands for."""
    if kind == "cached scores":
        return f"Delete {manifest_key}; the teacher is then asked again."
    promises = {
        "trajectories": "to have its indices generated again",
        "scores": "to have its indices scored again",
        "candidates": "and back-fill it again",
        "checkpoint": "to use an older checkpoint",
    }
    what_for = promises.get(kind, "which says what can make it again")
    return f"Restore the object, or run `asyncopd maintain quarantine {manifest_key}` {what_for}."


def quarantine(store: ObjectStore, manifest_key: str) -> str:
    """Take the manifest out of the run, so that what it stood for counts as not published; returns its new key.

    Raises ObjectMissingError when there is no such manifest. The data objects stay where they are.
    `storage.maintain.quarantine` does the same with everything that follows from it.
    """
    body = store.get(manifest_key)
    moved = quarantined(manifest_key)
    store.put(moved, body)
    store.delete(manifest_key)
    return moved


def read_shard(store: ObjectStore, manifest_key: str, manifest: Manifest) -> tuple[str, bytes]:
    """(data key, verified bytes) of a shard, which has one data object.

    Raises:
        ObjectMissingError: the data is gone, or was removed on purpose; the message says which.
        ShardCorruptError: the data is not what the manifest promises.
    """
    if (removed := manifest.facts.removed) is not None:
        raise ObjectMissingError(
            f"{manifest_key}: the data of this shard was removed ({removed.reason}) after its indices were trained, "
            f"so they cannot be replayed. {removed.advice}".rstrip()
        )
    if len(manifest.objects) != 1:
        raise ShardCorruptError(
            f"{manifest_key} names {len(manifest.objects)} data objects, a shard has one. "
            f"{what_to_do(manifest_key, manifest.kind)}"
        )
    ((key, body),) = read_objects(store, manifest_key, manifest).items()
    return key, body
