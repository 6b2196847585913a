"""Time of every stored query on a million tokens, and of a cold `asyncopd sql`.

    python benchmarks/queries.py [--root DIR] [--tokens 1000000] [--repeats 7]

Writes the log through the platform's own writers first (about a minute) unless DIR has one. Each query runs several
times in the sandbox, each time in a new process with nothing cached but the operating system's pages; `query` is the
time from handing the SQL to DuckDB, catalog open, to the last row. On a machine with other people's work the median is
theirs too; `undisturbed` is therefore the time of the run in which others used least, and `others` the cores they used
then. `total` is the median of all that a caller of a running service waits for: what is new in the log, process start,
connection, query. The last lines are `asyncopd sql` as a command, which also starts Python and reads every manifest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from query_log import LogSize, write_log

from storage.catalog.child import QueryLimits
from storage.catalog.sandbox import Sandbox
from storage.catalog.snapshot import Catalog
from storage.catalog.stored_queries import stored_queries
from storage.runs import list_runs
from storage.stores import open_store

COLD = ("effective_sample_size", "kl_by_position")
"""Stored queries timed as commands: one that reads no shard, and one that reads every token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="storage root; default: a temporary one")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
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
        print("| query | median, s | undisturbed, s | others, cores | total, s | rows |\n|---|---|---|---|---|---|")
        for query in stored_queries().values():
            runs, totals = [], []
            for _ in range(arguments.repeats):
                started, busy = time.monotonic(), _others_s()
                result = sandbox.query(query.sql, query.arguments({}))
                totals.append(time.monotonic() - started)
                runs.append(((_others_s() - busy) / totals[-1], result.seconds))
            others, seconds = min(runs)
            median, rows = statistics.median(seconds for _, seconds in runs), result.table.num_rows
            print(
                f"| `{query.name}` | {median:.2f} | {seconds:.2f} | {others:.1f} | {statistics.median(totals):.2f} | "
                f"{rows} |",
                flush=True,
            )
        print()
        for name in COLD:
            print(f"asyncopd sql {name}, cold: {_command_s(name, root, arguments.repeats):.2f} s", flush=True)
        print(f"load average after: {os.getloadavg()[0]:.1f}")


def _others_s() -> float:
    """CPU seconds that processes other than this one and its ended children have used since the machine started."""
    # user nice system idle iowait irq softirq, in ticks
    ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:8]]
    busy_s = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return busy_s - sum(os.times()[:4])


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
