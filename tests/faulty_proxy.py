"""An HTTP proxy before a real S3 server that goes wrong as networks and servers do, the same way for the same seed.

    client --> FaultyProxy --> server          fault        the server acts     the client sees
                                               slow         yes                 the answer, late
                                               500, 503     no                  an error of the server
                                               reset        no                  a connection that broke
                                               lost         yes                 a connection that broke
                                               conflict     no (conditional)    409 ConditionalRequestConflict

Faults are drawn per request in order of arrival: `rate` is the share of requests that get one, `faults` which ones.
`plan` lists faults for the next requests that match a method; it takes precedence.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import aiohttp
import yarl
from aiohttp import web

Fault = Literal["slow", "500", "503", "reset", "lost", "conflict"]
EVERY_FAULT: tuple[Fault, ...] = ("slow", "500", "503", "reset", "lost", "conflict")
ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
}


@dataclass
class FaultyProxy:
    """Runs in a thread of its own from `with` to its end; safe to read and reprogram meanwhile."""

    target: str
    """URL of the server, without a path."""
    rate: float = 0.0
    faults: Sequence[Fault] = EVERY_FAULT
    seed: int = 0
    slow_s: float = 0.02
    plan: deque[tuple[str, Fault | None]] = field(default_factory=deque)
    """(method, fault) for the next requests; None lets one pass. A request of another method waits for no turn."""
    message: str = "injected"
    """What the error answers say."""
    signed_by: set[tuple[str, str]] = field(default_factory=set)
    """(access key, region) of every signature that was seen."""
    injected: Counter[str] = field(default_factory=Counter)
    """How often each fault happened."""
    requests: Counter[str] = field(default_factory=Counter)
    """How many requests came, by method."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._random = random.Random(self.seed)
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10), "the proxy did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        # A connection a request: one that the server closes while idle must not look like a fault.
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(auto_decompress=False, connector=connector) as self._session:
            application = web.Application(client_max_size=2**30)
            application.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._port = runner.addresses[0][1]
            started.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests[request.method] += 1
        if signature := re.search(r"Credential=([^/]+)/\d+/([^/]+)/", request.headers.get("Authorization", "")):
            self.signed_by.add((signature[1], signature[2]))
        fault = self._fault(request)
        if fault:
            self.injected[fault] += 1
        if fault in ERRORS:
            status, code = ERRORS[fault]
            xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{self.message}</Message></Error>"
            return web.Response(status=status, text=xml, content_type="application/xml")
        if fault == "reset":
            return _broken(request)
        if fault == "slow":
            await asyncio.sleep(self.slow_s)
        answer = await self._forward(request, body)
        return _broken(request) if fault == "lost" else answer

    def _fault(self, request: web.Request) -> Fault | None:
        if self.plan and self.plan[0][0] == request.method:
            return self.plan.popleft()[1]
        if self._random.random() >= self.rate:
            return None
        fault = self._random.choice(self.faults)
        # No server answers a conflict to a request without a condition.
        return "500" if fault == "conflict" and "If-None-Match" not in request.headers else fault

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        # The path as it came and the client's Host: both are signed.
        url = yarl.URL(self.target + request.raw_path, encoded=True)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("expect", "transfer-encoding")}
        async with self._session.request(
            request.method, url, headers=headers, data=body or None, allow_redirects=False
        ) as found:
            kept = {k: v for k, v in found.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
            content = await found.read()
            if request.method != "HEAD":
                kept.pop("Content-Length", None)
            return web.Response(status=found.status, headers=kept, body=content or None)


def _broken(request: web.Request) -> web.Response:
    """Drop the connection without an answer; the response is never sent."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()
