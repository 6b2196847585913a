"""Time of every stored query on a million tokens: the query itself, and all of `asyncopd sql` after Python has started.

    python benchmarks/queries.py [--root DIR] [--tokens 1000000]

Writes the log through the platform's own writers first (about a minute) unless DIR has one. Each query runs three
times in the sandbox, each time in a new process; the table has medians. `total` is catalog, process start and query.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from query_log import LogSize, write_log

from storage.catalog.query_process import QueryLimits
from storage.catalog.sandbox import Sandbox
from storage.catalog.snapshot import Catalog
from storage.catalog.stored_queries import stored_queries
from storage.open import open_store
from storage.runs import list_runs

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="storage root; default: a temporary one")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(arguments.root or folder)
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
        print(f"{size['tokens']} tokens in {size['shards']} shards of trajectories and as many of scores\n")
        print("| query | query, s | total, s | rows |\n|---|---|---|---|")
        for query in stored_queries().values():
            seconds, totals = [], []
            for _ in range(REPEATS):
                started = time.monotonic()
                result = sandbox.query(query.sql, query.arguments({}))
                totals.append(time.monotonic() - started)
                seconds.append(result.seconds)
            median, total = statistics.median(seconds), statistics.median(totals)
            print(f"| `{query.name}` | {median:.2f} | {total:.2f} | {result.table.num_rows} |", flush=True)


if __name__ == "__main__":
    main()
