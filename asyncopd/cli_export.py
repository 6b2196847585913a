"""`asyncopd export`: what a query selects, as a dataset to train on elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from asyncopd.cli_sql import add_scope, scope_of
from storage.catalog.export import export
from storage.catalog.query_process import QueryLimits
from storage.catalog.sandbox import Sandbox

_MEMORY_BYTES = 2 * 2**30
"""An export may sort and join more than a question does; it is the user's own machine."""


def add_export(commands: Any) -> None:
    """Add `export` to the parser's commands."""
    description = "write what a query selects as a dataset, every row with its run, index, policy versions and teacher"
    parser = commands.add_parser("export", help="write selected trajectories as a dataset", description=description)
    parser.add_argument("query", help="a SELECT with columns run and index, for example: "
                        "\"select run, index from trajectories where correct\"")  # fmt: skip
    parser.add_argument("--format", choices=("sft", "parquet", "hf"), required=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder; must not exist")
    add_scope(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    catalog, as_of = scope_of(arguments)
    limits = QueryLimits(max_rows=0, timeout_s=arguments.timeout, memory_bytes=_MEMORY_BYTES, max_result_bytes=0)
    with Sandbox(catalog, limits) as sandbox:
        num_rows = export(
            sandbox, arguments.query, arguments.format, Path(arguments.output), limits=limits, as_of=as_of
        )
    Console().print(f"{num_rows} rows in {arguments.output}", highlight=False, soft_wrap=True)
    return 0
