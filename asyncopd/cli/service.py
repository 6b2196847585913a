"""`asyncopd serve` and `asyncopd token`: the service and who may use it.

`asyncopd worker rollout|score RUN_ID`: one more worker for a running run, from any process that reaches storage.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from api.deps import Scope, TokenStore
from api.settings import ServiceSettings
from asyncopd.local.processes import tokens_path
from storage.runs import list_runs, missing_run
from storage.stores import open_store


def add_serve(commands: Any) -> None:
    """Add `serve` and `token` to the parser's commands."""
    defaults = ServiceSettings()
    serve = commands.add_parser("serve", help="run the service: REST, live events and the page")
    serve.add_argument("--host", default=defaults.host, help="address to bind; others than loopback need a token")
    serve.add_argument("--port", type=int, default=defaults.port, help="default: 8321")
    serve.add_argument("--root", default=defaults.root, help="storage root (default: runs)")
    serve.add_argument("--configs", type=Path, default=defaults.configs, help="folder of configurations")
    serve.add_argument(
        "--nice",
        type=int,
        choices=range(20),
        default=defaults.niceness,
        metavar="N",
        help="niceness from 0 to 19: training goes first where both want a core (default: 5)",
    )
    serve.set_defaults(run=_serve)

    token = commands.add_parser("token", help="create, list or revoke tokens of the service")
    actions = token.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a token; it is shown once")
    create.add_argument("name")
    create.add_argument("--scope", type=Scope, choices=list(Scope), default=Scope.READ, help="default: read")
    create.set_defaults(run=_create)
    actions.add_parser("list", help="names, scopes and ages").set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="refuse a token from now on")
    revoke.add_argument("name")
    revoke.set_defaults(run=_revoke)


def _serve(arguments: argparse.Namespace) -> int:
    command = [
        sys.executable,
        "-m",
        "api",
        "--host",
        arguments.host,
        "--port",
        str(arguments.port),
        "--root",
        arguments.root,
        "--configs",
        str(arguments.configs),
        "--nice",
        str(arguments.nice),
    ]
    os.execve(sys.executable, command, dict(os.environ))


def _create(arguments: argparse.Namespace) -> int:
    token = TokenStore(tokens_path()).create(arguments.name, arguments.scope)
    Console(stderr=True).print(f"token {arguments.name!r}, scope {arguments.scope}; it is not shown again:")
    print(token)
    return 0


def _list(_: argparse.Namespace) -> int:
    table = Table("name", "scope", "created", box=None)
    for name, scope, created in TokenStore(tokens_path()).names():
        table.add_row(name, scope, datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M UTC"))
    Console().print(table)
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    TokenStore(tokens_path()).revoke(arguments.name)
    return 0


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
    return [sys.executable, "-m", "flows.roles", role, "--run-id", run_id, "--root", root]


def _run(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.root)
    if arguments.run_id not in list_runs(store):
        raise missing_run(store, arguments.run_id)
    # Replaces this process: signals reach the worker itself, and nothing is left to look after.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.execve(sys.executable, worker_command(arguments.role, arguments.run_id, arguments.root), environment)
