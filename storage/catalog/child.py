"""The process that runs one query and ends: `python -I -c …main()` with an empty environment (sandbox.py starts it).

    stdin   pickled by the parent: the query, its parameters, what it can see, and its limits
    stdout  two Arrow IPC streams: the rows, once the query runs; and one without columns, whose schema says in its
            metadata how it ended

Everything it may know comes through stdin.
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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.ipc

from asyncopd.errors import QueryError, ShardCorruptError, StorageError
from storage.catalog.connection import Snapshot, connect
from storage.catalog.relations import BY_NAME

ADDRESS_SPACE_BYTES = 4 * 2**30
"""On top of the query's memory: what libraries and thread stacks reserve without using it (2.1 GB measured with two
threads), what pyarrow decodes, and slack. It ends a process that grows outside DuckDB's own count."""
BATCH_ROWS = 8192
ENDING = b"ending"
"""Key of the metadata that say how a query ended: `truncated` and `seconds`, or `error` and `message`."""
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
"""What DuckDB and Arrow say of a damaged Parquet file. Pages carry checksums (storage/parquet.py); an object's sha256
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


def main() -> None:
    """Serve one request; never returns."""
    # What libraries print (DuckDB's progress bar, for one) must not get between the rows.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # pyarrow's default allocator reserves address space by the gigabyte.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        sql, parameters, snapshot, limits = pickle.load(sys.stdin.buffer)
        _limit_process(limits)
        ending = _serve(sql, parameters, snapshot, limits, out)
    except BaseException as error:
        ending = _explained(error)
    pa.ipc.new_stream(out, pa.schema([], metadata={ENDING: json.dumps(ending)})).close()
    out.flush()
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


def _serve(
    sql: str, parameters: Mapping[str, Any], snapshot: Snapshot, limits: QueryLimits, out: BinaryIO
) -> dict[str, Any]:
    """Write the rows to `out`; returns how it ended. Raises while nothing is written yet."""
    connection = connect(snapshot, sql=sql, memory_bytes=limits.memory_bytes, threads=limits.threads, locked=True)
    check(connection, sql, BY_NAME)
    started = time.monotonic()
    timer = threading.Timer(limits.timeout_s, connection.interrupt)
    timer.daemon = True
    timer.start()
    reader = connection.sql(sql, params=dict(parameters) or None).to_arrow_reader(BATCH_ROWS)
    left, is_cut = limits.max_rows, False
    with pa.ipc.new_stream(out, reader.schema) as writer:
        try:
            for batch in reader:
                is_cut = bool(limits.max_rows) and batch.num_rows > left
                writer.write_batch(batch.slice(0, left) if is_cut else batch)
                if is_cut:
                    break
                left -= batch.num_rows
        except BaseException as error:
            # The stream has begun, so it is closed properly and the reason follows it.
            return _explained(error)
    return {"truncated": is_cut, "seconds": time.monotonic() - started}


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
            name, schema, catalog = node["table_name"], node.get("schema_name", ""), node.get("catalog_name", "")
            if name.lower() not in known or schema not in ("", "main") or catalog not in ("", "memory"):
                full = ".".join(part for part in (catalog, schema, name) if part)
                raise QueryError(f"there is no relation {full}; there are {', '.join(sorted(relations))}. {ALLOWED}")
        elif node.get("class") == "FUNCTION" and node["function_name"].lower() in _FORBIDDEN_FUNCTIONS:
            raise QueryError(f"function {node['function_name']} is not allowed. {ALLOWED}")


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
