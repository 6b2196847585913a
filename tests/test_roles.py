"""Role processes that hang or keep dying: killed and started again, reported at last, and retired for the others."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncopd.errors import REPEATS, RoleFailedError, StorageError
from asyncopd.local import processes as roles
from asyncopd.local.processes import RoleProcesses, RoleSpec

pytestmark = pytest.mark.processes

SLEEPER = "import time; time.sleep(60)"


class Sleepers(RoleProcesses):
    """The real supervisor over processes that need neither Prefect nor torch."""

    code = SLEEPER

    def _command(self, spec: RoleSpec) -> list[str]:
        return [sys.executable, "-c", self.code]

    @property
    def pid(self) -> int | None:
        return next((child.record.pid for child in self._children.values()), None)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_HOME", str(tmp_path / "home"))


def sleepers(
    tmp_path: Path, said: list[str], retired: list[int], beats: Callable[[], Any], **settings: Any
) -> Sleepers:
    defaults: dict[str, Any] = {"max_restarts": 3, "hang_s": 0.5, "failure_of": lambda role: None}
    return Sleepers(
        [RoleSpec("score")],
        run_id="r",
        root="r",
        log_dir=tmp_path,
        env={},
        beats=beats,
        retire=retired.append,
        say=said.append,
        **(defaults | settings),
    )


async def test_a_role_that_lives_but_does_not_beat_is_killed_and_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    retired: list[int] = []
    stopped = False

    def beats() -> dict[int, float]:
        return {processes.pid: 1.0 if stopped else time.time()} if processes.pid else {}

    processes = sleepers(tmp_path, said, retired, beats)
    running = asyncio.create_task(processes.run())
    await asyncio.sleep(1.5)
    first = processes.pid
    assert said == [], "it beats"
    assert first is not None
    stopped = True
    os.kill(first, signal.SIGSTOP)  # SIGTERM would not reach it any more
    for _ in range(100):
        await asyncio.sleep(0.1)
        if processes.pid not in (None, first):
            break
    assert processes.pid != first
    assert retired[:1] == [first], "nobody waits for its leases"
    assert said[0].startswith("score-0 gave no sign of life for ")
    assert "signal 9" in said[1]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_storage_that_does_not_answer_is_no_reason_to_kill_a_role(tmp_path: Path) -> None:
    said: list[str] = []

    def beats() -> dict[int, float]:
        raise StorageError("away")

    processes = sleepers(tmp_path, said, [], beats)
    running = asyncio.create_task(processes.run())
    await asyncio.sleep(2)
    assert (said, running.done()) == ([], False)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_role_that_dies_at_once_is_given_up_after_its_restarts(tmp_path: Path) -> None:
    said: list[str] = []
    processes = sleepers(tmp_path, said, [], dict, max_restarts=2)
    processes.code = "import sys; sys.exit('out of luck')"
    with pytest.raises(RoleFailedError, match="score-0 ended with exit status 1: out of luck"):
        await processes.run()
    assert len(said) == 2


async def test_a_role_whose_failure_would_repeat_itself_is_not_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    processes = sleepers(tmp_path, said, [], dict)
    processes.code = f"import sys; print('bad config'); sys.exit({REPEATS})"
    with pytest.raises(RoleFailedError, match="score-0 ended with exit status 78: bad config\nIt would fail the same"):
        await processes.run()
    assert said == []


async def test_a_role_that_lived_long_has_its_restarts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twenty kills in a week used to end a run that three restarts a week would have kept alive.
    monkeypatch.setattr(roles, "STEADY_S", 0.0)
    said: list[str] = []
    processes = sleepers(tmp_path, said, [], dict, max_restarts=1)
    processes.code = "import sys; sys.exit(1)"
    running = asyncio.create_task(processes.run())
    for _ in range(100):
        await asyncio.sleep(0.1)
        if len(said) >= 4:
            break
    assert len(said) >= 4
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
