"""`asyncopd up | down | serve | token | worker`: the processes of this machine, and who may use its service."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators
from rich.console import Console
from rich.table import Table

from api.deps import Scope, TokenStore
from api.limits import ServiceSettings
from asyncopd.cli import Root
from asyncopd.local import stack
from asyncopd.local.processes import tokens_path
from storage.runs import open_run
from storage.stores import open_store

_DEFAULT = ServiceSettings()


def up() -> int:
    """Start what is missing of the local stack."""
    console = Console(highlight=False)
    stack.up(console.print)
    stack.up_service(console.print)
    console.print(f"up: {stack.api_url().removesuffix('/api')}, {stack.service_url()}")
    return 0


def down() -> int:
    """End the local stack."""
    stack.down(Console(highlight=False).print)
    return 0


def serve(
    *,
    host: str = _DEFAULT.host,
    port: int = _DEFAULT.port,
    root: Root = _DEFAULT.root,
    configs: Path = _DEFAULT.configs,
    nice: Annotated[int, Parameter(metavar="N", validator=validators.Number(gte=0, lte=19))] = _DEFAULT.niceness,
) -> int:
    """Become the service's process.

    Args:
        host: Address to bind; others than loopback need a token.
        port: Port to bind.
        configs: Folder of configurations.
        nice: Niceness from 0 to 19: training goes first where both want a core.
    """
    options = {"--host": host, "--port": port, "--root": root, "--configs": configs, "--nice": nice}
    command = [sys.executable, "-m", "api.main", *(str(part) for option in options.items() for part in option)]
    os.execve(sys.executable, command, dict(os.environ))


def worker(role: Literal["rollout", "score", "learn", "evaluate"], run_id: str, /, *, root: Root = "runs") -> int:
    """Become one more worker of a run.

    Args:
        role: What it does.
        run_id: The run.
    """
    open_run(open_store(root), run_id)  # refuses: there is no such run
    # Replaces this process: signals reach the worker itself, and nothing is left to look after.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "flows.roles", role, "--run-id", run_id, "--root", root]
    os.execve(sys.executable, command, environment)


def create(name: str, /, *, scope: Scope = Scope.READ) -> int:
    """Make a token.

    Args:
        name: Whose it is.
        scope: What it allows.
    """
    token = TokenStore(tokens_path()).create(name, scope)
    Console(stderr=True).print(f"token {name!r}, scope {scope}; it is not shown again:")
    print(token)
    return 0


def list_() -> int:
    """Print the tokens."""
    table = Table("name", "scope", "created", box=None)
    for name, scope, created in TokenStore(tokens_path()).names():
        table.add_row(name, scope, datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M UTC"))
    Console().print(table)
    return 0


def revoke(name: str, /) -> int:
    """Refuse a token.

    Args:
        name: Of the token.
    """
    TokenStore(tokens_path()).revoke(name)
    return 0
