"""`python -m api`: the service's process. `asyncopd serve` becomes it."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

import uvicorn

from api.limits import ServiceSettings
from api.main import UVICORN, create_app
from asyncopd.errors import AsyncOPDError, StackError
from asyncopd.local.processes import tokens_path

AUTOGROUP = Path("/proc/self/autogroup")


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="asyncopd serve", description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--nice", type=int, default=ServiceSettings.niceness, dest="niceness")
    settings = ServiceSettings(tokens=tokens_path(), **vars(parser.parse_args()))
    try:
        app = create_app(settings)
        _check_port(settings.host, settings.port)
    except AsyncOPDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    give_way(settings.niceness)
    print(f"serving {settings.root} at http://{settings.host}:{settings.port}", flush=True)
    # A stream must not hold up the end.
    uvicorn.run(app, host=settings.host, port=settings.port, timeout_graceful_shutdown=3, **UVICORN)


def give_way(niceness: int) -> None:
    """Let other processes go first, those that this one starts excepted."""
    os.nice(niceness)
    if AUTOGROUP.exists() and os.getsid(0) == os.getpid():
        # Linux shares the cores among sessions first, and then niceness counts only within one. In a session that is
        # not ours alone this would slow whatever else was started from the same terminal.
        AUTOGROUP.write_text(str(niceness))


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise StackError(
            f"port {port} of {host} cannot be bound: {error.strerror or error}. Choose another with --port."
        ) from error


if __name__ == "__main__":
    main()
