"""SQL from anybody: each query in a process of its own, with nothing in its environment and limits on everything.

    caller --query--> Sandbox --request--> child.py, one query long --rows as they come--> RunningQuery --> caller
                                               ^--- kill: deadline, cancel, a result too large, nobody reads on

The child gets what the query can see and nothing else. A deadline, a crash or `cancel` ends the child and nobody else.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc

from asyncopd.errors import QueryError, QueryLimitError, StorageError
from storage.catalog.child import QueryLimits, Request, damaged
from storage.catalog.relations import mentioned
from storage.catalog.rows import AsOf
from storage.catalog.snapshot import Catalog, Snapshot

_GRACE_S = 2.0
"""After its deadline a child has this long to say so itself."""
_ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class QueryResult:
    """The rows of a finished query."""

    table: Any
    """pyarrow.Table."""
    truncated: bool
    """There were more rows than `max_rows`."""
    seconds: float
    """Time the query itself took, without reading the catalog and starting its process."""

    def rows(self) -> list[dict[str, Any]]:
        """Row by row, as Python values."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows


class Sandbox:
    """Answers queries on a catalog. Calls block; any number of threads may call at once, `max_concurrent` run."""

    def __init__(
        self,
        catalog: Catalog,
        limits: QueryLimits | None = None,
        *,
        max_concurrent: int = 2,
        prestart: bool = False,
    ) -> None:
        """`prestart` keeps one idle child, which saves the next query the start of Python; `close` ends it."""
        self.catalog = catalog
        self.limits = limits or QueryLimits()
        self._places = threading.BoundedSemaphore(max_concurrent)
        self._prestart = prestart
        self._spare: subprocess.Popen[bytes] | None = start_child() if prestart else None
        self._lock = threading.Lock()

    def query(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        limits: QueryLimits | None = None,
        as_of: AsOf | None = None,
    ) -> QueryResult:
        """Run one SELECT to its end.

        Args:
            parameters: values of the query's $names; numbers, strings, booleans, None, or lists of them.
        Raises:
            QueryError: the query is wrong, or not allowed.
            QueryLimitError: it went beyond its time, its memory or the size of its result.
            StorageError: what it would read cannot be read.
        """
        try:
            return self.start(sql, parameters, limits=limits, as_of=as_of).result()
        except FileGoneError:
            # Files were collected or quarantined since their manifest was read: look again, once.
            self.catalog.forget()
            return self.start(sql, parameters, limits=limits, as_of=as_of).result()

    def start(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        limits: QueryLimits | None = None,
        as_of: AsOf | None = None,
        runs: Sequence[str] | None = None,
    ) -> RunningQuery:
        """Begin a query whose rows are taken in batches, or which may have to be cancelled.

        `runs` are those it sees; None for all of the catalog.
        """
        limits = limits or self.limits
        snapshot = self.catalog.snapshot(mentioned(sql), as_of, runs)
        request = _request(snapshot, sql, parameters or {}, limits)
        self._places.acquire()
        try:
            child = self._take_child()
            return RunningQuery(child, request, limits, self._has_ended)
        except BaseException:
            self._places.release()
            raise

    def close(self) -> None:
        """End the idle child."""
        with self._lock:
            self._prestart = False
            if self._spare is not None:
                end_child(self._spare)
                self._spare = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_child(self) -> subprocess.Popen[bytes]:
        with self._lock:
            spare, self._spare = self._spare, None
        return spare if spare is not None and spare.poll() is None else start_child()

    def _has_ended(self) -> None:
        self._places.release()
        with self._lock:
            # Not before: starting Python would slow down the query at work.
            if self._prestart and self._spare is None:
                self._spare = start_child()


def _request(snapshot: Snapshot, sql: str, parameters: Mapping[str, Any], limits: QueryLimits) -> bytes:
    if snapshot.place.kind == "memory":
        raise StorageError(
            "a memory:// root lives in one process, and queries run in another. Use a path or s3://, or ask in this "
            "process with open_run(...).sql."
        )
    try:
        json.dumps(dict(parameters))
    except TypeError as error:
        raise QueryError(
            f"parameters {dict(parameters)!r}: {error}. Use numbers, strings, booleans or lists."
        ) from error
    request = Request(
        sql, dict(parameters), snapshot.tables, snapshot.files, snapshot.place, snapshot.token_texts, limits
    )
    # Only this way round: what a child answers is read as JSON and Arrow.
    return pickle.dumps(request)


class RunningQuery:
    """One child at work. Call `result`, or use `batches` up or close it, even after `cancel`: that frees its place."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        request: bytes,
        limits: QueryLimits,
        release: Callable[[], None],
    ) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._child = child
        self._limits = limits
        self._release = release
        self._is_reaped = threading.Lock()
        self._killed_for = ""
        self._counted = _Counted(child.stdout, limits.max_result_bytes)
        self._reader: Any = None
        self.ending: Mapping[str, Any] = {}
        """How it ended: `rows`, `truncated`, `seconds`; empty before."""
        self._deadline = threading.Timer(limits.timeout_s + _GRACE_S, self._kill, ["time"])
        self._deadline.daemon = True
        self._deadline.start()
        # A child that dies while it is written to says why, or how, when its answer is read.
        with contextlib.suppress(OSError):
            child.stdin.write(request)
            child.stdin.close()

    def cancel(self) -> None:
        """End the query now, from any thread; whoever waits for it gets QueryError."""
        self._kill("cancelled")

    def result(self) -> QueryResult:
        """All rows. Raises as `Sandbox.query` does."""
        schema = self.schema()
        table = pa.Table.from_batches(list(self.batches()), schema=schema)
        return QueryResult(table, bool(self.ending["truncated"]), float(self.ending["seconds"]))

    def schema(self) -> Any:
        """Arrow schema of the rows, as soon as the query has started. Raises as `Sandbox.query` does."""
        if self._reader is None:
            self._line()
            try:
                self._reader = pa.ipc.open_stream(self._counted)
            except (pa.ArrowException, OSError) as error:
                raise self._broken() from error
        return self._reader.schema

    def batches(self) -> Iterator[Any]:
        """The rows as Arrow record batches, as they come. Raises as `Sandbox.query` does."""
        try:
            self.schema()
            try:
                yield from self._reader
            except (pa.ArrowException, OSError) as error:
                raise self._broken() from error
            self.ending = self._line()
        finally:
            self._kill("abandoned")
            self._reap()

    # -- private --------------------------------------------------------------------------------------------------
    def _line(self) -> Mapping[str, Any]:
        """The child's next line; raises what it says, or why there is none."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._broken()
        fields: Mapping[str, Any] = json.loads(line)
        if "error" in fields:
            self._reap()
            raise _error(fields["error"], fields["message"], self._limits)
        return fields

    def _broken(self) -> Exception:
        """The stream stopped: why the child is gone, or that its result was too large."""
        if self._counted.is_over:
            self._kill("result")
        self._reap()
        if self._killed_for:
            return _error(self._killed_for, "", self._limits)
        status = self._child.returncode
        return _error("time" if status == -signal.SIGXCPU else "crash", f"status {status}", self._limits)

    def _kill(self, reason: str) -> None:
        if self._child.poll() is None:
            self._killed_for = self._killed_for or reason
            self._child.kill()

    def _reap(self) -> None:
        """Wait for the child, which has ended or ends now; free its place, once."""
        if self._is_reaped.acquire(blocking=False):
            self._deadline.cancel()
            end_child(self._child, patience_s=_GRACE_S)
            self._release()


class FileGoneError(StorageError):
    """A data file vanished between the manifest and the query."""


def start_child() -> subprocess.Popen[bytes]:
    """A child that waits for its request; nothing of ours is in its environment."""
    # -I: neither PYTHON* variables nor the present folder decide what is imported.
    code = f"import sys; sys.path.insert(0, {_ROOT!r}); from storage.catalog.child import main; main()"
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )


def end_child(child: subprocess.Popen[bytes], patience_s: float = 0.0) -> None:
    """Wait for `child`, with a kill when it takes longer than `patience_s`, and close its pipes."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(patience_s)
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


class _Counted:
    """A binary stream that refuses to deliver more than `max_bytes`."""

    def __init__(self, source: IO[bytes], max_bytes: int) -> None:
        self._source, self._max_bytes, self._read = source, max_bytes, 0
        self.closed = False

    @property
    def is_over(self) -> bool:
        return bool(self._max_bytes) and self._read > self._max_bytes

    def read(self, size: int = -1) -> bytes:
        # Asked before it is allocated: one row alone may be larger than all that is allowed.
        self._read += max(size, 0)
        if self.is_over:
            raise OSError("the result is too large")
        return self._source.read(size)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def _error(kind: str, message: str, limits: QueryLimits) -> Exception:
    if kind == "missing":
        return FileGoneError(f"{message} If it stays away: restore the object or the manifest that names it.")
    if kind == "corrupt":
        return damaged(message)
    if kind == "memory":
        return QueryLimitError(
            f"the query needs more than {limits.memory_bytes // 2**20} MiB of memory. Select fewer columns or rows, or "
            f"aggregate before joining. ({message})"
        )
    if kind == "time":
        return QueryLimitError(
            f"the query took longer than {limits.timeout_s:g} s. Filter by run or index, or aggregate fewer rows."
        )
    if kind == "result":
        return QueryLimitError(
            f"the result is larger than {limits.max_result_bytes // 2**20} MiB. Select fewer columns, or add LIMIT."
        )
    if kind in ("cancelled", "abandoned"):
        return QueryError(f"the query was {kind}.")
    if kind == "crash":
        return QueryError(f"the process of the query died ({message}); nothing else is affected. Say it another way.")
    return QueryError(message)
