"""Clients of the service that cost little: raw sockets, one process, no JSON. For benchmarks/service.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

PATHS = (
    "/v1/runs",
    "/v1/runs/{}",
    "/v1/runs/{}/metrics",
    "/v1/runs/{}/staleness",
    "/v1/runs/{}/timeline",
    "/v1/runs/{}/throughput",
    "/v1/runs/{}/events",
    "/v1/runs/{}/trajectories",
    "/v1/runs/{}/evals",
    "/v1/runs/{}/policies",
)
_ID = b"\nid: "


@dataclass
class Load:
    """What the clients saw."""

    reads: list[tuple[float, str, float]] = field(default_factory=list)
    """Seconds from the first to the beginning of each, its path, seconds until it was answered."""
    first_s: float = 0.0
    """When that was, by time.perf_counter()."""
    events: list[int] = field(default_factory=list)
    """Of each stream."""
    num_bytes: int = 0
    cpu_s: float = 0.0
    """Of the client process between the beginning and the end of the reads."""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """Follows a run's events and counts them."""

    def __init__(self, load: Load, request: bytes) -> None:
        self._load, self._request = load, request
        self.num_events = 0
        self.has_left = False
        self._last = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        # An id may lie across two pieces.
        self.num_events += data.count(_ID) + (self._last + data[: len(_ID) - 1]).count(_ID)
        self._last = data[-len(_ID) + 1 :]
        self._load.num_bytes += len(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.has_left:
            self._load.failures.append(f"a stream was closed: {error}")


class Connection(asyncio.Protocol):
    """Asks one thing at a time."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        """The status line, once the whole answer is there."""
        self._received = bytearray()
        self._answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        size = re.search(rb"content-length: (\d+)", self._received[:head])
        if size is not None and len(self._received) >= head + 4 + int(size[1]):
            self._answered.set_result(bytes(self._received[: self._received.find(b"\r\n")]))

    def connection_lost(self, error: Exception | None) -> None:
        answered = getattr(self, "_answered", None)
        if answered is not None and not answered.done():
            answered.set_result(b"closed before the answer was complete")


def _request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


async def _read(port: int, path: str, idle: list[Connection], load: Load) -> None:
    began = time.perf_counter()
    # The service closes those that were idle for five seconds.
    while idle and idle[-1].transport.is_closing():
        idle.pop()
    if idle:
        connection = idle.pop()
    else:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    status = await connection.ask(_request(path))
    load.reads.append((began - load.first_s, path, time.perf_counter() - began))
    idle.append(connection)
    if b" 200 " not in status:
        load.failures.append(f"{path}: {status.decode()}")


async def _drive(port: int, run_id: str, num_clients: int, rate: float, ready: Any, stop: Any) -> Load:
    load, idle, process = Load(), [], psutil.Process()
    loop = asyncio.get_running_loop()
    request = _request(f"/v1/runs/{run_id}/events/stream")
    streams = [
        (await loop.create_connection(lambda: Stream(load, request), "127.0.0.1", port))[1] for _ in range(num_clients)
    ]
    ready.set()
    load.first_s = time.perf_counter()
    reads, began, used = [], time.monotonic(), sum(process.cpu_times()[:2])
    while not stop.is_set():
        # By the clock, not after the last answer: a slow service gets no fewer requests.
        due = began + len(reads) / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        reads.append(asyncio.create_task(_read(port, random.choice(PATHS).format(run_id), idle, load)))
    await asyncio.wait_for(asyncio.gather(*reads), 60)
    load.seconds, load.cpu_s = time.monotonic() - began, sum(process.cpu_times()[:2]) - used
    load.events = [stream.num_events for stream in streams]
    for stream in streams:
        stream.has_left = True
    for connection in (*streams, *idle):
        connection.transport.close()
    return load


def _main(port: int, run_id: str, num_clients: int, rate: float, ready: Any, stop: Any, found: Any) -> None:
    found.put(asyncio.run(_drive(port, run_id, num_clients, rate, ready, stop)))


class Clients:
    """The process that they live in."""

    def __init__(self, port: int, run_id: str, num_clients: int, rate: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ready, self._stop, self._found = spawn.Event(), spawn.Event(), spawn.Queue()
        self._process = spawn.Process(
            target=_main, args=(port, run_id, num_clients, rate, self._ready, self._stop, self._found)
        )
        self._process.start()
        self._ready.wait()

    def stop(self) -> Load:
        """End the reads, wait for their answers, leave."""
        self._stop.set()
        load: Load = self._found.get(timeout=120)
        self._process.join()
        return load
