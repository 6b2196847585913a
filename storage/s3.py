"""The object store of an S3 bucket, through s3fs. Relies on the portable subset only: single PUT with
`If-None-Match: *`, multipart without conditions, GET, HEAD, DELETE and LIST.

Every retry is ours, because only the one who counts tries can tell "somebody was first" from "our own first try was
stored and its answer was lost". Endpoint, region and credentials come from the usual AWS_* environment variables.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import s3fs
import s3fs.core

from asyncopd.errors import StorageError
from storage.objects import Entries, Entry, Folder, Keys, ObjectStore, check_key

T = TypeVar("T")

MAX_TRIES = 7
"""With the pauses below, about six seconds: longer than a throttle or a reconnect, shorter than a lease."""
FIRST_PAUSE_S = 0.1
MAX_CONDITIONAL_BYTES = 50 * 2**20
"""Conditional bodies must fit one PUT: conditional multipart uploads are not portable."""
_RETRYABLE_CODES = {
    "ConditionalRequestConflict", "OperationAborted", "InternalError", "ServiceUnavailable", "SlowDown", "Throttling",
    "RequestTimeout", "409", "429", "500", "502", "503", "504",
}  # fmt: skip
_RETRYABLE_NAMES = {
    "ClientConnectorError", "ClientOSError", "ConnectTimeoutError", "ConnectionClosedError", "ConnectionError",
    "EndpointConnectionError", "HTTPClientError", "ReadTimeoutError", "ServerDisconnectedError",
}  # fmt: skip


class S3Store(ObjectStore):
    """Objects of one bucket, below an optional prefix: `s3://bucket/prefix`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket:
            raise StorageError(f"{url} names no bucket. Use s3://bucket or s3://bucket/prefix.")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._fs: Any = None
        self._pid = 0

    def put_if_absent(self, key: str, body: bytes, *, durable: bool = True) -> bool:
        if len(body) > MAX_CONDITIONAL_BYTES:
            raise StorageError(
                f"{key}: {len(body)} bytes are too many for one conditional PUT, at most {MAX_CONDITIONAL_BYTES}. "
                "Write large bodies under a unique key with `put` and make them visible with a manifest."
            )
        may_be_stored = False
        for number in range(MAX_TRIES):
            try:
                self._put_new(key, body)
                return True
            except Exception as exc:
                if _lost(exc):
                    return may_be_stored and self.find(key) == body
                self._wait_or_raise(exc, "write", key, number)
                may_be_stored = may_be_stored or not _conflict(exc)
        raise AssertionError("the last try returned or raised")

    def put(self, key: str, body: bytes, *, durable: bool = True) -> None:
        self._retried("write", key, lambda fs: fs.pipe_file(self._path(key), body))

    def find(self, key: str) -> bytes | None:
        # One connection: with more, s3fs asks for the size first, which doubles the requests of a small read.
        path = self._path(key)
        return self._retried("read", key, lambda fs: _or_none(lambda: bytes(fs.cat_file(path, max_concurrency=1))))

    def exists(self, key: str) -> bool:
        return self._head(key) is not None

    def size(self, key: str) -> int:
        head = self._head(key)
        if head is None:
            raise self.missing(key)
        return int(head["ContentLength"])

    def list(self, prefix: str) -> Keys:
        folder = self._path(prefix.rstrip("/")) + "/"
        found = self._retried("list", prefix, lambda fs: _or_none(lambda: fs.find(folder)))
        return sorted(self._key(path) for path in found or [])

    def entries(self, prefix: str) -> Entries:
        folder = self._path(prefix.rstrip("/")) + "/"
        found = self._retried("list", prefix, lambda fs: _or_none(lambda: fs.find(folder, detail=True))) or {}
        return sorted(
            (
                Entry(self._key(path), int(entry["size"]), entry["LastModified"].timestamp())
                for path, entry in found.items()
            ),
            key=lambda entry: entry.key,
        )

    def folder(self, prefix: str) -> Folder:
        folder = self._path(prefix.rstrip("/")) + "/"
        found = self._retried("list", prefix, lambda fs: _or_none(lambda: fs.ls(folder, detail=True))) or []
        return Folder(
            keys=sorted(self._key(entry["name"]) for entry in found if entry["type"] == "file"),
            folders=sorted(
                entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in found if entry["type"] == "directory"
            ),
        )

    def delete(self, key: str) -> None:
        self._retried(
            "delete", key, lambda fs: fs.call_s3("delete_object", Bucket=self._bucket, Key=self._object_name(key))
        )

    # -- requests -------------------------------------------------------------------------------------------------
    def _put_new(self, key: str, body: bytes) -> None:
        self._filesystem().pipe_file(self._path(key), body, mode="create")

    def _head(self, key: str) -> Any:
        name = self._object_name(key)
        return self._retried(
            "read", key, lambda fs: _or_none(lambda: fs.call_s3("head_object", Bucket=self._bucket, Key=name))
        )

    def _object_name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{self._object_name(key)}"

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._bucket}/{self._prefix}")

    def _filesystem(self) -> Any:
        """The s3fs instance of this process: its event loop does not survive a fork."""
        with self._lock:
            if self._fs is None or self._pid != os.getpid():
                self._fs = s3fs.S3FileSystem(
                    skip_instance_cache=True,
                    use_listings_cache=False,
                    config_kwargs={"retries": {"total_max_attempts": 1}, "max_pool_connections": 32},
                )
                self._fs.retries = 1
                self._pid = os.getpid()
            return self._fs

    def _retried(self, action: str, key: str, request: Callable[[Any], T]) -> T:
        for number in range(MAX_TRIES):
            try:
                return request(self._filesystem())
            except Exception as exc:
                self._wait_or_raise(exc, action, key, number)
        raise AssertionError("the last try returned or raised")

    def _wait_or_raise(self, exc: Exception, action: str, key: str, number: int) -> None:
        """Pause before the next try, or raise StorageError when `exc` is final or the tries are used up."""
        if _transient(exc) and number + 1 < MAX_TRIES:
            time.sleep(FIRST_PAUSE_S * 2**number * random.uniform(0.5, 1.0))
            return
        if isinstance(exc, StorageError):
            raise exc
        raise StorageError(
            f"could not {action} {key} in {self.url} after {number + 1} tries: {type(exc).__name__}: {exc}. "
            f"{_advice(exc)}"
        ) from exc


def _or_none(request: Callable[[], T]) -> T | None:
    """The request's answer, or None when the key does not exist; a missing bucket stays an error."""
    try:
        return request()
    except FileNotFoundError as exc:
        if _code(exc) == "NoSuchBucket":
            raise
        return None


def _code(exc: BaseException) -> str:
    """The S3 error code behind an s3fs exception; empty when there is none."""
    response = getattr(exc.__cause__, "response", None) or getattr(exc, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _lost(exc: BaseException) -> bool:
    """Was the PUT refused because the key exists? Ceph answers without the detail s3fs looks for, hence the code."""
    return isinstance(exc, FileExistsError) or _code(exc) in ("PreconditionFailed", "412")


def _conflict(exc: BaseException) -> bool:
    """Was the PUT refused because another one was under way? Then ours was certainly not stored."""
    return _code(exc) in ("ConditionalRequestConflict", "OperationAborted", "409")


def _transient(exc: BaseException) -> bool:
    if _code(exc):
        return _code(exc) in _RETRYABLE_CODES
    return (
        isinstance(exc, (*s3fs.core.S3_RETRYABLE_ERRORS, ConnectionError, TimeoutError))
        or (isinstance(exc, OSError) and exc.errno in (errno.EBUSY, errno.ECONNRESET, errno.EPIPE))
        or bool(_RETRYABLE_NAMES & {base.__name__ for base in type(exc).__mro__})
    )


def _advice(exc: BaseException) -> str:
    if _code(exc) == "NoSuchBucket":
        return "Create the bucket, or correct the storage root."
    if isinstance(exc, PermissionError) or type(exc).__name__ == "NoCredentialsError":
        return "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy."
    return "Check AWS_ENDPOINT_URL and the server's health, then start again; nothing is lost."
