"""The application factory: settings -> FastAPI. Nothing happens at import."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry

from api import health, observe, pages, problems, runs, sql, trajectories
from api.deps import TokenStore, known_query
from api.events import Hub
from api.health import RunCollector
from api.launcher import RunLauncher
from api.limits import Limits, ServiceSettings
from api.reader import RunReader
from api.sql import QueryQueue
from asyncopd import __version__
from asyncopd.errors import ConfigError
from storage.stores import open_store

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
    for module in (runs, observe, trajectories, sql, pages, health):
        app.include_router(module.router, dependencies=[Depends(known_query)])
    pages.install(app)
    problems.install(app)
    app.add_middleware(Limits, settings=settings, registry=registry)
    return app
