"""The service under load while a real run trains: SSE clients and mixed reads; latency, loop gaps, training slowed by.

Roles of the quickstart train in processes of their own, without Prefect. The service runs all the time; stretches of
`--steps` learner steps with clients alternate with stretches without, in the order ABBA, and each pair gives a ratio.

    python benchmarks/service.py --clients 200 --rate 50 --steps 50 --pairs 3
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import uvicorn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pipeline
from role_processes import RoleStarter, roles_of
from service_load import Clients, Load

from api.main import create_app
from api.settings import ServiceSettings
from asyncopd.config import load_config
from flows.wiring import OpenRun

SETTLE_S = 3.0
"""Between a stretch's clients coming and its first step that counts: the burst of connecting is not its pace."""


def serve(root: str, port: int, stop: Any, gap_s: Any, niceness: int) -> None:
    """The service with a 10 ms ticker in its event loop, in a process of its own."""
    os.nice(niceness)

    async def main() -> None:
        settings = ServiceSettings(root=root, tokens=Path(root).parent / "tokens.json", requests_per_s=10_000)
        config = uvicorn.Config(create_app(settings), port=port, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        last = time.perf_counter()
        while not stop.is_set():
            await asyncio.sleep(0.01)
            now = time.perf_counter()
            gap_s.value, last = max(gap_s.value, now - last), now
        server.should_exit = True
        await task

    asyncio.run(main())


class Service:
    """That process."""

    def __init__(self, root: str, niceness: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.gap_s, self._stop = spawn.Value("d", 0.0), spawn.Event()
        self._process = spawn.Process(target=serve, args=(root, self.port, self._stop, self.gap_s, niceness))
        self._process.start()
        self.pid: int = self._process.pid or 0
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/healthz")
                return
            except httpx.TransportError:
                time.sleep(0.1)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._process.join()


@dataclass(frozen=True)
class Stretch:
    """Some steps of training."""

    seconds: float
    service_cpu: float
    """Cores used, on average."""
    training_cpu: float
    load: Load | None
    gap_s: float
    late_s: list[float]
    """How much later than asked for sleeps of 10 ms in an idle process ended: what the machine alone costs."""


def stretch(run: OpenRun, roles: RoleStarter, service: Service, num_steps: int, clients: Clients | None) -> Stretch:
    """Wait for `num_steps` steps, and look at what they took."""
    service.gap_s.value, late_s = 0.0, list[float]()
    time.sleep(SETTLE_S)
    first = _wait_for_step(run, _newest(run) + 1)
    began, used = time.monotonic(), (_cpu_s([service.pid]), _cpu_s([role.pid for role in roles.processes]))
    last = _wait_for_step(run, first.step + num_steps, late_s)
    seconds = time.monotonic() - began
    cpu = (_cpu_s([service.pid]) - used[0], _cpu_s([role.pid for role in roles.processes]) - used[1])
    load = None if clients is None else clients.stop()
    took_s, gap_s = last.finished - first.finished, service.gap_s.value
    return Stretch(took_s, cpu[0] / seconds, cpu[1] / seconds, load, gap_s, late_s)


def _newest(run: OpenRun) -> int:
    return max((int(key.rsplit("/", 1)[1][:6]) for key in run.log.store.folder(run.log.layout.steps).keys), default=0)


def _wait_for_step(run: OpenRun, number: int, late_s: list[float] | None = None) -> Any:
    deadline = time.monotonic() + 300
    while (step := run.log.find_step(number)) is None:
        assert time.monotonic() < deadline, f"step {number} was not trained within 300 s"
        for _ in range(10):
            began = time.perf_counter()
            time.sleep(0.01)
            if late_s is not None:
                late_s.append(time.perf_counter() - began - 0.01)
    return step


def _cpu_s(pids: list[int]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50.0, help="reads a second")
    parser.add_argument("--steps", type=int, default=50, help="learner steps of a stretch")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--nice", type=int, default=0, help="niceness of the service")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_steps = (2 * asked.pairs + 1) * (asked.steps + 60)
        changes = {"storage.root": f"{folder}/runs", "learner.num_steps": num_steps}
        run = pipeline.new_run(load_config("configs/quickstart.yaml", changes), "growing")
        run.log.record_state("running", by="benchmark")
        with Service(f"{folder}/runs", asked.nice) as service, roles_of(run, Path(folder) / "logs") as roles:
            for role in ("rollout", "score", "learn", "evaluate"):
                roles.start(role)
            _wait_for_step(run, 10)
            found: dict[bool, list[Stretch]] = {True: [], False: []}
            for number in range(asked.pairs):
                for is_loaded in (False, True) if number % 2 == 0 else (True, False):
                    clients = Clients(service.port, "growing", asked.clients, asked.rate) if is_loaded else None
                    found[is_loaded].append(stretch(run, roles, service, asked.steps, clients))
            num_steps = _newest(run) + 1
    report(found[False], found[True], asked, num_steps)


def report(alone: list[Stretch], loaded: list[Stretch], asked: argparse.Namespace, num_steps: int) -> None:
    loads = [part.load for part in loaded if part.load is not None]
    latencies = [latency for load in loads for latency in load.latencies_s]
    ratios = [b.seconds / a.seconds for a, b in zip(alone, loaded, strict=True)]
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    seconds = sum(load.seconds for load in loads)
    print(f"{len(latencies)} reads in {seconds:.0f} s: p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    by_path = defaultdict(list)
    for load in loads:
        for path, latency in zip(load.paths, load.latencies_s, strict=True):
            by_path[path].append(1000 * latency)
    for path, found in sorted(by_path.items()):
        print(f"  {path:34} p50 {np.median(found):5.0f}  p99 {np.percentile(found, 99):5.0f} ms")
    num_events = sum(sum(load.events) for load in loads)
    spread = max(max(load.events) - min(load.events) for load in loads)
    num_bytes = sum(load.num_bytes for load in loads)
    print(f"{num_events} events ({num_bytes / 2**20:.0f} MiB) to {asked.clients} streams, each within {spread} of the "
          f"others; the run has {num_steps} steps")  # fmt: skip
    print(f"largest gap of a 10 ms ticker in the service's event loop: {1000 * max(p.gap_s for p in loaded):.0f} ms")
    print(f"training with clients takes {statistics.median(ratios):.3f} times as long as without "
          f"(pairs: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")  # fmt: skip

    for name, parts in (("with", loaded), ("without", alone)):
        training = statistics.mean(part.training_cpu for part in parts)
        service = statistics.mean(part.service_cpu for part in parts)
        print(f"cores used {name} clients: training {training:.2f}, service {service:.2f}")
    print(f"cores used by the clients themselves: {sum(load.cpu_s for load in loads) / seconds:.2f}")
    late = [1000 * late_s for part in alone for late_s in part.late_s]
    print(f"without clients, sleeps of 10 ms in an idle process end late by p50 {np.median(late):.0f} ms, p99 "
          f"{np.percentile(late, 99):.0f} ms, at most {max(late):.0f} ms")  # fmt: skip
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; failures: "
          f"{sorted({f for load in loads for f in load.failures}) or 'none'}")  # fmt: skip


if __name__ == "__main__":
    main()
