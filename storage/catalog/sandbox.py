"""SQL from anybody: each query in a process of its own, with nothing in its environment and limits on everything.

    caller --query--> Sandbox --snapshot, request--> child.py (one query, then gone) --rows--> caller

The child gets what the query can see and nothing else. A deadline, a crash or `cancel` ends the child and nobody else.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from asyncopd.errors import QueryError, StorageError
from storage.catalog.cut import AsOf
from storage.catalog.query_process import (
    FileGoneError,
    QueryLimits,
    QueryResult,
    RunningQuery,
    end_child,
    start_child,
)
from storage.catalog.relations import mentioned
from storage.catalog.snapshot import Catalog, Snapshot


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
            # Files were merged or quarantined since their manifest was read: look again, once.
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


def _request(snapshot: Snapshot, sql: str, parameters: Mapping[str, Any], limits: QueryLimits) -> list[bytes]:
    if snapshot.place.kind == "memory":
        raise StorageError(
            "a memory:// root lives in one process, and queries run in another. Use a path or s3://, or ask in this "
            "process with open_run(...).sql."
        )
    bodies = [_stream(table) for table in snapshot.tables.values()]
    fields = {
        "sql": sql,
        "parameters": dict(parameters),
        "files": {
            name: [(file.key, file.run, file.shard, file.row_group, file.labels) for file in files]
            for name, files in snapshot.files.items()
        },
        "place": asdict(snapshot.place),
        "token_texts": {run: asdict(texts) for run, texts in snapshot.token_texts.items()},
        "tables": [(name, len(body)) for name, body in zip(snapshot.tables, bodies, strict=True)],
        **asdict(limits),
    }
    try:
        return [json.dumps(fields).encode() + b"\n", *bodies]
    except TypeError as error:
        raise QueryError(
            f"parameters {dict(parameters)!r}: {error}. Use numbers, strings, booleans or lists."
        ) from error


def _stream(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
