"""Curate: what a SELECT picks, written as a dataset whose every row says where it came from.

    sft       DIR/train.jsonl      prompt and response as text, provenance, and what was selected
    parquet   DIR/data.parquet     what was selected, with provenance
    hf        DIR/data/train-00000-of-00001.parquet + README.md, as `datasets.load_dataset(DIR)` reads it

Beside the data lies export.json: the query, the moment, the runs. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from asyncopd import __version__
from asyncopd.errors import QueryError
from storage.catalog.child import QueryLimits
from storage.catalog.rows import AsOf
from storage.catalog.sandbox import RunningQuery, Sandbox

ExportFormat = Literal["sft", "parquet", "hf"]
PROVENANCE = ("run", "index", "version_first", "version_last", "teacher", "teacher_digest")
"""Columns every exported row begins with: trajectory and run, first and last policy version behind its tokens, and the
run's own teacher (null while unscored)."""
_TEXT = ("prompt", "response")
_FILES: Mapping[ExportFormat, str] = {
    "sft": "train.jsonl",
    "parquet": "data.parquet",
    "hf": "data/train-00000-of-00001.parquet",
}
_ROW_GROUP_BATCHES = 8
"""Batches of a query (8,192 rows) in one row group."""


def export(
    sandbox: Sandbox, sql: str, style: ExportFormat, output: Path, *, limits: QueryLimits, as_of: AsOf | None = None
) -> int:
    """Write what `sql` selects to the new folder `output`; returns the number of rows.

    Args:
        sql: a SELECT with columns `run` and `index`, one row per row of the dataset. Columns it shares with the
            provenance (or, for sft, with prompt and response) are replaced by those.
    Raises:
        QueryError: the query is wrong, lacks `run` or `index`, selects nothing, or `output` exists.
        QueryLimitError: it needs more than `limits`.
    """
    if output.exists():
        raise QueryError(f"{output} exists; an export never overwrites. Remove it or name another folder.")
    wrapped = _with_provenance(sql, _columns(sandbox, sql, limits, as_of), style)
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise QueryError(
            f"{output} cannot be written: {error.strerror or error}. Name a folder that can be made."
        ) from error
    try:
        query = sandbox.start(wrapped, limits=limits, as_of=as_of)
        path = temporary / _FILES[style]
        path.parent.mkdir(exist_ok=True)
        num_rows = (_write_jsonl if style == "sft" else _write_parquet)(query, path)
        if num_rows == 0:
            raise QueryError("the query selects no trajectory that is stored, so there is nothing to export.")
        _describe(temporary, sandbox, sql, style, num_rows, as_of)
        _publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return num_rows


def _columns(sandbox: Sandbox, sql: str, limits: QueryLimits, as_of: AsOf | None) -> list[str]:
    """Columns of `sql`, which must have the two that tell where a row comes from."""
    described = sandbox.query(f"DESCRIBE {_inner(sql)}", limits=limits, as_of=as_of)
    columns = [row["column_name"] for row in described.rows()]
    missing = [name for name in ("run", "index") if name not in columns]
    if missing:
        raise QueryError(
            f"the query has columns {', '.join(columns)} but not {' and '.join(missing)}, without which no row can say "
            "where it came from. Select them too."
        )
    return columns


def _with_provenance(sql: str, columns: list[str], style: ExportFormat) -> str:
    own = (*PROVENANCE, *(_TEXT if style == "sft" else ()))
    kept = "".join(f', selected."{name.replace(chr(34), chr(34) * 2)}"' for name in columns if name not in own)
    # The last token of a finished response is EOS, which trainers add themselves.
    text = """
        text_of(t.run, t.prompt_ids) AS prompt,
        text_of(t.run, CASE WHEN t.finish_reason = 'stop' THEN t.response_ids[:t.num_tokens - 1]
                       ELSE t.response_ids END) AS response,"""
    return f"""
    SELECT {text if style == "sft" else ""}
        t.run, t.index, t.version_first, t.version_last, s.teacher, s.teacher_digest {kept}
    FROM {_inner(sql)} AS selected
    JOIN trajectories AS t ON t.run = selected.run AND t.index = selected.index
    LEFT JOIN (FROM scores WHERE origin = 'run') AS s ON s.run = t.run AND s.index = t.index
    """


def _inner(sql: str) -> str:
    """`sql` as a subquery; the line break ends a comment it may end with."""
    return f"({sql.strip().rstrip(';')}\n)"


def _write_jsonl(query: RunningQuery, path: Path) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        for batch in query.batches():
            file.writelines(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in batch.to_pylist())
            num_rows += batch.num_rows
    return num_rows


def _write_parquet(query: RunningQuery, path: Path) -> int:
    num_rows, batches = 0, query.batches()
    with pq.ParquetWriter(path, query.schema(), compression="zstd") as writer:
        while group := list(islice(batches, _ROW_GROUP_BATCHES)):
            writer.write_table(table := pa.Table.from_batches(group))
            num_rows += table.num_rows
    return num_rows


def _describe(folder: Path, sandbox: Sandbox, sql: str, style: ExportFormat, num_rows: int, as_of: AsOf | None) -> None:
    runs = sandbox.query("SELECT run, config_hash, code_version FROM runs ORDER BY run", as_of=as_of).rows()
    facts = {
        "query": sql,
        "root": sandbox.catalog.store.url,
        "runs": runs,
        "as_of": None if as_of is None else {"version": as_of.version, "time": as_of.time},
        "format": style,
        "num_rows": num_rows,
        "exported": time.time(),
        "asyncopd_version": __version__,
    }
    (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n")
    if style == "hf":
        (folder / "README.md").write_text(_card(sql, num_rows, [row["run"] for row in runs]))


def _card(sql: str, num_rows: int, runs: list[str]) -> str:
    query = sql.strip().replace("```", "` ` `")
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# Trajectories from AsyncOPD

{num_rows} rows, exported from {len(runs)} run{"" if len(runs) == 1 else "s"} ({", ".join(runs[:10])}).

Each row begins with its provenance: `run`, `index` (trajectory in the run), `version_first` and `version_last` (policy
versions that sampled its first and last token), `teacher` and `teacher_digest`. The other columns are those of

```sql
{query}
```

`export.json` has the query, the runs with their configuration's digest, and the moment of the export.
"""


def plain(value: Any) -> Any:
    """`value` in JSON's own types: times as ISO text, maps as objects, NaN as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        is_map = bool(value) and all(isinstance(item, tuple) and len(item) == 2 for item in value)
        return {str(key): plain(item) for key, item in value} if is_map else [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _publish(temporary: Path, output: Path) -> None:
    for path in sorted(temporary.rglob("*"), reverse=True):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    try:
        # Onto an existing folder this works only when that is empty: nothing is ever overwritten.
        temporary.rename(output)
    except OSError as error:
        raise QueryError(f"{output} could not be created: {error.strerror}. Name another folder.") from None
