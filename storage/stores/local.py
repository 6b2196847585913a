"""The object store of a local or shared directory. Relies on POSIX: atomic `link` and `rename`, `fsync` of directories.

put_if_absent   write .tmp/x -> fsync -> link(.tmp/x, key) -> fsync(directory)      EEXIST: somebody was first
put             write .tmp/x -> fsync -> rename(.tmp/x, key) -> fsync(directory)
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from asyncopd.errors import StorageError, StoreUnusableError
from storage.stores.base import (
    MIN_FREE_BYTES,
    PROBE_FOLDER,
    TEMPORARY_FOLDER,
    Entries,
    Entry,
    Folder,
    Keys,
    ObjectStore,
    check_key,
)


class LocalStore(ObjectStore):
    """Objects as files under a directory, which is created on first use."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.root = Path(url.removeprefix("file://")).expanduser().absolute()
        self._temporary = self.root / TEMPORARY_FOLDER

    def put_if_absent(self, key: str, body: bytes, *, durable: bool = True) -> bool:
        final = self._path(key)
        with self._explained("write", key):
            temporary = self._write_temporary(body, durable=durable)
            try:
                won = self._link(temporary, final)
            finally:
                os.unlink(temporary)
            if durable:
                # The loser flushes too: it is about to act on the winner's object.
                _flush_directory(final.parent)
        return won

    def put(self, key: str, body: bytes, *, durable: bool = True) -> None:
        final = self._path(key)
        with self._explained("write", key):
            temporary = self._write_temporary(body, durable=durable)
            try:
                os.replace(temporary, final)
            except FileNotFoundError:
                _make_directories(final.parent)
                os.replace(temporary, final)
            if durable:
                _flush_directory(final.parent)

    def find(self, key: str) -> bytes | None:
        path = self._path(key)
        with self._explained("read", key):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with self._explained("look for", key):
            try:
                return stat.S_ISREG(os.stat(path).st_mode)
            except FileNotFoundError:
                return False

    def list(self, prefix: str) -> Keys:
        with self._explained("list", prefix):
            return sorted(self._walk(check_key(prefix.rstrip("/"))))

    def entries(self, prefix: str) -> Entries:
        found = []
        for key in self.list(prefix):
            # Gone since the listing: a heartbeat's temporary file, or a loser's data.
            with contextlib.suppress(FileNotFoundError):
                status = (self.root / key).stat()
                found.append(Entry(key, status.st_size, status.st_mtime))
        return found

    def folder(self, prefix: str) -> Folder:
        prefix = check_key(prefix.rstrip("/"))
        with self._explained("list", prefix):
            entries = _scan(self.root / prefix)
        return Folder(
            keys=sorted(f"{prefix}/{entry.name}" for entry in entries if entry.is_file()),
            folders=sorted(entry.name for entry in entries if entry.is_dir()),
        )

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained("delete", key):
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def temporary(self, older_than_s: float) -> Entries:
        oldest, found = time.time() - older_than_s, []
        for entry in _scan(self._temporary):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if status.st_mtime < oldest:
                    found.append(Entry(f"{TEMPORARY_FOLDER}/{entry.name}", status.st_size, status.st_mtime))
        return found

    def discard_temporary(self, older_than_s: float) -> int:
        stale = self.temporary(older_than_s)
        for entry in stale:
            (self.root / entry.key).unlink(missing_ok=True)
        return len(stale)

    def probe(self, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        for folder in (self.root, *self.root.parents):
            if folder.exists() and not folder.is_dir():
                raise StoreUnusableError(
                    f"{self.url} cannot be used as storage root: {folder} is a file, expected a directory. "
                    "Choose another storage root."
                )
        try:
            super().probe(min_free_bytes)
        finally:
            with contextlib.suppress(OSError):  # never made, or another process probes at this moment
                (self.root / PROBE_FOLDER).rmdir()

    # -- files ----------------------------------------------------------------------------------------------------
    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _walk(self, prefix: str) -> Iterator[str]:
        for entry in _scan(self.root / prefix):
            key = f"{prefix}/{entry.name}"
            if entry.is_dir():
                yield from self._walk(key)
            else:
                yield key

    def _write_temporary(self, body: bytes, *, durable: bool) -> Path:
        path = self._temporary / f"{os.getpid()}-{uuid.uuid4().hex}"
        _make_directories(self._temporary)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                view = memoryview(body)
                while view:
                    view = view[file.write(view) :]
                if durable:
                    os.fsync(descriptor)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _link(self, temporary: Path, final: Path) -> bool:
        """True when `final` is now our file, False when it was there before."""
        try:
            os.link(temporary, final)
        except FileNotFoundError:
            _make_directories(final.parent)
            return self._link(temporary, final)
        except FileExistsError:
            # NFS repeats a link whose answer was lost, and then reports our own first try as EEXIST.
            return os.path.samefile(temporary, final)
        return True

    @contextlib.contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        """Turn an OSError into a StorageError that names the key and what to do."""
        try:
            yield
        except OSError as exc:
            advice = _ADVICE.get(exc.errno or 0, "Check the storage root's file system.")
            where = f" ({exc.filename})" if exc.filename else ""
            reason = f"{exc.strerror or exc}{where}. {advice}"
            raise StorageError(f"could not {action} {key} in {self.url}: {reason}") from exc


_ADVICE = {
    errno.ENOSPC: "The disk is full: free some space or move the storage root, then start again; nothing is lost.",
    errno.EDQUOT: "The quota is used up: free some space or move the storage root, then start again; nothing is lost.",
    errno.EACCES: "Expected a directory that this user may write to: give it write permission.",
    errno.ENOENT: "Expected a directory that can be made there; this file system allows none.",
    errno.EPERM: "The file system refuses hard links or this user; choose a storage root that allows them.",
    errno.EROFS: "The file system is mounted read-only; remount it or choose another storage root.",
    errno.ENOTDIR: "A part of the path is a file; choose another storage root.",
    errno.ENOTSUP: "The file system has no hard links; choose a storage root that has them.",
}


def _scan(path: Path) -> list[os.DirEntry[str]]:
    """Directory entries; none when the directory does not exist (yet, or any more)."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if path.is_file():
            return []  # an object is no folder; a root that lies below a file is still an error
        raise


def _make_directories(path: Path) -> None:
    """Create `path` and its parents, each durable: a flushed file in a forgotten directory would be lost."""
    if path.is_dir():
        return
    if path.parent != path:
        _make_directories(path.parent)
    path.mkdir(exist_ok=True)
    _flush_directory(path.parent)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
