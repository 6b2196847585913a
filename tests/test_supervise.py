"""Child processes end when they should: with their parent, with SIGTERM or without, and never by mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from asyncopd.local.processes import (
    STACK_HOME,
    TERMINATE_GRACE_S,
    Child,
    end_processes,
    marked_processes,
    past_proxies,
    record_process,
    recorded_processes,
    tail,
)

WATCHFUL = (
    "from asyncopd.local.processes import watch_parent; watch_parent()\n"
    "print('ready', flush=True); import time; time.sleep(60)"
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_HOME", str(tmp_path / "home"))


def until(condition: Callable[[], object], seconds: float = 10.0) -> float:
    """Seconds until the condition held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the condition did not come true in time"
        time.sleep(0.02)
    return time.monotonic() - start


def start_child(code: str, tmp_path: Path) -> Child:
    child = Child("test", [sys.executable, "-c", code], log_path=tmp_path / "child.log")
    until(lambda: "ready" in tail(child.log_path))
    return child


@pytest.mark.parametrize("ignores_sigterm", [False, True])
def test_a_child_ends_with_its_parent_however_that_died(tmp_path: Path, ignores_sigterm: bool) -> None:
    # SIGKILL leaves the parent no chance to tell anybody; only the end of the child's stdin does.
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignores_sigterm else ""
    parent_code = (
        "import sys, time; from pathlib import Path; from asyncopd.local.processes import Child\n"
        f"argv, log = [sys.executable, '-c', {deaf + WATCHFUL!r}], Path({str(tmp_path / 'c.log')!r})\n"
        "child = Child('test', argv, log_path=log)\n"
        "print(child.record.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        until(lambda: "ready" in (tmp_path / "c.log").read_text())
        parent.kill()
    took_s = until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, TERMINATE_GRACE_S + 2)
    assert (took_s > TERMINATE_GRACE_S - 1) == ignores_sigterm
    assert recorded_processes() == []


def test_this_machine_is_reached_past_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    monkeypatch.delenv("no_proxy", raising=False)
    assert past_proxies() == {}
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url = f"http://localhost:{server.server_port}/"
        for proxy in ("http://127.0.0.1:9", "socks5://127.0.0.1:9"):
            monkeypatch.setenv("ALL_PROXY", proxy)
            with pytest.raises(httpx.ConnectError):
                httpx.get(url)
            for name, value in past_proxies().items():
                monkeypatch.setenv(name, value)
            assert httpx.get(url).status_code == 200
            with pytest.raises(httpx.ConnectError):
                httpx.get("http://pypi.example/")
            monkeypatch.setenv("NO_PROXY", "intranet.example")
            monkeypatch.delenv("no_proxy")
        server.shutdown()


def test_a_record_names_one_process_and_not_the_next_with_its_pid() -> None:
    record = record_process("test", os.getpid())
    assert recorded_processes() == [record]
    # As if the pid had been given to another process since: same number, another start time.
    record.path.write_text(record.path.read_text().replace(str(record.created), str(record.created - 100)))
    assert recorded_processes() == []
    assert not record.path.exists()


def test_a_half_written_record_is_no_record() -> None:
    record = record_process("test", os.getpid())
    record.path.write_text('{"name": "te')
    assert recorded_processes() == []


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = start_child(DEAF, tmp_path)
    process = child.record.process()
    assert process is not None
    start = time.monotonic()
    assert end_processes([process], grace_s=0.5) == [child.record.pid]
    assert 0.5 <= time.monotonic() - start < 2
    assert not process.is_running()
    child.close()
    assert recorded_processes() == []


def test_descendants_end_with_the_process_that_is_ended(tmp_path: Path) -> None:
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {DEAF!r}]); p.wait()"
    child = start_child(code, tmp_path)
    process = child.record.process()
    assert process is not None
    grandchild = process.children()[0]
    assert set(end_processes([process], grace_s=0.2)) == {process.pid, grandchild.pid}
    until(lambda: not grandchild.is_running())
    child.close()


def test_what_a_stack_started_is_found_without_a_record(tmp_path: Path) -> None:
    # A worker killed while its flow still imports leaves a flow that is on nobody's record.
    home = tmp_path / "home"
    mine, other = (
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, STACK_HOME: str(place)}
        )
        for place in (home, tmp_path / "elsewhere")
    )
    try:
        assert [process.pid for process in marked_processes()] == [mine.pid]
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
