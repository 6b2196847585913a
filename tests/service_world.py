"""A storage root with runs of every kind, the service over it, and a stand-in for Prefect's REST API."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.server
import json
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from synthetic_run import config_of, new_log, publish_run

from api.limits import ServiceSettings
from api.main import UVICORN, create_app
from storage.stores import open_store

CONFIGS = Path(__file__).parent.parent / "configs"
DONE, LIVE, RUNS = "walk-done", "walk-live", 6
LOCAL = "http://127.0.0.1"


def make_root(folder: Path) -> str:
    """`walk-done` finished, `walk-live` halfway and running, and `old-0` … `old-3` finished before them."""
    shutil.copytree(_template(), folder)
    return str(folder)


@functools.cache
def _template() -> str:
    """The same, written once per test process: every record is flushed to disk."""
    folder = tempfile.mkdtemp(prefix="asyncopd-service-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = open_store(folder)
    config = config_of()
    for number in range(RUNS - 2):
        log = new_log(store, config, f"old-{number}")
        publish_run(log, config, num_steps=2)
        log.record_state("failed" if number else "completed", by="flow", reason="it broke" if number else "")
        if number:
            log.publish_failure("learn", "learn-0", "it broke")
    done = new_log(store, config, DONE)
    done.record_state("running", by="flow-1")
    publish_run(done, config)
    done.record_state("completed", by="flow-1")
    live = new_log(store, config, LIVE)
    live.record_state("running", by="flow-2")
    publish_run(live, config, num_steps=5)
    live.publish_checkpoint(4, 0, {"state": b"x"}, worker="learn-0")
    return folder


def settings_of(root: str, folder: Path, **changes: Any) -> ServiceSettings:
    return ServiceSettings(
        **{
            "root": root,
            "configs": CONFIGS,
            "tokens": folder / "tokens.json",
            "poll_s": 0.05,
            "requests_per_s": 10_000.0,
            **changes,
        }
    )


def client_of(settings: ServiceSettings, **changes: Any) -> TestClient:
    return TestClient(create_app(settings), base_url=LOCAL, **changes)


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """A real server in a thread; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **UVICORN))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@dataclass
class Prefect:
    """As much of Prefect's REST API as the service uses, with its idempotency; what it was asked is on record."""

    url: str
    flow_runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    num_busy: int = 0
    """So many requests are answered with 503 first."""

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        *_, noun, verb = path.split("/")
        if "/deployments/name/" in path:
            return {"id": f"{noun}-{verb}"}
        if verb == "health":
            return True
        if verb == "create_flow_run":
            key = body.get("idempotency_key") or uuid.uuid4().hex
            # At once: requests come in threads, and a check before it once made two flow runs of one key.
            made = str(uuid.uuid4())
            if self.keys.setdefault(key, made) == made:
                self.flow_runs[made] = {"deployment": noun, **body}
            return {"id": self.keys[key]}
        assert verb == "set_state", path
        self.cancelled.append(noun)
        return {}


@contextlib.contextmanager
def prefect_stand_in() -> Iterator[Prefect]:
    """Serves a Prefect on a free port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            asked = json.loads(self.rfile.read(size) or "{}")
            is_busy = prefect.num_busy > 0
            prefect.num_busy -= is_busy
            body = json.dumps({} if is_busy else prefect.answer(self.path, asked)).encode()
            self.send_response(503 if is_busy else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        prefect = Prefect(f"http://127.0.0.1:{server.server_port}/api")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield prefect
        finally:
            server.shutdown()
