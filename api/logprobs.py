"""`…/trajectories/{index}/logprobs`: a response under the weights of any stored version, the newest unless asked.

request -> LogprobDesk: one at work, MAX_WAITING in line, the rest 503 -> python -m flows.logprobs (loads torch)
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import OrderedDict
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.concurrency import run_in_threadpool

from api.deps import Fold, Reader
from api.problems import ProblemError, responses
from api.schemas import LogprobsOut
from storage.run_view import RunView

router = APIRouter(prefix="/v1/runs/{run_id}/trajectories", tags=["trajectories"], dependencies=[Reader])
MAX_WAITING = 8
MAX_KEPT = 1_000
"""Answers that are remembered: a response under a version never changes."""
TIMEOUT_S = 120.0
_Key = tuple[str, int, int]


class LogprobDesk:
    """Asks one process after the other, so that readers take no more than one core from a run."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._turn = asyncio.Lock()
        self._num_inside = 0
        self._known: OrderedDict[_Key, list[float]] = OrderedDict()

    async def logprobs(self, run_id: str, index: int, version: int) -> list[float]:
        """log p of every response token, nats.

        Raises:
            ProblemError: 503 when too many wait or it took too long, 500 with what the process said.
        """
        key = (run_id, index, version)
        if key in self._known:
            return self._known[key]
        if self._num_inside > MAX_WAITING:
            raise ProblemError(
                503,
                "too-many-questions",
                f"{self._num_inside} responses are being computed. Repeat this in a while.",
                {"Retry-After": "10"},
            )
        self._num_inside += 1
        try:
            async with self._turn:
                if key not in self._known:
                    self._known[key] = await self._ask(*key)
        finally:
            self._num_inside -= 1
        while len(self._known) > MAX_KEPT:
            self._known.popitem(last=False)
        return self._known[key]

    async def _ask(self, run_id: str, index: int, version: int) -> list[float]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "flows.logprobs",
            "--root",
            self._root,
            "--run-id",
            run_id,
            "--index",
            str(index),
            "--version",
            str(version),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            said, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
        except TimeoutError as late:
            raise ProblemError(
                503, "too-slow", f"The weights of version {version} were not loaded within {TIMEOUT_S:.0f} s."
            ) from late
        finally:
            # Too late, or the client is gone and nobody waits for it.
            if process.returncode is None:
                process.kill()
        if process.returncode:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise ProblemError(500, "not-computed", f"The process that loads the weights failed: {last}")
        found: list[float] = json.loads(said)
        return found


async def desk(request: Request) -> LogprobDesk:
    found: LogprobDesk = request.app.state.logprobs
    return found


@router.get("/{index}/logprobs", operation_id="get_logprobs", responses=responses(404))
async def get_logprobs(
    fold: Fold,
    logprobs: Annotated[LogprobDesk, Depends(desk)],
    index: Annotated[int, Path(ge=0, description="Address in the run.", examples=[128])],
    version: Annotated[
        int | None, Query(ge=0, description="A stored policy version; the newest by default.", examples=[12])
    ] = None,
) -> LogprobsOut:
    """log p of each response token under stored weights, computed now; the first answer takes about ten seconds."""
    number = await run_in_threadpool(_checked, fold, index, version)
    return LogprobsOut(version=number, logprobs=await logprobs.logprobs(fold.log.run_id, index, number))


def _checked(fold: RunView, index: int, version: int | None) -> int:
    """The version that is asked for. Raises ProblemError 404 for what is not stored, before a process starts."""
    log = fold.log
    if log.shard_of(index) is None:
        raise ProblemError(404, "no-such-trajectory", f"Index {index} of run {log.run_id} is not produced yet.")
    newest = log.latest_policy()
    if version is None and newest is not None:
        version = newest.number
    if version is None or log.find_policy(version) is None or not log.store.exists(log.layout.architecture_manifest):
        raise ProblemError(
            404,
            "no-such-version",
            f"Run {log.run_id} has no weights of version {'0' if version is None else version} stored; "
            f"GET /v1/runs/{log.run_id}/policies lists what it has.",
        )
    return version
