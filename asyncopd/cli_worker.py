"""`asyncopd worker rollout|score RUN_ID`: one more worker for a running run, from any process that reaches storage."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from storage.open import open_store
from storage.runs import list_runs, missing_run

ROLES = ("rollout", "score", "learn", "evaluate")


def add_worker(commands: Any) -> None:
    """Add `worker` to the parser's commands."""
    description = (
        "Join a running run with one more process. It claims work beside the others, may be killed at any time, and "
        "ends when nothing is left to do or the run is stopped. A second learner waits until the first is gone."
    )
    worker = commands.add_parser("worker", help="join a running run with one more process", description=description)
    worker.add_argument("role", choices=ROLES)
    worker.add_argument("run_id")
    worker.add_argument("--root", default="runs", help="storage root (default: runs)")
    worker.set_defaults(run=_run)


def worker_command(role: str, run_id: str, root: str) -> list[str]:
    """The process that a joined worker is."""
    return [sys.executable, "-m", "flows.join", role, "--run-id", run_id, "--root", root]


def _run(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.root)
    if arguments.run_id not in list_runs(store):
        raise missing_run(store, arguments.run_id)
    # Replaces this process: signals reach the worker itself, and nothing is left to look after.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.execve(sys.executable, worker_command(arguments.role, arguments.run_id, arguments.root), environment)
