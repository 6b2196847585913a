"""Time of every stored query on a million tokens, and of a cold `asyncopd sql`.

    python benchmarks/queries.py [--root DIR] [--tokens 1000000] [--repeats 5]

Writes the log through the platform's own writers first (about a minute) unless DIR has one. Each query runs several
times in the sandbox, each time in a new process with nothing cached but the operating system's pages; `query` is the
time from handing the SQL to DuckDB, catalog open, to the last row: its median and its fastest. `total` is the median of
all that a caller of a running service waits for: what is new in the log, process start, connection, query. The last
lines are `asyncopd sql` as a command, which also starts Python and reads every manifest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from query_log import LogSize, write_log

from storage.catalog.query_process import QueryLimits
from storage.catalog.sandbox import Sandbox
from storage.catalog.snapshot import Catalog
from storage.catalog.stored_queries import stored_queries
from storage.open import open_store
from storage.runs import list_runs

COLD = ("effective_sample_size", "kl_by_position")
"""Stored queries timed as commands: one that reads no shard, and one that reads every token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="storage root; default: a temporary one")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or folder
        store = open_store(root)
        if not list_runs(store):
            write_log(store, "bench", LogSize(num_tokens=arguments.tokens))
        catalog = Catalog(store)
        started = time.monotonic()
        catalog.snapshot({"tokens", "shards", "steps", "claims", "evals", "policies", "spans"})
        print(f"first look at the catalog: {time.monotonic() - started:.2f} s")
        sandbox = Sandbox(catalog, QueryLimits(timeout_s=60))
        (size,) = sandbox.query(
            "SELECT sum(num_tokens) AS tokens, count(*) AS shards FROM shards WHERE stage = 'rollout'"
        ).rows()
        print(f"{size['tokens']} tokens in {size['shards']} shards of trajectories and as many of scores")
        print(f"load average before: {os.getloadavg()[0]:.1f}\n")
        print("| query | query, s | fastest, s | total, s | rows |\n|---|---|---|---|---|")
        for query in stored_queries().values():
            seconds, totals = [], []
            for _ in range(arguments.repeats):
                started = time.monotonic()
                result = sandbox.query(query.sql, query.arguments({}))
                totals.append(time.monotonic() - started)
                seconds.append(result.seconds)
            median, total = statistics.median(seconds), statistics.median(totals)
            rows = result.table.num_rows
            print(f"| `{query.name}` | {median:.2f} | {min(seconds):.2f} | {total:.2f} | {rows} |", flush=True)
        print()
        for name in COLD:
            print(f"asyncopd sql {name}, cold: {_command_s(name, root, arguments.repeats):.2f} s", flush=True)
        print(f"load average after: {os.getloadavg()[0]:.1f}")


def _command_s(name: str, root: str, repeats: int) -> float:
    """Median seconds of the whole command."""
    command = [sys.executable, "-m", "asyncopd.cli", "sql", name, "--root", root, "--limit", "0"]
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
