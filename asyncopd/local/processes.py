"""Owns child processes so that none outlives its purpose, whatever is killed and how; and keeps a run's roles alive.

    parent --Popen, own session, stdin pipe, log file--> child --watch_parent()--> ends itself when stdin closes
       |
       +--record: pid + start time in <home>/processes/ --+--> `asyncopd down` finds and ends what a crash left
       +--environment: ASYNCOPD_STACK_HOME, inherited ----+

A pid alone may belong to somebody else by the time it is read; with the start time it names one process for ever.

    RoleProcesses   start all --> five times a second: ended well? done with it
                                                       ended badly? start again, up to max_restarts, else fail;
                                                       fail at once where the error repeats
                                                       alive but no heartbeat for hang_s? SIGKILL, then as above
                    stop: SIGTERM to all at once, SIGKILL after the grace
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path

import psutil

from asyncopd.errors import REPEATS, RoleFailedError, StorageError

TERMINATE_GRACE_S = 4.0
"""From SIGTERM to SIGKILL. Roles stop within a second or two; cancellation promises ten in all."""
STEADY_S = 300.0
"""A process that lived this long has its restarts again: what kills a role once an hour is not a broken role."""
STACK_HOME = "ASYNCOPD_STACK_HOME"
"""Environment variable that marks everything a stack started, directly or not, with the home of that stack."""


LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def past_proxies() -> dict[str, str]:
    """NO_PROXY, in both spellings, with this machine's own addresses added; nothing where no proxy is set.

    A proxy knows another localhost: server, service and a teacher served here were looked for there.
    """
    if not {name.lower() for name, value in os.environ.items() if value} & {"http_proxy", "https_proxy", "all_proxy"}:
        return {}
    hosts = [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), *LOOPBACK]
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(dict.fromkeys(filter(None, hosts))))


def home() -> Path:
    """Where this machine's local state lives: $ASYNCOPD_HOME, or `.asyncopd` in the current directory."""
    return Path(os.environ.get("ASYNCOPD_HOME", ".asyncopd")).absolute()


def tokens_path() -> Path:
    """Where this machine's tokens are kept."""
    return home() / "tokens.json"


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


def spawn(
    argv: Sequence[str], log_path: Path, env: Mapping[str, str], *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a process in its own session, with `env` added to ours and its output appended to a file."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **env}
    with log_path.open("ab") as output:
        # Not a pipe for output: an orphan that holds one keeps its reader waiting.
        return subprocess.Popen(
            argv, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )


class Child:
    """A child process in its own session, with its output in a file and its stdin held open as a lifeline."""

    def __init__(self, name: str, argv: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None) -> None:
        self.log_path = log_path
        self._popen = spawn(argv, log_path, env or {}, stdin=subprocess.PIPE)
        self.started = time.monotonic()
        """Seconds."""
        self.record = record_process(name, self._popen.pid)

    def exit_status(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._popen.poll()

    def kill(self) -> None:
        """End it whatever it does: SIGKILL, without waiting. Nothing where it ended already."""
        self._popen.kill()

    def close(self) -> None:
        """Release the lifeline and the record of a child that ended."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        self.record.path.unlink(missing_ok=True)


def tail(log_path: Path) -> str:
    """The last 15 lines of a log; nothing where there is none."""
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-15:]) if log_path.is_file() else ""


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
    family = {root.pid: root for root in processes}
    for root in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= {process.pid: process for process in root.children(recursive=True)}
    for process in family.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(list(family.values()), timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
    return list(family)


@dataclass(frozen=True)
class RoleSpec:
    """One process to keep alive."""

    role: str
    """`rollout`, `score`, `learn`, `evaluate` or `pretrain`."""
    number: int = 0
    """Tells workers of one role apart."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.number}"


@dataclass
class RoleProcesses:
    """The role processes of one run on this machine."""

    specs: Sequence[RoleSpec]
    _: KW_ONLY
    run_id: str
    root: str
    log_dir: Path
    env: Mapping[str, str]
    max_restarts: int
    hang_s: float
    failure_of: Callable[[str], str | None]
    """Role -> the reason its last process published before it ended, if any."""
    beats: Callable[[], Mapping[int, object]]
    """Pid -> anything that changes with every heartbeat of that process on this machine."""
    retire: Callable[[int], object]
    """Told the pid of every child that ended, so that nobody waits for its leases to run out."""
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._restarts_left = dict.fromkeys(self.specs, self.max_restarts)
        self._children: dict[RoleSpec, Child] = {}
        self._seen: dict[Child, tuple[object, float]] = {}
        """Its last heartbeat, and the monotonic time at which that was seen first."""

    async def run(self) -> None:
        """Run every role to its end.

        Raises:
            RoleFailedError: a role ended badly more often than it may be restarted, or with an error that would repeat
                itself; all others are stopped first.
        """
        try:
            for spec in self.specs:
                self._start(spec)
            checked = time.monotonic()
            while self._children:
                await asyncio.sleep(0.2)
                if time.monotonic() - checked > self.hang_s / 5:
                    await self._kill_hung()
                    checked = time.monotonic()
                for spec, child in list(self._children.items()):
                    if (status := child.exit_status()) is not None:
                        self._ended(spec, status)
        finally:
            self.stop()

    def stop(self) -> None:
        """End every role still running, within about TERMINATE_GRACE_S seconds."""
        children = list(self._children.values())
        self._children.clear()
        end_processes([process for child in children if (process := child.record.process()) is not None])
        for child in children:
            child.exit_status()
            child.close()

    async def _kill_hung(self) -> None:
        """SIGKILL every child that lives but does not beat: nothing gentler reaches a process that is stopped."""
        try:
            beats = await asyncio.to_thread(self.beats)
        except StorageError:
            return  # storage that does not answer says nothing about the roles
        now = time.monotonic()
        for spec, child in self._children.items():
            beat = beats.get(child.record.pid)
            last, seen = self._seen.get(child, (None, now))
            if beat is None or beat != last:
                self._seen[child] = (beat, now)
            elif now - seen > self.hang_s:
                self.say(f"{spec.name} gave no sign of life for {now - seen:.0f} s and is killed")
                child.kill()
                self._seen[child] = (beat, now)

    def _start(self, spec: RoleSpec) -> None:
        # Which of several workers this is, so that each takes a GPU of its own (rollout.vllm.devices).
        env = {**self.env, "ASYNCOPD_ROLE_NUMBER": str(spec.number)}
        self._children[spec] = Child(
            spec.name, self._command(spec), log_path=self.log_dir / f"{spec.name}.log", env=env
        )

    def _command(self, spec: RoleSpec) -> list[str]:
        run = ("--run-id", self.run_id, "--root", self.root)
        return [sys.executable, "-m", "flows.roles", spec.role, *run, "--flow", "--watch-parent"]

    def _ended(self, spec: RoleSpec, status: int) -> None:
        child = self._children.pop(spec)
        child.close()
        if status == 0:
            self.say(f"{spec.name} finished")
            return
        reason = self.failure_of(spec.role) or tail(child.log_path)
        cause = f"exit status {status}" if status > 0 else f"signal {-status}"
        with contextlib.suppress(StorageError):  # its leases then run out by themselves
            self.retire(child.record.pid)
        if time.monotonic() - child.started > STEADY_S:
            self._restarts_left[spec] = self.max_restarts
        if status == REPEATS or self._restarts_left[spec] == 0:
            again = "\nIt would fail the same way again, so it is not started again." if status == REPEATS else ""
            raise RoleFailedError(
                f"{spec.name} ended with {cause}: {reason}{again}\nIts output is in {child.log_path}."
            )
        self._restarts_left[spec] -= 1
        self.say(f"{spec.name} ended with {cause} and is started again ({self._restarts_left[spec]} left): {reason}")
        self._start(spec)
