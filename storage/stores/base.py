"""Object stores behind one small contract, for `file://`, `s3://` and `memory://` roots.

    put_if_absent   decides every race: of any number of writers of one key, exactly one gets True
    put             overwrites (heartbeats) or writes a key that nobody else can choose (data objects)

A key is a relative path (`runs/demo/run.json`). What a reader sees under a key is always one writer's whole body.
"""

from __future__ import annotations

import threading
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass

import fsspec

from asyncopd.errors import ObjectMissingError, StorageError, StoreUnusableError

TEMPORARY_FOLDER = ".tmp"
"""Where a local store keeps half-written files; never listed, never a key."""
PROBE_FOLDER = "probe"
"""Where `probe` writes, for the length of a call."""
MIN_FREE_BYTES = 64 * 2**20
"""Default of `probe`: room for a few shards of a small run and a checkpoint of the quickstart."""


Keys = list[str]
"""Sorted keys. An alias, because inside the stores `list` is the method."""


@dataclass(frozen=True)
class Entry:
    """One stored object as a listing shows it."""

    key: str
    size_bytes: int
    modified: float
    """Unix time, seconds, of the store's clock."""


Entries = list[Entry]
"""An alias for the reason of Keys."""


@dataclass(frozen=True)
class Folder:
    """What lies directly under a folder of keys."""

    keys: Keys
    """Sorted full keys of the objects in it."""
    folders: list[str]
    """Sorted names of its subfolders, without their path."""


class ObjectStore(ABC):
    """Whole objects under keys. Safe to share between threads; after a fork it goes on working in the child."""

    def __init__(self, url: str) -> None:
        self.url = url
        """Root, as given; every key is relative to it."""

    @abstractmethod
    def put_if_absent(self, key: str, body: bytes, *, durable: bool = True) -> bool:
        """Write `body` unless `key` exists; True for exactly one of all writers. Small bodies only.

        `durable=False` skips the flush to disk: enough for what may be forgotten after a power cut, such as claims.
        """

    @abstractmethod
    def put(self, key: str, body: bytes, *, durable: bool = True) -> None:
        """Write or replace `key` as a whole; readers see the old body or the new one."""

    @abstractmethod
    def find(self, key: str) -> bytes | None:
        """The body of `key`; None when it does not exist."""

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str) -> Keys:
        """Sorted keys of all objects below the folder `prefix`, at any depth; empty when there is no such folder."""
        return [entry.key for entry in self.entries(prefix)]

    @abstractmethod
    def entries(self, prefix: str) -> Entries:
        """As `list`, with sizes and times; for maintenance, which must know what is old."""

    @abstractmethod
    def folder(self, prefix: str) -> Folder:
        """What lies directly in the folder `prefix`, without descending; empty when there is no such folder."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens when it does not exist."""

    def get(self, key: str) -> bytes:
        """The body of `key`. Raises ObjectMissingError."""
        body = self.find(key)
        if body is None:
            raise self.missing(key)
        return body

    def missing(self, key: str) -> ObjectMissingError:
        """The error that says `key` is not here, for the caller to raise."""
        return ObjectMissingError(
            f"{key} does not exist in {self.url}. It was never written, or was deleted; check the storage root and the "
            "run id, and restore the object if a manifest names it."
        )

    def temporary(self, older_than_s: float) -> Entries:
        """What killed writers left half-written, for all runs of the root; their keys cannot be read."""
        return []

    def discard_temporary(self, older_than_s: float) -> int:
        """Remove what killed writers left half-written; returns how many files. Stores without such files answer 0."""
        return 0

    def free_bytes(self) -> int | None:
        """Space left under the root; None where the store has no such notion."""
        return None

    def probe(self, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        """Prove that the root can be written, that put-if-absent refuses a second writer and that a listing shows what
        was just written. Leaves nothing behind.

        Raises StoreUnusableError, which says what was found and what to do.
        """
        key = f"{PROBE_FOLDER}/{uuid.uuid4().hex}"
        try:
            before = self.find(key)  # S3 answers 403 instead of 404 to whoever may not list
            first = self.put_if_absent(key, b"first")
            try:
                second = self.put_if_absent(key, b"second")
                stored = self.get(key)
                listed = key in self.list(PROBE_FOLDER)
            finally:
                self.delete(key)
        except StorageError as exc:
            raise StoreUnusableError(
                f"{self.url} cannot be used as storage root: {exc} Fix the cause or choose another storage root."
            ) from exc
        if before is not None or not first or second or stored != b"first":
            raise StoreUnusableError(
                f"{self.url} has no working put-if-absent: of two writers of {key} the first got {first}, the second "
                f"{second}, and {stored!r} was stored; expected True, False and b'first'. Two workers could overwrite "
                "each other here. Use a store that honours `If-None-Match: *` (AWS S3, Ceph, moto; not `rclone serve "
                "s3`), or a local directory."
            )
        if not listed:
            raise StoreUnusableError(
                f"{self.url} does not list {key}, which was just written; expected listings that show every earlier "
                "write, as AWS S3 and Ceph give. Finished shards would be overlooked here: choose another store."
            )
        free = self.free_bytes()
        if free is not None and free < min_free_bytes:
            raise StoreUnusableError(
                f"{self.url} has {free / 2**20:.0f} MiB free, expected at least {min_free_bytes / 2**20:.0f} MiB. "
                "Free some space or choose another storage root."
            )


def check_key(key: str) -> str:
    """`key` itself. Raises StorageError when it could name something outside the root or the store's own files."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or parts[0] == TEMPORARY_FOLDER or "\0" in key:
        raise StorageError(f"{key!r} is not a key: expected non-empty parts joined by '/', none of them '.' or '..'.")
    return key


class MemoryStore(ObjectStore):
    """Objects of this process, for tests: two stores with one URL see the same objects."""

    # One lock for all instances, because fsspec's memory filesystem is one dictionary per process and hands every
    # reader the same file object.
    _lock = threading.RLock()

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._fs = fsspec.filesystem("memory")
        self._root = "/" + url.removeprefix("memory://").strip("/")

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{check_key(key)}"

    def put_if_absent(self, key: str, body: bytes, *, durable: bool = True) -> bool:
        path = self._path(key)
        with self._lock:
            if is_new := not self._fs.isfile(path):
                self._fs.pipe_file(path, bytes(body))
            return is_new

    def put(self, key: str, body: bytes, *, durable: bool = True) -> None:
        with self._lock:
            self._fs.pipe_file(self._path(key), bytes(body))

    def find(self, key: str) -> bytes | None:
        path = self._path(key)
        with self._lock:
            return bytes(self._fs.cat_file(path)) if self._fs.isfile(path) else None

    def exists(self, key: str) -> bool:
        with self._lock:
            return bool(self._fs.isfile(self._path(key)))

    def entries(self, prefix: str) -> Entries:
        folder = self._path(prefix.rstrip("/")) + "/"
        skipped = len(self._root.rstrip("/")) + 1
        with self._lock:
            files = sorted((path, file) for path, file in self._fs.store.items() if path.startswith(folder))
            return [Entry(path[skipped:], file.size, file.modified.timestamp()) for path, file in files]

    def folder(self, prefix: str) -> Folder:
        prefix = prefix.rstrip("/") + "/"
        names = [key.removeprefix(prefix).partition("/") for key in self.list(prefix)]
        folders = {name for name, slash, _ in names if slash}
        return Folder([prefix + name for name, slash, _ in names if not slash], sorted(folders))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._lock:
            if self._fs.isfile(path):
                self._fs.rm_file(path)
