"""SQL from anybody: each query in a process of its own, with nothing in its environment and limits on everything.

    caller --query--> Sandbox --request--> child.py, one query long --rows as they come--> RunningQuery --> caller
                                               ^--- kill: deadline, cancel, a result too large, nobody reads on

The child gets what the query can see and nothing else. A deadline, a crash or `cancel` ends the child and nobody else.
"""

from __future__ import annotations

import contextlib
import io
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
from storage.catalog.child import ENDING, QueryLimits, damaged
from storage.catalog.relations import mentioned
from storage.catalog.rows import AsOf
from storage.catalog.snapshot import Catalog

_GRACE_S = 10.0
"""A child keeps its deadline itself; this much later it is killed. It covers the start of Python on a busy machine."""
_EXIT_S = 2.0
"""A child that closed its pipe is about to end; its status says how."""
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

    def __init__(self, catalog: Catalog, limits: QueryLimits | None = None, *, max_concurrent: int = 2) -> None:
        self.catalog = catalog
        self.limits = limits or QueryLimits()
        self._places = threading.BoundedSemaphore(max_concurrent)

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
        limits, given = limits or self.limits, dict(parameters or {})
        snapshot = self.catalog.snapshot(mentioned(sql), as_of, runs)
        if snapshot.place.kind == "memory":
            raise StorageError(
                "a memory:// root lives in one process, and queries run in another. Use a path or s3://, or ask in "
                "this process with open_run(...).sql."
            )
        try:
            json.dumps(given)
        except TypeError as error:
            raise QueryError(f"parameters {given!r}: {error}. Use numbers, strings, booleans or lists.") from error
        # Only this way round: what a child answers is read as Arrow and JSON.
        request = pickle.dumps((sql, given, snapshot, limits))
        self._places.acquire()
        try:
            return RunningQuery(request, limits, self._places.release)
        except BaseException:
            self._places.release()
            raise


class RunningQuery:
    """One child at work. Call `result`, or use `batches` up or close it, even after `cancel`: that frees its place."""

    def __init__(self, request: bytes, limits: QueryLimits, release: Callable[[], None]) -> None:
        # -I: neither PYTHON* variables nor the present folder decide what is imported.
        code = f"import sys; sys.path.insert(0, {_ROOT!r}); from storage.catalog.child import main; main()"
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._limits, self._release = limits, release
        self._is_reaped = False
        self._killed_for = ""
        self._answer = _Counted(self._child.stdout, limits.max_result_bytes)
        self._rows: Any = None
        self.ending: Mapping[str, Any] = {}
        """How it ended: `truncated`, `seconds`; empty before."""
        self._deadline = threading.Timer(limits.timeout_s + _GRACE_S, self._kill, ["time"])
        self._deadline.daemon = True
        self._deadline.start()
        # A child that dies while it is written to says why, or how, when its answer is read.
        with contextlib.suppress(OSError):
            self._child.stdin.write(request)
            self._child.stdin.close()

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
        if self._rows is None:
            self._rows = self._stream()
        return self._rows.schema

    def batches(self) -> Iterator[Any]:
        """The rows as Arrow record batches, as they come. Raises as `Sandbox.query` does."""
        try:
            self.schema()
            try:
                yield from self._rows
            except (pa.ArrowException, OSError) as error:
                raise self._broken() from error
            self.ending = json.loads(self._stream().schema.metadata[ENDING])
        finally:
            self._kill("abandoned")
            self._reap()

    def _stream(self) -> Any:
        """The child's next Arrow stream; raises what it says, or why there is none."""
        try:
            stream = pa.ipc.open_stream(self._answer)
        except (pa.ArrowException, OSError) as error:
            raise self._broken() from error
        said = json.loads((stream.schema.metadata or {}).get(ENDING, "{}"))
        if "error" in said:
            self._reap()
            raise _error(said["error"], said["message"], self._limits)
        return stream

    def _broken(self) -> Exception:
        """The stream stopped: why the child is gone, or that its result was too large."""
        if self._answer.is_over:
            self._kill("result")
        self._reap()
        status = self._child.returncode
        why = self._killed_for or ("time" if status == -signal.SIGXCPU else "crash")
        return _error(why, f"status {status}", self._limits)

    def _kill(self, reason: str) -> None:
        if self._child.poll() is None:
            self._killed_for = self._killed_for or reason
            self._child.kill()

    def _reap(self) -> None:
        """Wait for the child, which has ended or ends now; free its place, once."""
        if self._is_reaped:
            return
        self._is_reaped = True
        self._deadline.cancel()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_EXIT_S)
        self._child.kill()
        # Closes its pipes and waits; what it may still say is not asked for.
        with contextlib.suppress(OSError), self._child:
            pass
        self._release()


class FileGoneError(StorageError):
    """A data file vanished between the manifest and the query."""


class _Counted(io.RawIOBase):
    """A binary stream that refuses to deliver more than `max_bytes`; 0 is no limit."""

    def __init__(self, source: IO[bytes], max_bytes: int) -> None:
        self._source, self._max_bytes, self._num_asked = source, max_bytes, 0

    @property
    def is_over(self) -> bool:
        return bool(self._max_bytes) and self._num_asked > self._max_bytes

    def read(self, size: int = -1) -> bytes:
        # Asked before it is allocated: one row alone may be larger than all that is allowed.
        self._num_asked += max(size, 0)
        if self.is_over:
            raise OSError("the result is too large")
        return self._source.read(size)

    def readable(self) -> bool:
        return True


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
