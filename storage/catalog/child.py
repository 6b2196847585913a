"""The process that runs one query and ends: `python -I -c …main()` with an empty environment (sandbox.py starts it).

    stdin   a line of JSON (request), then the Arrow IPC streams of the record relations, sizes in the request
    stdout  a line of JSON (started or error), an Arrow IPC stream of the rows, a line of JSON (how it ended)

Starts with imports only and no data, so that one can be kept waiting. Everything it may know comes through stdin.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.ipc

from asyncopd.errors import QueryError, StorageError
from storage.catalog.allowed import check
from storage.catalog.connection import connect
from storage.catalog.damage import is_damage
from storage.catalog.decoders import TokenTexts
from storage.catalog.files import DataFile, Place
from storage.catalog.relations import BY_NAME

ADDRESS_SPACE_BYTES = 4 * 2**30
"""On top of the query's memory: what libraries and thread stacks reserve without using it (2.1 GB measured with two
threads), what pyarrow decodes, and slack. It ends a process that grows outside DuckDB's own count."""
BATCH_ROWS = 8192


def main() -> None:
    """Serve one request; never returns."""
    # What libraries print (DuckDB's progress bar, for one) must not get between the rows.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        request = json.loads(sys.stdin.buffer.readline())
        _set_limits(request)
        _serve(request, sys.stdin.buffer, out)
    except BaseException as error:
        _write(out, _explained(error))
    # Not sys.exit: nothing here needs tearing down, and DuckDB's bindings complain when it happens in this order.
    os._exit(0)


def _set_limits(request: dict[str, Any]) -> None:
    # pyarrow's default allocator reserves address space by the gigabyte.
    pa.set_memory_pool(pa.system_memory_pool())
    address_space = request["memory_bytes"] + ADDRESS_SPACE_BYTES
    cpu_s = int(request["timeout_s"] * request["threads"]) + 5
    for limit, value in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),  # no file can grow, whoever asks
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _serve(request: dict[str, Any], source: BinaryIO, out: BinaryIO) -> None:
    tables = {name: pa.ipc.open_stream(pa.py_buffer(source.read(size))).read_all() for name, size in request["tables"]}
    sql = request["sql"]
    connection = connect(
        tables,
        {name: [DataFile(*file) for file in files] for name, files in request["files"].items()},
        Place(**request["place"]),
        {run: TokenTexts(**texts) for run, texts in request["token_texts"].items()},
        sql=sql,
        memory_bytes=request["memory_bytes"],
        threads=request["threads"],
        locked=True,
    )
    check(connection, sql, BY_NAME)
    started = time.monotonic()
    timer = threading.Timer(request["timeout_s"], connection.interrupt)
    timer.daemon = True
    timer.start()
    reader = connection.sql(sql, params=request["parameters"] or None).to_arrow_reader(BATCH_ROWS)
    _write(out, {"started": True})
    num_rows, truncated = 0, False
    ending: dict[str, Any] = {}
    with pa.ipc.new_stream(out, reader.schema) as writer:
        try:
            for batch, is_last in _limited(reader, request["max_rows"]):
                writer.write_batch(batch)
                num_rows += batch.num_rows
                truncated = is_last
        except BaseException as error:
            # The stream has begun, so it is closed properly and the reason follows it.
            ending = _explained(error)
    _write(out, {"rows": num_rows, "truncated": truncated, "seconds": time.monotonic() - started, **ending})


def _limited(reader: Any, max_rows: int) -> Iterator[tuple[Any, bool]]:
    """(batch, were rows cut off?) up to `max_rows` rows; 0 is no limit."""
    left = max_rows
    for batch in reader:
        if max_rows and batch.num_rows > left:
            yield batch.slice(0, left), True
            return
        left -= batch.num_rows
        yield batch, False


def _explained(error: BaseException) -> dict[str, Any]:
    """The error as the parent raises it again; `kind` is one of query, memory, time, corrupt, missing."""
    message = str(error) or type(error).__name__
    kind = "query"
    if isinstance(error, duckdb.OutOfMemoryException | MemoryError | pa.ArrowMemoryError):
        kind = "memory"
    elif isinstance(error, duckdb.InterruptException) or "INTERRUPT" in message:
        kind = "time"
    elif any(sign in message for sign in ("bad allocation", "realloc of size", "malloc of size", "bad_alloc")):
        kind = "memory"
    elif is_damage(message):
        kind = "corrupt"
    elif any(sign in message for sign in ("No such file", "NoSuchKey", "NO_SUCH_KEY", "Path does not exist")):
        kind = "missing"
    if not isinstance(error, QueryError | StorageError | duckdb.Error | MemoryError | pa.ArrowException | OSError):
        message = f"{type(error).__name__}: {message}"
    return {"error": kind, "message": message}


def _write(out: BinaryIO, fields: dict[str, Any]) -> None:
    out.write(json.dumps(fields).encode() + b"\n")
    out.flush()
