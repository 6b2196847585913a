"""The service under load while a real run trains: SSE clients and mixed reads; latency, loop gaps, training slowed by.

Roles of the quickstart train in processes of their own, without Prefect. The service runs all the time; stretches of
`--steps` learner steps with clients alternate with stretches without, in the order ABBA, and each pair gives a ratio.
The student hardly learns, because a step gets faster by itself when responses get shorter.

    python benchmarks/service.py --clients 200 --rate 50 --steps 60 --pairs 12
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pipeline
from role_processes import RoleStarter, roles_of
from service_load import Clients, Load

from api.limits import ServiceSettings
from api.main import UVICORN, create_app, give_way
from asyncopd.config import load_config
from flows.wiring import OpenRun

LR = 1e-9
"""The student hardly changes, so a step takes as long as the one before."""
STEADY_STEP = 30
SETTLE_S = 5.0
"""Between a stretch's clients coming and its first step that counts: the burst of connecting is not its pace."""


def serve(root: str, port: int, stop: Any, gap_s: Any, niceness: int) -> None:
    """The service with a 50 ms ticker in its event loop, in a process of its own."""
    os.setsid()  # As `asyncopd up` starts it, and each of the roles.
    give_way(niceness)

    async def main() -> None:
        settings = ServiceSettings(root=root, tokens=Path(root).parent / "tokens.json", requests_per_s=10_000)
        config = uvicorn.Config(create_app(settings), port=port, timeout_graceful_shutdown=1, **UVICORN)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        last = time.perf_counter()
        while not stop.is_set():
            await asyncio.sleep(0.05)
            now = time.perf_counter()
            gap_s.value, last = max(gap_s.value, now - last - 0.05), now
        server.should_exit = True
        await task

    uvloop.run(main())


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
    load: Load | None
    gap_s: float
    late_s: list[float]
    """How much later than asked for sleeps of 10 ms in an idle process ended: what the machine alone costs."""
    service_cpu: float
    """Cores used, on average."""
    training_cpu: float
    training_queued: float
    """Threads of training that could run and waited for a core, on average."""


def stretch(run: OpenRun, roles: RoleStarter, service: Service, num_steps: int, clients: Clients | None) -> Stretch:
    """Wait for `num_steps` steps, and look at what they took."""
    service.gap_s.value, late_s = 0.0, list[float]()
    time.sleep(SETTLE_S)
    first = _wait_for_step(run, _newest(run) + 1)
    began, before = time.monotonic(), _used(service, roles)
    last = _wait_for_step(run, first.step + num_steps, late_s)
    seconds, after = time.monotonic() - began, _used(service, roles)
    load = None if clients is None else clients.stop()
    return Stretch(last.finished - first.finished, load, service.gap_s.value, late_s, *((after - before) / seconds))


def _newest(run: OpenRun) -> int:
    return max(
        (int(key.rsplit("/", 1)[1][:6]) for key in run.log.store.folder(run.log.layout.folder("step")).keys), default=0
    )


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


def _used(service: Service, roles: RoleStarter) -> np.ndarray:
    """Seconds so far: the service on a core, training on a core, training queued for one."""
    training = np.sum([_scheduled(role.pid) for role in roles.processes], axis=0)
    return np.array([_scheduled(service.pid)[0], *training])


def _scheduled(pid: int) -> np.ndarray:
    """Seconds that the threads of `pid` ran and that they were queued (Linux: Documentation/scheduler/sched-stats)."""
    found = [np.zeros(2)]
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(np.array(path.read_text().split()[:2], float) / 1e9)
    return np.sum(found, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50.0, help="reads a second")
    parser.add_argument("--steps", type=int, default=60, help="learner steps of a stretch")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--nice", type=int, default=ServiceSettings.niceness, help="niceness of the service")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_steps = STEADY_STEP + 2 * asked.pairs * (asked.steps + 60)
        changes = {"storage.root": f"{folder}/runs", "learner.num_steps": num_steps, "learner.lr": LR}
        run = pipeline.new_run(load_config("configs/quickstart.yaml", changes), "growing")
        run.log.record_state("running", by="benchmark")
        with Service(f"{folder}/runs", asked.nice) as service, roles_of(run, Path(folder) / "logs") as roles:
            for role in ("rollout", "score", "learn", "evaluate"):
                roles.start(role)
            _wait_for_step(run, STEADY_STEP)
            found: dict[bool, list[Stretch]] = {True: [], False: []}
            for number in range(asked.pairs):
                for is_loaded in (False, True) if number % 2 == 0 else (True, False):
                    clients = Clients(service.port, "growing", asked.clients, asked.rate) if is_loaded else None
                    found[is_loaded].append(stretch(run, roles, service, asked.steps, clients))
            num_steps = _newest(run) + 1
    report(found[False], found[True], asked, num_steps)


def report(alone: list[Stretch], loaded: list[Stretch], asked: argparse.Namespace, num_steps: int) -> None:
    loads = [part.load for part in loaded if part.load is not None]
    reads = [(began, path, 1000 * took) for load in loads for began, path, took in load.reads]
    steady = [took for began, _, took in reads if began > SETTLE_S]
    rush = [took for began, _, took in reads if began <= SETTLE_S]
    logs = [math.log(b.seconds / a.seconds) for a, b in zip(alone, loaded, strict=True)]
    ratio, error = math.exp(statistics.mean(logs)), statistics.stdev(logs) / math.sqrt(len(logs))
    seconds = sum(load.seconds for load in loads)
    for name, found in (("", steady), (f" in the first {SETTLE_S:.0f} s, while the streams catch up,", rush)):
        print(f"{len(found)} reads{name}: p50 {np.median(found):.0f} ms, p99 {np.percentile(found, 99):.0f} ms")
    for path in sorted({path for _, path, _ in reads}):
        found = [took for began, its, took in reads if its == path and began > SETTLE_S]
        print(f"  {path:34} p50 {np.median(found):5.0f}  p99 {np.percentile(found, 99):5.0f} ms")
    num_events = sum(sum(load.events) for load in loads)
    spread = max(max(load.events) - min(load.events) for load in loads)
    num_bytes = sum(load.num_bytes for load in loads)
    print(
        f"{num_events} events ({num_bytes / 2**20:.0f} MiB) to {asked.clients} streams, each within {spread} of the "
        f"others; the run has {num_steps} steps"
    )
    print(f"the service's event loop was kept from a timer for at most {1000 * max(p.gap_s for p in loaded):.0f} ms")
    print(
        f"training with clients takes {ratio:.3f} times as long as without: geometric mean, standard error "
        f"{100 * error:.1f} % (pairs: {', '.join(f'{math.exp(log):.2f}' for log in logs)})"
    )
    for name, parts in (("with", loaded), ("without", alone)):
        training = statistics.mean(part.training_cpu for part in parts)
        service = statistics.mean(part.service_cpu for part in parts)
        queued = statistics.mean(part.training_queued for part in parts)
        print(
            f"cores used {name} clients: training {training:.2f} ({queued:.2f} threads wait for one), "
            f"service {service:.2f}"
        )
    print(f"cores used by the clients themselves: {sum(load.cpu_s for load in loads) / seconds:.2f}")
    late = [1000 * late_s for part in alone for late_s in part.late_s]
    print(
        f"without clients, sleeps of 10 ms in an idle process end late by p50 {np.median(late):.0f} ms, p99 "
        f"{np.percentile(late, 99):.0f} ms, at most {max(late):.0f} ms"
    )
    print(
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; failures: "
        f"{sorted({f for load in loads for f in load.failures}) or 'none'}"
    )


if __name__ == "__main__":
    main()
