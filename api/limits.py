"""What every request must pass before a route sees it, and the headers every answer gets. Pure ASGI: streams stay so.

size --> 413     rate --> 429     another site's page, or a foreign Host on loopback --> 403
"""

from __future__ import annotations

import time
from collections import OrderedDict
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem_response
from api.settings import ServiceSettings

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
        "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_MAX_CLIENTS = 10_000
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Limits:
    """The middleware."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self._app, self._settings = app, settings
        self._too_large = f"A body may have {settings.max_body_bytes:,} bytes."
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, self._counted(receive), send_with_headers)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        host = (urlsplit(f"//{headers.get('host', '')}").hostname or "").lower()
        if self._settings.is_loopback and host not in _LOOPBACK_NAMES:
            # A page elsewhere whose name resolves to 127.0.0.1 would otherwise speak as this machine's user.
            detail = "This service answers only to localhost, 127.0.0.1 and ::1. Use one of them."
            return problem_response(403, "foreign-host", detail)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_cross_site(headers):
            detail = "Requests that change something may not come from other sites."
            return problem_response(403, "foreign-page", detail)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._settings.max_body_bytes:
            return problem_response(413, "body-too-large", self._too_large)
        wait_s = self._wait_s(scope["client"][0] if scope.get("client") else "unknown")
        if wait_s > 0:
            detail = f"More than {self._settings.requests_per_s:g} requests per second. Wait {wait_s:.1f} s."
            return problem_response(429, "too-many-requests", detail, headers={"Retry-After": f"{max(wait_s, 1):.0f}"})
        return None

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._settings.max_body_bytes:
                # FastAPI lets this class through where it wraps every other error of reading a body as 400.
                raise HTTPException(413, self._too_large)
            return message

        return receive_counted

    def _wait_s(self, client: str) -> float:
        """Seconds until `client` may ask again; 0 now. A token bucket per client."""
        rate, now = self._settings.requests_per_s, time.monotonic()
        burst = 2 * rate
        left, seen = self._buckets.pop(client, (burst, now))
        left = min(burst, left + (now - seen) * rate)
        self._buckets[client] = (max(left - 1, 0), now) if left >= 1 else (left, now)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / rate


def _is_cross_site(headers: Headers) -> bool:
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return True
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
