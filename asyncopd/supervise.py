"""Owns child processes so that none outlives its purpose, whatever is killed and how.

    parent --Popen, own session, stdin pipe, log file--> child --watch_parent()--> ends itself when stdin closes
       |
       +--record: pid + start time in <home>/processes/ --+--> `asyncopd down` finds and ends what a crash left
       +--environment: ASYNCOPD_STACK_HOME, inherited ----+

A pid alone may belong to somebody else by the time it is read; with the start time it names one process for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

TERMINATE_GRACE_S = 4.0
"""From SIGTERM to SIGKILL. Roles stop within a second or two; cancellation promises ten in all."""


STACK_HOME = "ASYNCOPD_STACK_HOME"
"""Environment variable that marks everything a stack started, directly or not, with the home of that stack."""


def home() -> Path:
    """Where this machine's local state lives: $ASYNCOPD_HOME, or `.asyncopd` in the current directory."""
    return Path(os.environ.get("ASYNCOPD_HOME", ".asyncopd")).absolute()


@dataclass(frozen=True)
class ProcessRecord:
    """One process this machine's AsyncOPD started."""

    name: str
    pid: int
    created: float
    """Start time, Unix seconds, as the kernel reports it."""

    @property
    def path(self) -> Path:
        return home() / "processes" / f"{self.pid}.json"

    def process(self) -> psutil.Process | None:
        """The process, if it still runs and is the same one."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) > 0.05 or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process


def record_process(name: str, pid: int) -> ProcessRecord:
    """Put a process on record under `name`, so that `asyncopd down` can end it."""
    record = ProcessRecord(name, pid, psutil.Process(pid).create_time())
    record.path.parent.mkdir(parents=True, exist_ok=True)
    record.path.write_text(json.dumps(asdict(record)))
    return record


def recorded_processes() -> list[ProcessRecord]:
    """Every process on record that still runs; records of dead ones are removed."""
    alive = []
    for path in sorted((home() / "processes").glob("*.json")):
        try:
            record = ProcessRecord(**json.loads(path.read_text()))
        except (json.JSONDecodeError, FileNotFoundError):
            continue  # being written or removed by its owner at this moment
        if record.process() is None:
            path.unlink(missing_ok=True)
        else:
            alive.append(record)
    return alive


def marked_processes() -> list[psutil.Process]:
    """Every process that descends from this home's server or worker, recorded or not.

    A flow puts itself on record only after seconds of importing; a worker killed before that leaves it unknown.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(STACK_HOME) == str(home()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Child:
    """A child process in its own session, with its output in a file and its stdin held open as a lifeline."""

    def __init__(self, name: str, argv: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log_path = log_path
        with log_path.open("ab") as output:
            # Not a pipe for output: an orphan that holds one keeps its reader waiting.
            self._popen = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        self.record = record_process(name, self._popen.pid)

    def exit_status(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._popen.poll()

    def terminate(self) -> None:
        """Ask it to stop: SIGTERM, without waiting."""
        if self._popen.poll() is None:
            self._popen.terminate()

    def kill(self) -> None:
        """End it whatever it does: SIGKILL, without waiting."""
        if self._popen.poll() is None:
            self._popen.kill()

    def close(self) -> None:
        """Release the lifeline and the record of a child that ended."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        self.record.path.unlink(missing_ok=True)

    def tail(self, num_lines: int = 15) -> str:
        """The end of its output."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])


def watch_parent() -> None:
    """In a child: end this process when the parent is gone. Call once, early.

    A thread blocks on stdin, which is at its end as soon as the parent died, however it died. The process then gets
    SIGTERM, so that it can publish and retire, and SIGKILL if that takes too long.
    """

    def wait_for_end() -> None:
        # Not sys.stdin: a daemon thread inside its lock makes the interpreter abort at exit.
        while os.read(0, 4096):
            continue
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(TERMINATE_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_end, name="watch-parent", daemon=True).start()


def end_processes(processes: Sequence[psutil.Process], grace_s: float = TERMINATE_GRACE_S) -> list[int]:
    """SIGTERM all processes and their descendants, wait, SIGKILL what is left. Returns the pids that were ended."""
    family = list({p.pid: p for root in processes for p in (root, *_descendants(root))}.values())
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
    return [process.pid for process in family]


def _descendants(process: psutil.Process) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from process.children(recursive=True)
