"""The local stack (a Prefect server on SQLite, a process worker, prefect.yaml's deployments), and flow runs in it.

asyncopd up     server (if none answers) -> worker (if none runs) -> prefect deploy --all; and the service
asyncopd down   ends them all, every flow they run, and every role those started

A flow run is started, watched and cancelled through Prefect's REST API. Imports no Prefect.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from asyncopd.errors import ServerAwayError, StackError
from asyncopd.local.processes import (
    STACK_HOME,
    end_processes,
    home,
    marked_processes,
    past_proxies,
    record_process,
    recorded_processes,
    spawn,
    tail,
)

POOL = "local"
SERVER_START_S = 240.0
"""A fresh home runs every database migration: 30–50 s on two cores, more when they are busy."""
BUSY_PAUSES_S = (0.5, 2.0)
"""Prefect answers 503 when its SQLite is locked for too long, having done nothing; its own client repeats, too."""
TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


def api_url() -> str:
    """Where Prefect's REST API is: $PREFECT_API_URL, or the address in prefect.toml."""
    return os.environ.get("PREFECT_API_URL", "http://127.0.0.1:4200/api").rstrip("/")


def shown_url() -> str:
    """`api_url()` as anybody may read it: without the name and password it may carry."""
    address = urlsplit(api_url())
    return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()


def service_url() -> str:
    """Where `up` starts the service: $ASYNCOPD_SERVICE_URL, or port 8321 of this machine."""
    return os.environ.get("ASYNCOPD_SERVICE_URL", "http://127.0.0.1:8321").rstrip("/")


def server_answers() -> bool:
    """Does a Prefect server answer at `api_url()`?"""
    return _answer(f"{api_url()}/health").strip() == "true"


def up(say: Callable[[str], None]) -> None:
    """Start what is missing. A second call finds everything running and returns at once.

    Raises:
        StackError: the port belongs to another program, or the server or worker did not start in time.
    """
    _ensure_server(say)
    _ensure_worker(say)
    _ensure_deployed(say)
    # Also when it runs already: one that reports to another server would leave every run waiting.
    _wait(_worker_online, 60, f"the Prefect worker to report to {api_url()}", "worker")


def up_service(say: Callable[[str], None]) -> None:
    """Start the service over storage root `runs`, unless it runs. Not part of `up`: `train` does not need it.

    Raises:
        StackError: the port belongs to another program, or the service did not start in time.
    """
    if not _runs("service"):
        address = urlsplit(service_url())
        host, port = address.hostname or "127.0.0.1", address.port or 80
        taken = "in use, so the service cannot start there; server and worker run. Stop what uses it"
        _refuse_taken(host, port, taken, f"ASYNCOPD_SERVICE_URL=http://{host}:{port + 1}")
        say(f"starting the service at {service_url()}")
        options = {"--host": host, "--port": str(port), "--root": "runs", "--configs": "configs"}
        _spawn("service", [sys.executable, "-m", "api.main", *(part for option in options.items() for part in option)])
    _wait(lambda: service_answers() or not _runs("service"), 120, f"the service at {service_url()}", "service")
    if not service_answers():
        raise StackError(f"the service ended; the reason is at the end of {_log_path('service')}.")


def service_answers() -> bool:
    """Does the service answer at `service_url()`?"""
    return _answer(f"{service_url()}/healthz") != ""


def down(say: Callable[[str], None]) -> None:
    """End the stack and everything it started, also what a SIGKILL of any part left behind.

    Raises:
        StackError: something survives SIGKILL.
    """
    num_ended = 0
    names: set[str] = set()
    # In rounds, because a flow may restart a role that was ended before it.
    for _ in range(5):
        records = recorded_processes()
        # The server last, so that what ends before it can still report how.
        server = {r.pid for r in records if r.name == "server"}
        found = {p.pid: p for p in (*(r.process() for r in records), *marked_processes()) if p is not None}
        if not found:
            say(f"ended {num_ended} processes: {', '.join(sorted(names))}" if num_ended else "nothing runs")
            return
        names |= {r.name for r in records} or {"what they left"}
        others = [process for pid, process in found.items() if pid not in server]
        num_ended += len(end_processes(others or list(found.values())))
    raise StackError(
        f"processes {sorted(found)} do not end, not even by SIGKILL. See `ps -o pid,stat,wchan,cmd -p PID`."
    )


def status() -> dict[str, Any]:
    """What runs here: server, worker, flows and roles with their pids."""
    processes = [{"name": r.name, "pid": r.pid} for r in recorded_processes()]
    server = server_answers()
    return {
        "server": api_url() if server else None,
        # Prefect calls a killed worker online for another half minute.
        "worker_online": server and _runs("worker") and _worker_online(),
        "service": service_url() if _runs("service") and service_answers() else None,
        "processes": processes,
    }


def prefect_environment() -> dict[str, str]:
    """Environment of every Prefect process started here; a user's own variables win."""
    return {
        "PREFECT_API_URL": api_url(),
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLI_COLORS": "false",
        # The worker looks for submitted runs this often; the default of 10 s is most of a quickstart's patience.
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
        # Whole seconds: Prefect 3.7.7 truncates a fraction, and an interval of 0 spins a core.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "asyncopd",
        # One compute thread per process: 3–10 times faster than two at these sizes, and reproducible.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **past_proxies(),
    } | {key: value for key, value in os.environ.items() if key.startswith(("PREFECT_", "OMP_"))}


@dataclass(frozen=True)
class FlowRun:
    """A flow run by its id."""

    id: str

    def state(self) -> dict[str, Any]:
        """Prefect's state object: `type`, `name`, `message`."""
        state: dict[str, Any] = _request("GET", f"/flow_runs/{self.id}")["state"] or {"type": "PENDING"}
        return state

    def terminal_state(self) -> str | None:
        """COMPLETED, FAILED, CRASHED or CANCELLED; None while it goes on."""
        kind = self.state()["type"]
        return kind if kind in TERMINAL else None

    def message(self) -> str:
        return str(self.state().get("message") or "no message")

    def cancel(self) -> None:
        """Ask Prefect to cancel it; the flow stops its roles within seconds."""
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
        _request("POST", f"/flow_runs/{self.id}/set_state", body)


def create_flow_run(
    deployment: str, parameters: Mapping[str, Any], *, name: str, idempotency_key: str | None = None
) -> FlowRun:
    """Start a deployment by name, for example `asyncopd/train`; a second call with one key finds the first's run.

    Raises:
        ServerAwayError: no server answers.
        StackError: there is no such deployment.
    """
    found = _request("GET", f"/deployments/name/{deployment}")
    body = {"parameters": dict(parameters), "name": name, "idempotency_key": idempotency_key}
    return FlowRun(_request("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])


def _request(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    try:
        for pause_s in (*BUSY_PAUSES_S, None):
            response = httpx.request(method, f"{api_url()}{path}", json=body, timeout=30)
            if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE or pause_s is None:
                break
            time.sleep(pause_s)
    except httpx.TransportError as error:
        raise ServerAwayError(
            f"no Prefect server answers at {shown_url()} ({error}). Start it again with `asyncopd up`; runs that go on "
            "find it, or are ended with `asyncopd down`."
        ) from error
    if response.is_error:
        kind = ServerAwayError if response.is_server_error else StackError
        raise kind(f"Prefect answered {response.status_code} to {method} {path}: {response.text[:300]}")
    return response.json()


def _answer(url: str) -> str:
    """Text of a successful answer; empty without one."""
    try:
        response = httpx.get(url, timeout=5)
    except httpx.HTTPError:
        return ""
    return response.text if response.is_success else ""


def _refuse_taken(host: str, port: int, taken: str, other: str) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((host, port)) == 0:
            raise StackError(f"port {port} of {host} is {taken}, or choose another: {other} asyncopd up.")


def _runs(name: str) -> bool:
    return any(record.name == name for record in recorded_processes())


def _prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


def _ensure_server(say: Callable[[str], None]) -> None:
    if server_answers():
        return
    address = urlsplit(api_url())
    if address.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise StackError(f"no Prefect server answers at {api_url()}, and only a local one can be started here.")
    port = address.port or 80
    taken = "in use by something that is not a Prefect server. Stop it"
    _refuse_taken(address.hostname, port, taken, f"PREFECT_API_URL=http://127.0.0.1:{port + 1}/api")
    say(f"starting a Prefect server at {api_url()} (a fresh one takes 30–50 s)")
    _spawn("server", _prefect("server", "start", "--host", address.hostname, "--port", str(port)))
    _wait(server_answers, SERVER_START_S, f"the Prefect server at {api_url()}", "server")


def _ensure_worker(say: Callable[[str], None]) -> None:
    if _runs("worker"):
        return
    say(f"starting a Prefect worker on work pool {POOL}")
    # Created here: `prefect deploy` into a pool that does not exist yet only warns, and its runs never start.
    response = httpx.post(f"{api_url()}/work_pools/", json={"name": POOL, "type": "process"}, timeout=30)
    if response.status_code not in (201, 409):
        raise StackError(f"the Prefect server refused work pool {POOL}: {response.status_code} {response.text[:300]}")
    _spawn("worker", _prefect("worker", "start", "--pool", POOL, "--type", "process"))


def _ensure_deployed(say: Callable[[str], None]) -> None:
    """Deploy when prefect.yaml or the place of the checkout changed, or the server does not know it."""
    definition = Path("prefect.yaml")
    if not definition.is_file():
        raise StackError(f"{definition.absolute()}: not found. Run asyncopd from the root of the checkout.")
    stamp = home() / "deployed"
    now = hashlib.sha256(definition.read_bytes() + str(definition.absolute()).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == now:
        response = httpx.get(f"{api_url()}/deployments/name/asyncopd/train", timeout=30)
        if response.status_code == 200:
            return
    say("deploying prefect.yaml")
    result = subprocess.run(
        _prefect("--no-prompt", "deploy", "--all"),
        env={**os.environ, **prefect_environment()},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode:
        raise StackError(f"`prefect deploy --all` failed:\n{(result.stdout + result.stderr)[-2000:]}")
    stamp.write_text(now)


def _worker_online() -> bool:
    response = httpx.post(f"{api_url()}/work_pools/{POOL}/workers/filter", json={}, timeout=30)
    return response.status_code == 200 and any(worker["status"] == "ONLINE" for worker in response.json())


def _spawn(name: str, argv: list[str]) -> None:
    """Start a daemon in its own session. It outlives this process on purpose; `down` ends it by its record."""
    (home() / "prefect").mkdir(parents=True, exist_ok=True)
    record_process(name, spawn(argv, _log_path(name), {**prefect_environment(), STACK_HOME: str(home())}).pid)


def _log_path(name: str) -> Path:
    return home() / "logs" / f"{name}.log"


def _wait(ready: Callable[[], bool], seconds: float, what: str, name: str) -> None:
    """Wait until `ready`; the refusal quotes the log of the process called `name`."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise StackError(
                f"waited {seconds:.0f} s for {what}. If `asyncopd down` and `asyncopd up` do not help, look for the "
                f"reason at the end of {_log_path(name)}:\n{tail(_log_path(name))}"
            )
        time.sleep(0.5)
