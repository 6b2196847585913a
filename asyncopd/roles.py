"""Keeps the role processes of a run alive on one machine: starts, restarts, stops them, and reports why one failed.

start all --> five times a second: ended well? done with it.  ended badly? start again, up to max_restarts, else fail
              heartbeat stood still for hang_s although the process lives? SIGKILL, then as above
stop: SIGTERM to all at once, SIGKILL after the grace; by stdin's end they also stop when this process dies
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncopd.errors import RoleFailedError, StorageError
from asyncopd.supervise import TERMINATE_GRACE_S, Child, end_processes

STEADY_S = 300.0
"""A process that lived this long has its restarts again: what kills a role once an hour is not a broken role."""


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


class RoleProcesses:
    """The role processes of one run on this machine."""

    def __init__(
        self,
        specs: Sequence[RoleSpec],
        *,
        run_id: str,
        root: str,
        log_dir: Path,
        env: dict[str, str],
        max_restarts: int,
        hang_s: float,
        failure_of: Callable[[str], str | None],
        beats: Callable[[], Mapping[int, object]],
        bury: Callable[[int], object],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            failure_of: role -> the reason its last process published before it ended, if any.
            beats: pid -> anything that changes with every heartbeat of that process on this machine.
            bury: told the pid of every child that ended, so that nobody waits for its leases to run out.
        """
        self._run_id, self._root, self._log_dir, self._env = run_id, root, log_dir, env
        self._max_restarts, self._hang_s = max_restarts, hang_s
        self._restarts_left = {spec.name: max_restarts for spec in specs}
        self._beats, self._bury = beats, bury
        self._last_beats: dict[int, tuple[object, float]] = {}
        """pid -> its last heartbeat, and when this process saw it first, on the monotonic clock."""
        self._failure_of, self._say = failure_of, say
        self._children: dict[RoleSpec, Child] = {}
        self._started: dict[RoleSpec, float] = {}
        self._specs = specs

    async def run(self) -> None:
        """Run every role to its end.

        Raises:
            RoleFailedError: a role ended badly more often than it may be restarted; all others are stopped first.
        """
        try:
            for spec in self._specs:
                self._start(spec)
            checked_s = time.monotonic()
            while self._children:
                await asyncio.sleep(0.2)
                if time.monotonic() - checked_s > self._hang_s / 5:
                    await self._kill_hung()
                    checked_s = time.monotonic()
                for spec, child in list(self._children.items()):
                    status = child.exit_status()
                    if status is not None:
                        self._ended(spec, child, status)
        finally:
            self.stop()

    def stop(self) -> None:
        """End every role still running, within about TERMINATE_GRACE_S seconds."""
        children = list(self._children.values())
        self._children.clear()
        alive = [process for child in children if (process := child.record.process()) is not None]
        end_processes(alive, TERMINATE_GRACE_S)
        for child in children:
            child.exit_status()
            child.close()

    async def _kill_hung(self) -> None:
        """SIGKILL every child that lives but does not beat: nothing gentler reaches a process that is stopped."""
        try:
            beats = await asyncio.to_thread(self._beats)
        except StorageError:
            return  # storage that does not answer says nothing about the roles
        now = time.monotonic()
        for spec, child in self._children.items():
            beat = beats.get(child.record.pid)
            last, since = self._last_beats.get(child.record.pid, (None, now))
            if beat is None or beat != last:
                self._last_beats[child.record.pid] = (beat, now)
            elif now - since > self._hang_s:
                self._say(f"{spec.name} gave no sign of life for {now - since:.0f} s and is killed")
                child.kill()
                self._last_beats[child.record.pid] = (beat, now)

    def _start(self, spec: RoleSpec) -> None:
        self._started[spec] = time.monotonic()
        self._children[spec] = Child(
            spec.name,
            [sys.executable, "-m", "flows.role", spec.role, "--run-id", self._run_id, "--root", self._root],
            log_path=self._log_dir / f"{spec.name}.log",
            # Which of several workers this is, so that each takes a GPU of its own (rollout.vllm.devices).
            env={**self._env, "ASYNCOPD_ROLE_NUMBER": str(spec.number)},
        )

    def _ended(self, spec: RoleSpec, child: Child, status: int) -> None:
        del self._children[spec]
        self._last_beats.pop(child.record.pid, None)
        child.close()
        if status == 0:
            self._say(f"{spec.name} finished")
            return
        reason = self._failure_of(spec.role) or child.tail()
        cause = f"exit status {status}" if status > 0 else f"signal {-status}"
        with contextlib.suppress(StorageError):  # its leases then run out by themselves
            self._bury(child.record.pid)
        if time.monotonic() - self._started[spec] > STEADY_S:
            self._restarts_left[spec.name] = self._max_restarts
        if self._restarts_left[spec.name] == 0:
            raise RoleFailedError(f"{spec.name} ended with {cause}: {reason}\nIts output is in {child.log_path}.")
        self._restarts_left[spec.name] -= 1
        self._say(
            f"{spec.name} ended with {cause} and is started again ({self._restarts_left[spec.name]} left): {reason}"
        )
        self._start(spec)
