"""The service under load: SSE clients and mixed reads on a run that grows; latency and the event loop's largest gap.

The run is written by a process of its own, four steps a second, so that what is measured is the service. In one run:
the writer alone, then the writer with the load; its pace with and without the load is printed beside the latencies.

    python benchmarks/service.py --clients 200 --rate 50 --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from synthetic_run import config_of, new_log, publish_run, train_step

from api.main import create_app
from api.settings import ServiceSettings
from storage.open import open_store
from storage.run_log import StoredRunLog

RUN, STEPS_PER_S = "growing", 4.0
PATHS = ("/v1/runs", "/v1/runs/{}", "/v1/runs/{}/metrics", "/v1/runs/{}/staleness", "/v1/runs/{}/timeline",
         "/v1/runs/{}/throughput", "/v1/runs/{}/events", "/v1/runs/{}/trajectories", "/v1/runs/{}/evals")  # fmt: skip


def write(root: str, seconds: float, first: int, busy_s: Any) -> None:
    """Publish steps at their pace; `busy_s` gets the seconds that one step's work took, on average."""
    log = StoredRunLog(open_store(root), RUN)
    spent, number, end = 0.0, first, time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        np.linalg.norm(np.random.default_rng(number).normal(size=(600, 600)) @ np.ones((600, 600)))
        log.publish_step(train_step(number, finished=time.time()))
        spent += time.perf_counter() - began
        number += 1
        time.sleep(1 / STEPS_PER_S)
    busy_s.value = spent / (number - first)
    print(f"writer: {number - first} steps, {1000 * busy_s.value:.1f} ms of work each", flush=True)


def serve(root: str, port: int, stop: Any, gap_s: Any) -> None:
    """The service with a 10 ms ticker in its event loop, in a process of its own."""

    async def main() -> None:
        folder = Path(root).parent
        settings = ServiceSettings(root=root, tokens=folder / "tokens.json", requests_per_s=10_000)
        config = uvicorn.Config(create_app(settings), port=port, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        last = time.perf_counter()
        while not stop.is_set():
            await asyncio.sleep(0.01)
            now = time.perf_counter()
            gap_s.value, last = max(gap_s.value, now - last), now
        server.should_exit = True
        await task

    asyncio.run(main())


async def load(url: str, num_clients: int, rate: float, seconds: float) -> tuple[list[float], int]:
    """Latencies of the reads, seconds, and the number of events that all the streams received."""
    latencies: list[float] = []
    num_events = 0
    limits = httpx.Limits(max_connections=None)

    async def follow(client: httpx.AsyncClient) -> None:
        nonlocal num_events
        async with client.stream("GET", f"{url}/v1/runs/{RUN}/events/stream", timeout=None) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                num_events += line.startswith("id: ")

    async def read(client: httpx.AsyncClient) -> None:
        began = time.perf_counter()
        response = await client.get(url + random.choice(PATHS).format(RUN), timeout=60)
        assert response.status_code == 200, response.text
        latencies.append(time.perf_counter() - began)

    async with httpx.AsyncClient(limits=limits) as client:
        streams = [asyncio.create_task(follow(client)) for _ in range(num_clients)]
        await asyncio.sleep(3)
        reads, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            reads.append(asyncio.create_task(read(client)))
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*reads)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return latencies, num_events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    asked = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        root = f"{folder}/runs"
        config = config_of(learner={"num_steps": 10_000, "batch_size": 8})
        log = new_log(open_store(root), config, RUN)
        log.record_state("running", by="flow")
        publish_run(log, config, num_steps=60)
        alone, loaded, gap, stop = (spawn.Value("d", 0.0), spawn.Value("d", 0.0), spawn.Value("d", 0.0), spawn.Event())
        writer = spawn.Process(target=write, args=(root, asked.seconds, 60, alone))
        writer.start()
        writer.join()
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        service = spawn.Process(target=serve, args=(root, port, stop, gap))
        service.start()
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        first = len(log.steps())
        writer = spawn.Process(target=write, args=(root, asked.seconds + 3, first, loaded))
        writer.start()
        latencies, num_events = asyncio.run(load(f"http://127.0.0.1:{port}", asked.clients, asked.rate, asked.seconds))
        writer.join()
        stop.set()
        service.join()
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    print(f"{len(latencies)} reads: p50 {p50:.0f} ms, p99 {p99:.0f} ms; {num_events} events to {asked.clients} clients")
    print(f"largest gap of a 10 ms ticker in the service's event loop: {gap.value * 1000:.0f} ms")
    print(f"writer's work per step: {loaded.value / alone.value:.2f} times that without the service")


if __name__ == "__main__":
    main()
