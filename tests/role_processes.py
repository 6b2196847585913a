"""Builders for tests that run roles as real processes, joined by storage alone, without Prefect."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipeline
from patience import stretched

from flows.wiring import OpenRun

ROOT = Path(__file__).parent.parent
# At τ = 0 a step waits for three looks at storage, so poll_s holds the pace near three steps a second on any machine.
PACED: dict[str, Any] = {
    "evaluate__every": 0,
    "learner__checkpoint_every": 7,
    "limits__poll_s": 0.1,
    "limits__lease_s": 2.0,
    "limits__heartbeat_s": 0.2,
    "limits__deadline_s": 60,
}


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of `condition`."""
    began = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - began < stretched(seconds), f"waited {time.monotonic() - began:.0f} s for {what}"
        time.sleep(0.05)
    return found


def paced_run(root: Path, **overrides: Any) -> OpenRun:
    """A small run with its models made, slow enough for processes to come and go while it trains."""
    return pipeline.new_run(pipeline.small_config(root, **PACED, **overrides))


class RoleStarter:
    """Starts roles of one run with `asyncopd worker`, and ends those that are left."""

    def __init__(self, run: OpenRun, folder: Path) -> None:
        self._run, self._folder = run, folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, role: str) -> subprocess.Popen[bytes]:
        """One more process of `role`; it takes seconds to import before storage hears of it."""
        output = (self._folder / f"{role}-{len(self.processes)}.log").open("wb")
        with output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "asyncopd.cli",
                    "worker",
                    role,
                    self._run.log.run_id,
                    "--root",
                    self._run.config.storage.root,
                ],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def output(self, process: subprocess.Popen[bytes]) -> str:
        """Everything the process said."""
        number = self.processes.index(process)
        return next(self._folder.glob(f"*-{number}.log")).read_text()

    def name(self, process: subprocess.Popen[bytes]) -> str | None:
        """The worker's name in storage, once it gave a sign of life."""
        beats = self._run.log.heartbeats()
        return next((name for name, beat in beats.items() if beat.status.pid == process.pid), None)


@contextmanager
def roles_of(run: OpenRun, folder: Path) -> Iterator[RoleStarter]:
    folder.mkdir(exist_ok=True)
    starter = RoleStarter(run, folder)
    try:
        yield starter
    finally:
        for process in starter.processes:
            process.kill()
            process.wait()
