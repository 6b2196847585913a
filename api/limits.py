"""How the service runs, and what every request must pass before a route sees it.

size --> 413     rate --> 429     another site's page, or a foreign Host on loopback --> 403

Every answer gets its headers here and is counted and timed, a refusal too. Pure ASGI: streams stay so.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem_response


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of one service process."""

    root: str = "runs"
    """Storage root whose runs are shown; every run launched here lives in it."""
    configs: Path = Path("configs")
    """Folder whose `*.yaml` files may be launched by name."""
    tokens: Path = Path(".asyncopd/tokens.json")
    """Where hashed tokens are kept."""
    host: str = "127.0.0.1"
    port: int = 8321
    niceness: int = 5
    """Training goes first where both want a core."""
    max_body_bytes: int = 1_000_000
    """A configuration is a few kilobytes."""
    requests_per_s: float = 100.0
    """Sustained rate of one client; twice as many may come at once. A page asks for five things a second."""
    poll_s: float = 0.5
    """Between looks at a run that somebody watches; one look serves every watcher."""

    @cached_property
    def is_loopback(self) -> bool:
        """Can only this machine reach the service?"""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


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

    def __init__(self, app: ASGIApp, settings: ServiceSettings, registry: CollectorRegistry) -> None:
        self._app, self._settings = app, settings
        self._too_large = f"A body may have {settings.max_body_bytes:,} bytes."
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        labels, name = ("route", "method", "code"), "asyncopd_http_request_duration_seconds"
        self._count = Counter("asyncopd_http_requests", "Requests answered.", labels, registry=registry)
        self._seconds = Histogram(name, "Time to the last byte.", labels, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, code = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, self._counted(receive), send_with_headers)
        finally:
            # By route, never by path: paths hold ids.
            route = getattr(scope.get("route"), "path", "none")
            self._count.labels(route, scope["method"], code).inc()
            if not route.endswith("/stream"):
                self._seconds.labels(route, scope["method"], code).observe(time.perf_counter() - began)

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
