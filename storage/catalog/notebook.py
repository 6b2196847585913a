"""A run opened for a notebook: its typed log, and its relations as tables. `asyncopd.open_run` is this `open_run`.

SQL runs in the caller's own process with all of DuckDB; SQL of other people belongs in sandbox.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from asyncopd.config import RunConfig
from asyncopd.errors import QueryError
from storage import runs
from storage.catalog.child import damaged, is_damage
from storage.catalog.connection import connect
from storage.catalog.relations import BY_NAME, mentioned
from storage.catalog.rows import AsOf
from storage.catalog.snapshot import Catalog
from storage.catalog.stored_queries import find_query
from storage.layout import split_run_path
from storage.run_log import StoredRunLog
from storage.stores import open_store

_MEMORY_BYTES = 2 * 2**30


class OpenedRun:
    """One run to look at."""

    def __init__(self, log: StoredRunLog) -> None:
        self.log = log
        """Typed access: `log.steps()`, `log.read_trajectories(shard)`, `log.read_scores(teacher, shard)`, ..."""
        self.run_id = log.run_id
        self._catalog = Catalog(log.store, [log.run_id])

    @property
    def config(self) -> RunConfig:
        """The configuration it was started with."""
        return RunConfig.model_validate(self.log.record["config"])

    def sql(
        self, query: str, parameters: Mapping[str, Any] | None = None, *, as_of: AsOf | None = None, **more: Any
    ) -> Rows:
        """The rows of a query, or of a stored query by its name; parameters also as keywords.

        Every call looks at what is stored now. Raises QueryError, or what DuckDB raises, when the query is wrong;
        ShardCorruptError when it read a damaged page.
        """
        stored, given = find_query(query), {**(parameters or {}), **more}
        sql, values = (query, given) if stored is None else (stored.sql, stored.arguments(given))
        snapshot = self._catalog.snapshot(mentioned(sql), as_of)
        with connect(snapshot, sql=sql, memory_bytes=_MEMORY_BYTES) as connection:
            try:
                relation = connection.sql(sql, params=values or None)
                if relation is None:
                    raise QueryError("that is a statement without rows; ask a SELECT.")
                return Rows(relation.to_arrow_table())
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                if is_damage(str(error)):
                    raise damaged(str(error)) from error
                raise

    def table(self, relation: str, *, as_of: AsOf | None = None) -> Rows:
        """A whole relation, for example `tokens`. Raises QueryError when there is none of that name."""
        if relation not in BY_NAME:
            raise QueryError(f"there is no relation {relation!r}; there are {', '.join(sorted(BY_NAME))}.")
        return self.sql(f"SELECT * FROM {relation}", as_of=as_of)


class Rows:
    """The rows of a query, in the form you like."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def arrow(self) -> Any:
        """As pyarrow.Table."""
        return self._table

    def rows(self) -> list[dict[str, Any]]:
        """As dictionaries of Python values."""
        rows: list[dict[str, Any]] = self._table.to_pylist()
        return rows

    def polars(self) -> Any:
        """As polars.DataFrame. Raises QueryError where polars is not installed."""
        return _optional("polars").from_arrow(self._table)

    def pandas(self) -> Any:
        """As pandas.DataFrame. Raises QueryError where pandas is not installed."""
        _optional("pandas")
        return self._table.to_pandas()

    def __len__(self) -> int:
        return int(self._table.num_rows)


def open_run(path_or_id: str | Path, root: str | None = None) -> OpenedRun:
    """Open a run by id (in `root`, by default `runs`), or by the path or URL of its folder.

    Raises StorageError (ObjectMissingError) when there is no such run.
    """
    found_root, run_id = (root, str(path_or_id)) if root else split_run_path(str(path_or_id))
    return OpenedRun(runs.open_run(open_store(found_root), run_id))


def _optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise QueryError(
            f"{package} is not installed; `pip install {package}`, or take the rows with .arrow() or .rows()."
        ) from None
