"""What SQL of other people may say: one SELECT over the catalog's relations. Checked on DuckDB's own parse tree.

This is the outer of several walls: behind it the connection has no external access and a locked configuration, and
the process has limits. It is here for its messages, and because `arrow_scan` would take any number for an address.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

import duckdb

from asyncopd.errors import QueryError

TABLE_FUNCTIONS = frozenset({"unnest", "range", "generate_series", "json_each", "json_tree", "repeat"})
"""Table functions that look at nothing but their arguments."""
_FORBIDDEN_FUNCTIONS = frozenset(
    {"getenv", "current_setting", "getvariable", "write_log", "json_execute_serialized_sql", "nextval", "currval"}
)
ALLOWED = (
    "Allowed is one SELECT (also WITH, FROM, VALUES, DESCRIBE, SUMMARIZE) over the relations of the catalog: "
    "`from documentation` lists them. Files, network, settings and other statements are not."
)


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
