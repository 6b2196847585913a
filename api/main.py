"""The application factory, settings -> FastAPI with the page; and the service's process, `python -m api.main`.

`asyncopd serve` becomes that process. Nothing happens at import.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry

from api import health, observe, problems, runs, sql, trajectories
from api.deps import TokenStore, known_query
from api.events import Hub
from api.health import RunCollector
from api.launcher import RunLauncher
from api.limits import Limits, ServiceSettings
from api.reader import RunReader
from api.sql import QueryQueue
from asyncopd import __version__
from asyncopd.errors import AsyncOPDError, ConfigError, StackError
from asyncopd.local.processes import tokens_path
from storage.stores import open_store

STATIC = Path(__file__).parent / "static"
PAGES = ("/", "/runs/{run_id}", "/runs/{run_id}/trajectories/{index}", "/compare", "/sql", "/launch")
"""One HTML shell for every path a person may open. Kept equal to ROUTES of static/app.js."""
AUTOGROUP = Path("/proc/self/autogroup")
ABOUT = "Launch, watch and inspect runs of asynchronous on-policy distillation."
UVICORN: dict[str, Any] = {
    "loop": "uvloop",
    "http": "httptools",
    "log_level": "warning",
    "server_header": False,
    # They would hold every query string.
    "access_log": False,
    # Longer than clients and proxies keep theirs: a request must not cross the service's goodbye.
    "timeout_keep_alive": 75,
}
"""How the application is served, wherever it is."""


def create_app(settings: ServiceSettings) -> FastAPI:
    """The service over one storage root.

    Raises:
        ConfigError: it would be reachable from other machines, and no token exists.
    """
    tokens = TokenStore(settings.tokens)
    if not settings.is_loopback and not tokens.names():
        raise ConfigError(
            f"host {settings.host} can be reached from other machines, which needs a token, and there is none. Make "
            "one with `asyncopd token create NAME --scope launch`, or bind to 127.0.0.1."
        )
    app = FastAPI(title="AsyncOPD", version=__version__, description=ABOUT, docs_url=None, redoc_url=None)
    reader = RunReader(open_store(settings.root))
    registry = CollectorRegistry()
    registry.register(RunCollector(reader))
    app.state.settings, app.state.tokens, app.state.reader, app.state.registry = settings, tokens, reader, registry
    app.state.launcher = RunLauncher(reader, root=settings.root, configs=settings.configs)
    app.state.hub = Hub(reader, settings.poll_s)
    app.state.queries = QueryQueue(reader.store)
    for module in (runs, observe, trajectories, sql, health):
        app.include_router(module.router, dependencies=[Depends(known_query)])
    for page in PAGES:
        app.add_api_route(page, shell, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    problems.install(app)
    app.add_middleware(Limits, settings=settings, registry=registry)
    return app


async def shell() -> FileResponse:
    """The shell; which view it shows is decided in the browser."""
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="asyncopd serve", description=ABOUT)
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
