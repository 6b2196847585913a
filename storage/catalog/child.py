"""The process that runs one query and ends: `python -I -c …main()` with an empty environment (sandbox.py starts it).

    stdin   the request, pickled by the parent: the query, what it can see, and its limits
    stdout  a line of JSON (started or error), an Arrow IPC stream of the rows, a line of JSON (how it ended)

Starts with imports only and no data, so that one can be kept waiting. Everything it may know comes through stdin.
`check` decides what SQL of other people may say. It is the outer of several walls: behind it the connection has no
external access and a locked configuration, and the process has limits. It is here for its messages, and because
`arrow_scan` would take any number for an address.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.ipc

from asyncopd.errors import QueryError, ShardCorruptError, StorageError
from storage.catalog.connection import DataFile, Place, connect
from storage.catalog.decoders import TokenTexts
from storage.catalog.relations import BY_NAME

ADDRESS_SPACE_BYTES = 4 * 2**30
"""On top of the query's memory: what libraries and thread stacks reserve without using it (2.1 GB measured with two
threads), what pyarrow decodes, and slack. It ends a process that grows outside DuckDB's own count."""
BATCH_ROWS = 8192
TABLE_FUNCTIONS = frozenset({"unnest", "range", "generate_series", "json_each", "json_tree", "repeat"})
"""Table functions that look at nothing but their arguments."""
_FORBIDDEN_FUNCTIONS = frozenset(
    {"getenv", "current_setting", "getvariable", "write_log", "json_execute_serialized_sql", "nextval", "currval"}
)
ALLOWED = (
    "Allowed is one SELECT (also WITH, FROM, VALUES, DESCRIBE, SUMMARIZE) over the relations of the catalog: "
    "`from documentation` lists them. Files, network, settings and other statements are not."
)
_DAMAGE = (
    "CRC checksum verification failed",
    "could not verify page integrity",
    "Data corruption detected",
    "decompression failed",
    "Corrupted",
    "deserialize thrift",
    "Unexpected end of stream",
    "Parquet magic bytes not found",
    "Invalid Parquet",
    # A file that Arrow read into columns that do not fit together.
    "failed: Invalid: Column",
)
"""What DuckDB and Arrow say of a damaged Parquet file. Pages carry checksums (storage/schema.py); an object's sha256
covers its footer too, but needs the whole object: `asyncopd maintain audit` checks that."""


@dataclass(frozen=True)
class QueryLimits:
    """What one query may use."""

    max_rows: int = 100_000
    """Rows returned; more are cut off and the result says so. 0 for no limit."""
    timeout_s: float = 30.0
    """Wall time of the query itself, s."""
    memory_bytes: int = 512 * 2**20
    """DuckDB's memory; nothing is spilled to disk. 512 MiB sort two million rows beside a trainer."""
    threads: int = 2
    max_result_bytes: int = 256 * 2**20
    """Bytes of the result as Arrow; 0 for no limit."""


@dataclass(frozen=True)
class Request:
    """One query with everything it can see; the fields of a Snapshot among it."""

    sql: str
    parameters: Mapping[str, Any]
    tables: Mapping[str, Any]
    files: Mapping[str, Sequence[DataFile]]
    place: Place
    token_texts: Mapping[str, TokenTexts]
    limits: QueryLimits


def main() -> None:
    """Serve one request; never returns."""
    # What libraries print (DuckDB's progress bar, for one) must not get between the rows.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # pyarrow's default allocator reserves address space by the gigabyte.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        request: Request = pickle.load(sys.stdin.buffer)
        _limit_process(request.limits)
        _serve(request, out)
    except BaseException as error:
        _write(out, _explained(error))
    # Not sys.exit: nothing here needs tearing down, and DuckDB's bindings complain when it happens in this order.
    os._exit(0)


def _limit_process(limits: QueryLimits) -> None:
    address_space = limits.memory_bytes + ADDRESS_SPACE_BYTES
    for limit, value in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_CPU, int(limits.timeout_s * limits.threads) + 5),
        (resource.RLIMIT_FSIZE, 0),  # no file can grow, whoever asks
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _serve(request: Request, out: BinaryIO) -> None:
    limits = request.limits
    connection = connect(
        request.tables,
        request.files,
        request.place,
        request.token_texts,
        sql=request.sql,
        memory_bytes=limits.memory_bytes,
        threads=limits.threads,
        locked=True,
    )
    check(connection, request.sql, BY_NAME)
    started = time.monotonic()
    timer = threading.Timer(limits.timeout_s, connection.interrupt)
    timer.daemon = True
    timer.start()
    reader = connection.sql(request.sql, params=dict(request.parameters) or None).to_arrow_reader(BATCH_ROWS)
    _write(out, {"started": True})
    num_rows, truncated = 0, False
    ending: dict[str, Any] = {}
    with pa.ipc.new_stream(out, reader.schema) as writer:
        try:
            for batch, is_last in _limited(reader, limits.max_rows):
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


def check(connection: duckdb.DuckDBPyConnection, sql: str, relations: Collection[str]) -> None:
    """Raise QueryError unless `sql` is one allowed SELECT. Runs nothing of it."""
    # All rows are fetched, there being one: DuckDB refuses the next query while a result is open.
    ((serialised,),) = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    tree = json.loads(serialised)
    if tree.get("error"):
        raise QueryError(f"{tree.get('error_message', 'the query could not be read')} {ALLOWED}")
    if len(tree["statements"]) != 1:
        raise QueryError(f"found {len(tree['statements'])} statements. {ALLOWED}")
    nodes = list(_nodes(tree["statements"]))
    named_here = {entry["key"].lower() for node in nodes for entry in (node.get("cte_map") or {}).get("map", [])}
    known = {*relations, *named_here}
    for node in nodes:
        if node.get("type") == "TABLE_FUNCTION":
            function = node["function"]["function_name"].lower()
            if function not in TABLE_FUNCTIONS:
                raise QueryError(
                    f"table function {function} is not allowed; {', '.join(sorted(TABLE_FUNCTIONS))} are. {ALLOWED}"
                )
        elif node.get("type") == "BASE_TABLE":
            _check_table(node, known, relations)
        elif node.get("class") == "FUNCTION" and node["function_name"].lower() in _FORBIDDEN_FUNCTIONS:
            raise QueryError(f"function {node['function_name']} is not allowed. {ALLOWED}")


def _check_table(node: dict[str, Any], known: Collection[str], relations: Collection[str]) -> None:
    name, schema, catalog = node["table_name"].lower(), node.get("schema_name", ""), node.get("catalog_name", "")
    if name in known and schema in ("", "main") and catalog in ("", "memory"):
        return
    full = ".".join(part for part in (catalog, schema, node["table_name"]) if part)
    raise QueryError(f"there is no relation {full}; there are {', '.join(sorted(relations))}. {ALLOWED}")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a parse tree; a loop, because a user decides how deep it is."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def is_damage(message: str) -> bool:
    """Is this what DuckDB or Arrow says of a damaged Parquet file?"""
    return any(sign.lower() in message.lower() for sign in _DAMAGE)


def damaged(message: str) -> ShardCorruptError:
    """The error for the caller to raise."""
    return ShardCorruptError(
        f"a shard that the query reads is damaged: {message} `asyncopd maintain audit RUN_ID` names it and the command "
        "that sets it aside; filter by index or run to ask the others."
    )
