"""Who runs the roles of a disturbed run, and who starts again what was killed.

PlainWorld   this process, as a cluster's scheduler would: whatever ended badly is started again at once
StackWorld   Prefect: the flow restarts roles; this process does what a user would (asyncopd up, resume)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil

from asyncopd.config import RunConfig
from asyncopd.errors import RoleFailedError
from asyncopd.local import stack
from asyncopd.local.processes import TERMINATE_GRACE_S, Child, RoleSpec, end_processes, home, recorded_processes
from asyncopd.local.stack import create_flow_run
from chaos.runs import run_role
from storage.run_log import StoredRunLog
from storage.runs import create_run, new_record
from storage.stores import open_store

FLOW_START_S = 90.0
"""From its creation to a flow process on record, on a busy machine."""


class World(Protocol):
    """A run that goes on, and its processes."""

    roles: tuple[str, ...]
    """Names of the role processes."""
    beyond_roles: tuple[str, ...]
    """Names of other processes that can be killed."""

    def pid(self, name: str) -> int | None:
        """The process of that name, if it runs now."""
        ...

    def tend(self) -> list[str]:
        """Start again what somebody has to; called again and again. Returns who did what, in words."""
        ...


def restarter(name: str) -> str:
    """Who starts `name` again in a StackWorld."""
    return {
        "server": "user: asyncopd up",
        "worker": "user: asyncopd up, train --run-id",
        "flow": "user: asyncopd train --run-id",
    }.get(name, "flow")


class PlainWorld:
    """Roles as plain processes (flows/roles.py) under this one. Of two learners, one waits for the other's place."""

    beyond_roles: tuple[str, ...] = ()

    def __init__(self, log: StoredRunLog, specs: list[RoleSpec], *, log_dir: Path) -> None:
        self._log, self._specs, self._log_dir = log, specs, log_dir
        self._children: dict[str, Child] = {}
        self.roles = tuple(spec.name for spec in specs)

    def pid(self, name: str) -> int | None:
        child = self._children.get(name)
        return child.record.pid if child is not None and child.exit_status() is None else None

    def tend(self) -> list[str]:
        done = []
        for spec in self._specs:
            child = self._children.get(spec.name)
            status = child.exit_status() if child is not None else None
            if child is not None and status not in (None, 0):
                child.close()
                self._start(spec)
                done.append(f"{spec.name} (status {status}) started again")
        return done

    def _start(self, spec: RoleSpec) -> None:
        run = ("--run-id", self._log.run_id, "--root", self._log.store.url)
        self._children[spec.name] = Child(
            spec.name,
            [sys.executable, "-m", "flows.roles", spec.role, *run, "--watch-parent"],
            log_path=self._log_dir / f"{spec.name}.log",
            env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start every role; at the end, however it comes, end them all."""
        try:
            for spec in self._specs:
                self._start(spec)
            yield
        finally:
            alive = [process for child in self._children.values() if (process := child.record.process()) is not None]
            for process in alive:
                process.resume()  # one that is stopped takes no SIGTERM
            end_processes(alive, TERMINATE_GRACE_S)
            for child in self._children.values():
                child.exit_status()
                child.close()


def plain_run(config: RunConfig, run_id: str) -> StoredRunLog:
    """Create a run and make its models, without Prefect."""
    log = create_run(open_store(config.storage.root), run_id, new_record(config))
    run_role("pretrain", log)
    return log


class StackWorld:
    """A Prefect server, worker and flow of this run's own, and the roles that the flow starts."""

    beyond_roles: tuple[str, ...] = ("flow", "worker", "server")

    def __init__(self, config: RunConfig, run_id: str) -> None:
        self._config, self._run_id = config, run_id
        self.roles: tuple[str, ...] = ("learn-0", "rollout-0", "rollout-1", "score-0")
        self._submitted_s = float("-inf")
        self._flow_seen = False

    def pid(self, name: str) -> int | None:
        return next((record.pid for record in recorded_processes() if record.name == name), None)

    def tend(self) -> list[str]:
        done = []
        if self.pid("server") is None or self.pid("worker") is None:
            stack.up(lambda line: None)
            done.append("asyncopd up")
        if self.pid("flow") is not None:
            self._flow_seen = True
        elif self._flow_seen or time.monotonic() - self._submitted_s > FLOW_START_S:
            self._submit({"run_id": self._run_id, "root": self._config.storage.root})
            done.append("asyncopd train --run-id")
        return done

    def _submit(self, parameters: dict[str, Any]) -> None:
        create_flow_run("asyncopd/train", parameters, name=self._run_id)
        self._submitted_s, self._flow_seen = time.monotonic(), False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Bring the stack up and start the run; at the end, however it comes, end all of it."""
        try:
            stack.up(lambda line: None)
            self._submit({"run_id": self._run_id, "config": self._config.model_dump(mode="json")})
            yield
        finally:
            stack.down(lambda line: None)

    def log(self) -> StoredRunLog:
        """The run in storage, which the flow creates."""
        log = StoredRunLog(open_store(self._config.storage.root), self._run_id)
        deadline = time.monotonic() + 2 * FLOW_START_S
        while not log.store.exists(log.layout.key("run")):
            if time.monotonic() > deadline:
                raise RoleFailedError(f"the flow did not create the run within {2 * FLOW_START_S:.0f} s; see {home()}.")
            time.sleep(0.2)
        return log


def descendants(pid: int) -> list[psutil.Process]:
    """A process and its descendants, as far as they run."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
