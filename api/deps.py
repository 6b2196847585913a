"""What routes ask for: the service's parts, the run of the path, and a client who may.

    asyncopd token create --> token, shown once; its sha256 in tokens.json
    request --Authorization: Bearer--> (name, scope) --needs(scope)--> route

A service that only this machine can reach asks for no token, but a wrong one is refused there too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request
from fastapi import Path as UrlPath
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from api.events import Hub
from api.launcher import RunLauncher
from api.problems import ProblemError, no_run
from api.reader import RunReader
from api.schemas import RUN_ID_PATTERN
from asyncopd.errors import ConfigError
from storage.run_view import RunView

PREFIX = "aopd_"
"""Lets secret scanners find tokens."""

_bearer = HTTPBearer(auto_error=False, description="A token made by `asyncopd token create`.")


class Scope(StrEnum):
    """What a token allows; each includes those before it."""

    READ = "read"
    LAUNCH = "launch"
    ADMIN = "admin"


class TokenStore:
    """Tokens of one service in a file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self, name: str, scope: Scope) -> str:
        """A new token, which is stored as a hash only. Raises ConfigError when the name is taken."""
        records = self._read()
        if any(record["name"] == name for record in records):
            raise ConfigError(f"there is a token {name!r} already. Choose another name, or revoke it first.")
        token = PREFIX + secrets.token_urlsafe(32)
        self._write([*records, {"name": name, "scope": scope.value, "sha256": _hash(token), "created": time.time()}])
        return token

    def revoke(self, name: str) -> None:
        """Forget a token; a running service refuses it from the next request on."""
        records = self._read()
        kept = [record for record in records if record["name"] != name]
        if len(kept) == len(records):
            raise ConfigError(f"there is no token {name!r}. Known: {[r['name'] for r in records] or 'none'}.")
        self._write(kept)

    def names(self) -> list[tuple[str, Scope, float]]:
        """(name, scope, Unix time of creation) of every token."""
        return [(record["name"], Scope(record["scope"]), record["created"]) for record in self._read()]

    def client_of(self, token: str) -> tuple[str, Scope] | None:
        """Whose token this is, and what it allows; compares with every hash in constant time."""
        digest = _hash(token)
        found = [record for record in self._read() if hmac.compare_digest(digest, record["sha256"])]
        return (found[-1]["name"], Scope(found[-1]["scope"])) if found else None

    def _read(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.is_file() else []
        return records

    def _write(self, records: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp's file is its owner's alone from the first moment.
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f"{self._path.name}.")
        with os.fdopen(descriptor, "w") as file:
            json.dump(records, file, indent=1)
        Path(temporary).replace(self._path)


def _hash(token: str) -> str:
    # 256 random bits need no slow hash: there is nothing to guess.
    return hashlib.sha256(token.encode()).hexdigest()


def query(description: str, example: Any, **constraints: Any) -> Any:
    """A query parameter with what OpenAPI must say about it."""
    return Query(description=description, examples=[example], **constraints)


# Dependencies are coroutines: FastAPI calls plain functions in a thread each.
def part(name: str) -> Any:
    """The dependency on a part of the service, as `create_app` made it: `app.state.<name>`."""

    async def of_app(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(of_app)


def needs(scope: Scope) -> Any:
    """The dependency that lets only clients with `scope` through."""

    async def check(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
    ) -> None:
        if credentials is None:
            if request.app.state.settings.is_loopback:
                return
            detail = "Send `Authorization: Bearer TOKEN`; make one with `asyncopd token create NAME`."
            raise ProblemError(401, "token-missing", detail, {"WWW-Authenticate": "Bearer"})
        found = await run_in_threadpool(request.app.state.tokens.client_of, credentials.credentials)
        if found is None:
            detail = "This token is not known, or was revoked."
            raise ProblemError(401, "token-unknown", detail, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        (name, own), order = found, list(Scope)
        if order.index(own) < order.index(scope):
            detail = f"This needs a token with scope {scope}; {name!r} has {own}."
            make = f"Make one with `asyncopd token create NAME --scope {scope}`."
            raise ProblemError(403, "scope-missing", f"{detail} {make}")

    return Depends(check)


Reader = needs(Scope.READ)
Launcher = needs(Scope.LAUNCH)
Runs = Annotated[RunReader, part("reader")]
Launches = Annotated[RunLauncher, part("launcher")]
Streams = Annotated[Hub, part("hub")]
IdempotencyKey = Annotated[
    str | None,
    Header(max_length=200, description="Repeating a request with one key starts it once.", examples=["a-uuid"]),
]
RunId = Annotated[str, UrlPath(pattern=RUN_ID_PATTERN, description="Id of a run.", examples=["walk-7"])]


async def view(run_id: RunId, runs: Runs) -> RunView:
    """The run of the path, read up to now; 404 while it does not exist in storage."""
    held = runs.held(run_id)
    return held if held is not None and held.is_fresh else await run_in_threadpool(runs.view, run_id)


async def known_run(run_id: RunId, runs: Runs) -> str:
    """The id of the path; 404 when neither a run nor a launch has it. A stream must know before it begins."""
    if runs.held(run_id) is None and not await run_in_threadpool(runs.exists, run_id):
        raise no_run(run_id)
    return run_id


async def known_query(request: Request) -> None:
    """Refuse query parameters that the resource does not have: a mistyped filter would silently match everything."""
    if not request.url.query:
        return
    route = request.scope["route"]
    known = {parameter.alias for parameter in get_flat_dependant(route.dependant).query_params}
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        expected = ", ".join(sorted(known)) or "none at all"
        raise ProblemError(
            422, "unknown-parameter", f"{unknown[0]!r} is no query parameter of this resource; it has {expected}."
        )


View = Annotated[RunView, Depends(view)]
KnownRun = Annotated[str, Depends(known_run)]
