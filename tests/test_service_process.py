"""The process that `asyncopd serve` becomes lets training go first."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from role_processes import until

from api.main import AUTOGROUP


@pytest.mark.parametrize("owns_session", [True, False])
def test_it_is_nice_and_its_session_too_where_nobody_else_is_in_it(tmp_path: Path, owns_session: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Of this session and not its leader, as when it is started from a shell.
    before = AUTOGROUP.read_text() if AUTOGROUP.exists() else None
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncopd.cli", "serve", "--port", str(port), "--root", str(tmp_path), "--nice", "7"],
        start_new_session=owns_session,
    )
    try:
        until(lambda: _answers(port), 60, "the service")
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 7
        if before is not None:
            mine = Path(f"/proc/{process.pid}/autogroup").read_text()
            assert mine.endswith("nice 7\n") if owns_session else mine == before == AUTOGROUP.read_text()
    finally:
        process.terminate()
        began = time.monotonic()
        process.wait(30)
    assert time.monotonic() - began < 10


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False
