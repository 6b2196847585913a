"""Keeps the role processes of a run alive on one machine: starts, restarts, stops them, and reports why one failed.

start all --> every second: ended well? done with it.  ended badly? start again, up to max_restarts, else fail
stop: SIGTERM to all at once, SIGKILL after the grace; by stdin's end they also stop when this process dies
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncopd.errors import RoleFailedError
from asyncopd.supervise import TERMINATE_GRACE_S, Child, end_processes


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
        failure_of: Callable[[str], str | None],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            failure_of: role -> the reason its last process published before it ended, if any.
        """
        self._run_id, self._root, self._log_dir, self._env = run_id, root, log_dir, env
        self._restarts_left = {spec.name: max_restarts for spec in specs}
        self._failure_of, self._say = failure_of, say
        self._children: dict[RoleSpec, Child] = {}
        self._specs = specs

    async def run(self) -> None:
        """Run every role to its end.

        Raises:
            RoleFailedError: a role ended badly more often than it may be restarted; all others are stopped first.
        """
        try:
            for spec in self._specs:
                self._start(spec)
            while self._children:
                await asyncio.sleep(0.2)
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

    def _start(self, spec: RoleSpec) -> None:
        self._children[spec] = Child(
            spec.name,
            [sys.executable, "-m", "flows.role", spec.role, "--run-id", self._run_id, "--root", self._root],
            log_path=self._log_dir / f"{spec.name}.log",
            # Which of several workers this is, so that each takes a GPU of its own (rollout.vllm.devices).
            env={**self._env, "ASYNCOPD_ROLE_NUMBER": str(spec.number)},
        )

    def _ended(self, spec: RoleSpec, child: Child, status: int) -> None:
        del self._children[spec]
        child.close()
        if status == 0:
            self._say(f"{spec.name} finished")
            return
        reason = self._failure_of(spec.role) or child.tail()
        cause = f"exit status {status}" if status > 0 else f"signal {-status}"
        if self._restarts_left[spec.name] == 0:
            raise RoleFailedError(f"{spec.name} ended with {cause}: {reason}\nIts output is in {child.log_path}.")
        self._restarts_left[spec.name] -= 1
        self._say(
            f"{spec.name} ended with {cause} and is started again ({self._restarts_left[spec.name]} left): {reason}"
        )
        self._start(spec)
