"""Views of a run as JSON, made in a thread, once for everybody who asks within a moment.

request --Answer--> made a moment ago: the same bytes        else: one thread makes them, all who ask meanwhile wait
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Response

from api.fold import RunFold
from api.schemas import Schema
from api.state import Fold

MAX_BYTES = 64 * 2**20
"""Bytes remembered, over all views."""
NUM_THREADS = 4
"""They hold Python's lock while they compute: more would delay streams, fewer would queue behind slow storage."""


def json_response(body: Schema | bytes) -> Response:
    """An answer that is not validated a second time."""
    content = body if isinstance(body, bytes) else body.model_dump_json().encode()
    return Response(content, media_type="application/json")


COST_S = 0.02
"""A view that takes more CPU time is kept longer in proportion: those of a long run would take a core otherwise."""
MAX_FACTOR = 5.0
"""But no longer than so many times."""


@dataclass(frozen=True)
class _Made:
    body: bytes
    counters: tuple[int, ...]
    """Of the history it was made from."""
    made_s: float
    cost_s: float
    """CPU time that making it took."""

    def serves(self, fold: RunFold, age_s: float) -> bool:
        # The end of a run is never withheld: whoever was told of it asks for the last curves.
        is_current = self.counters == fold.history.counters or not fold.history.is_over
        factor = min(max(self.cost_s / COST_S, 1.0), MAX_FACTOR)
        return is_current and time.monotonic() - self.made_s < age_s * factor


class Answers:
    """What was answered a moment ago."""

    def __init__(self, age_s: float) -> None:
        self._age_s = age_s
        self._made: OrderedDict[str, _Made] = OrderedDict()
        self._num_bytes = 0
        self._making: dict[str, asyncio.Future[_Made]] = {}
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="view")

    async def get(self, key: str, fold: RunFold, make: Callable[[RunFold], Schema | bytes]) -> bytes:
        """The answer under `key`: `make(fold)`, or what it was less than `age_s` ago, longer where it costs much."""
        made = self._made.get(key)
        if made is not None and made.serves(fold, self._age_s):
            return made.body
        making = self._making.get(key)
        if making is None:
            making = asyncio.get_running_loop().run_in_executor(self._threads, _make, fold, make)
            self._making[key] = making
            making.add_done_callback(lambda done: self._remember(key, done))
        # A client that leaves does not end it: others wait for it too.
        return (await asyncio.shield(making)).body

    def _remember(self, key: str, done: asyncio.Future[_Made]) -> None:
        del self._making[key]
        if done.cancelled() or done.exception() is not None:
            return
        made = done.result()
        old = self._made.pop(key, None)
        self._num_bytes += len(made.body) - (len(old.body) if old else 0)
        self._made[key] = made
        while self._num_bytes > MAX_BYTES:
            _, dropped = self._made.popitem(last=False)
            self._num_bytes -= len(dropped.body)


def _make(fold: RunFold, make: Callable[[RunFold], Schema | bytes]) -> _Made:
    # Both before it is made: what comes meanwhile makes it old.
    counters, now, used_s = fold.history.counters, time.monotonic(), time.thread_time()
    made = make(fold)
    body = made if isinstance(made, bytes) else made.model_dump_json().encode()
    return _Made(body, counters, now, time.thread_time() - used_s)


class Answer:
    """The answer to one request about one run."""

    def __init__(self, request: Request, fold: Fold) -> None:
        self._answers: Answers = request.app.state.answers
        self._key = f"{request.url.path}?{request.url.query}"
        self._fold = fold

    async def __call__(self, make: Callable[[RunFold], Schema | bytes]) -> Response:
        """`make(fold)` as JSON; it is called in a thread, unless another request was answered a moment ago."""
        return json_response(await self._answers.get(self._key, self._fold, make))


Answered = Annotated[Answer, Depends()]
