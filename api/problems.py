"""Errors as RFC 9457 problem details: what happened, what was expected, what to do; never a traceback or a secret.

AsyncOPDError of any kind --_KINDS--> status and type      HTTPException, validation errors --> the same shape
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

import asyncopd.errors as ours
from api.schemas import Problem
from asyncopd.errors import AsyncOPDError

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_KINDS: tuple[tuple[type[AsyncOPDError], int, str], ...] = (
    (ours.ConfigError, 422, "config-refused"),
    (ours.QueryLimitError, 422, "query-too-large"),
    (ours.QueryError, 422, "query-refused"),
    (ours.ObjectMissingError, 404, "not-stored"),
    (ours.ShardCorruptError, 500, "stored-bytes-corrupt"),
    (ours.ServerAwayError, 503, "prefect-away"),
    (ours.StackError, 503, "prefect-refused"),
    (ours.StorageError, 503, "storage-away"),
)
_HTTP_KINDS = {400: "not-readable", 404: "no-such-resource", 405: "no-such-method", 413: "body-too-large"}


class ProblemError(Exception):
    """A refusal of the service itself."""

    def __init__(self, status: int, kind: str, detail: str, headers: dict[str, str] | None = None) -> None:
        """`kind` is the last part of the problem's type; `detail` says found, expected and what to do."""
        super().__init__(detail)
        self.status, self.kind, self.detail, self.headers = status, kind, detail, headers or {}


def no_run(run_id: str, why: str = "") -> ProblemError:
    """The refusal of an id that no run has. As the command line says it, which can name the storage root, too."""
    return ProblemError(404, "no-such-run", f"There is no run {run_id}{why}. GET /v1/runs lists those there are.")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for problems a route may answer with; every route also may with 400, 401, 403, 422 and 429."""
    return {
        status: {"model": Problem, "description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {}}}
        for status in sorted({400, 401, 403, 422, 429, 500, 503, *statuses})
    }


def problem_response(
    status: int, kind: str, detail: str, *, headers: dict[str, str] | None = None, errors: Sequence[dict[str, Any]] = ()
) -> JSONResponse:
    """One problem on the wire; `kind` and `detail` as ProblemError has them."""
    title = HTTPStatus(status).phrase
    body = Problem(type=f"urn:asyncopd:problem:{kind}", title=title, status=status, detail=detail, errors=[*errors])
    return JSONResponse(body.model_dump(), status, headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Give every error of `app` the one shape."""
    app.add_exception_handler(ProblemError, _of_problem)  # type: ignore[arg-type]
    app.add_exception_handler(AsyncOPDError, _of_ours)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _of_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _of_validation)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _of_bug)
    make = app.openapi
    app.openapi = lambda: _as_problems(make())  # type: ignore[method-assign]


def _as_problems(document: dict[str, Any]) -> dict[str, Any]:
    """`document` with problems under their own media type only; FastAPI adds that of the route's answers."""
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status >= "400" and MEDIA_TYPE in response.get("content", {}):
                    response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return document


async def _of_problem(_: Request, error: ProblemError) -> JSONResponse:
    return problem_response(error.status, error.kind, error.detail, headers=error.headers)


async def _of_ours(_: Request, error: AsyncOPDError) -> JSONResponse:
    found = ((status, kind) for kinds, status, kind in _KINDS if isinstance(error, kinds))
    status, kind = next(found, (500, "internal"))
    if status >= 500:
        logger.warning("%s: %s", type(error).__name__, error)
    return problem_response(status, kind, str(error))


async def _of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
    found = error.errors()
    errors = [{"where": "/".join(str(part) for part in one["loc"]), "message": one["msg"]} for one in found]
    detail = "; ".join(f"{entry['where']}: {entry['message']}" for entry in errors[:5])
    # A body that is no JSON at all is the client's syntax, not its values.
    is_syntax = any(one["type"] == "json_invalid" for one in found)
    if is_syntax:
        detail = (
            f"Its body is no JSON: {found[0]['ctx']['error']} at character {found[0]['loc'][-1]}. Send a JSON object."
        )
    is_json = "json" in request.headers.get("content-type", "")
    if not is_json and any(one["loc"] == ("body",) for one in found):
        detail += ". Send a JSON object with the header Content-Type: application/json."
    status, kind = (400, "not-json") if is_syntax else (422, "not-valid")
    return problem_response(status, kind, f"The request cannot be used. {detail}", errors=errors)


async def _of_http(request: Request, error: HTTPException) -> JSONResponse:
    headers = dict(error.headers or {})
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"There is nothing at {request.url.path}. The resources are listed at /openapi.json."
    if error.status_code == 405:
        # Starlette names the methods of the first matching route only.
        routes = [route for route in request.app.routes if isinstance(route, Route)]
        matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in matching for method in route.methods or ()}))
        detail = f"{request.method} is not possible on {request.url.path}; possible: {headers['Allow']}."
    return problem_response(error.status_code, _HTTP_KINDS.get(error.status_code, "refused"), detail, headers=headers)


async def _of_bug(request: Request, error: Exception) -> JSONResponse:
    logger.exception("%s %s", request.method, request.url.path, exc_info=error)
    return problem_response(500, "internal", "The service failed; its log has the reason. Nothing stored is affected.")
