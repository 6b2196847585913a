"""Live streams: one task looks at a run that is watched, whatever the number of clients, and wakes them.

    storage --every poll_s--> History --> Feed (shared, only grows) --news--> client: its place in the feed

A client holds a place, not a queue: one that reads slowly is behind in the feed and costs no memory of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool

from api.feed import Cursor, Feed, end_frame
from api.fold import History, RunFold
from api.reader import TERMINAL, RunReader

KEEP_ALIVE_S = 15.0
"""A silent stream says so this often: proxies close silent connections."""
PER_CLIENT_S = 0.005
"""Between two looks, for each client: telling one takes about 0.1 ms, so all together take a fiftieth of a core."""
MAX_FRAMES = 256
"""Events in one write: what a client that begins late has waiting at most, about 200 kB."""

FEW = 16
"""Events of which nobody notices the writing."""


class _Tail:
    """A run that is watched."""

    def __init__(self) -> None:
        self.feed = Feed()
        self.news = asyncio.Event()
        """Set once, when there is news; then another takes its place."""
        self.num_told = 0
        """Events in the feed when the clients were woken last."""
        self.num_clients = 0
        self.task: asyncio.Task[None] | None = None
        self.end = b""
        """The last frame, once nothing works on the run any more."""
        self.error: Exception | None = None

    def wake(self) -> None:
        old, self.news = self.news, asyncio.Event()
        old.set()


class Hub:
    """Feeds of the runs in memory, and their streams."""

    def __init__(self, reader: RunReader, poll_s: float) -> None:
        self._reader, self._poll_s = reader, poll_s
        self._feeds: WeakKeyDictionary[RunFold, Feed] = WeakKeyDictionary()
        self._tails: dict[str, _Tail] = {}
        self._turn = asyncio.Lock()

    async def feed(self, fold: RunFold) -> Feed:
        """A run's feed, up to what `fold` has read."""
        feed = self._feed_of(fold)
        if not feed.is_at(history := fold.history):
            await run_in_threadpool(feed.extend, history)
        return feed

    async def stream(self, run_id: str, cursor: Cursor) -> AsyncIterator[bytes]:
        """Frames of events after `cursor`, as they happen; an `end` event closes it when no flow works on the run."""
        tail = self._tails.get(run_id)
        if tail is None:
            tail = self._tails[run_id] = _Tail()
            tail.task = asyncio.create_task(self._watch(run_id, tail))
        tail.num_clients += 1
        feed, place = tail.feed, tail.feed.start(cursor)
        try:
            while True:
                # Both before the feed is read: what comes meanwhile is then not missed.
                news, is_last = tail.news, bool(tail.end or tail.error)
                if feed is not tail.feed:
                    # The first look found it, or the run was read anew.
                    cursor, feed = feed.seen(cursor, place), tail.feed
                    place = feed.start(cursor)
                is_silent = not is_last
                while place < len(feed):
                    if len(feed) - place > FEW:
                        # One a time round the loop: hundreds that begin at once would keep it from everybody else.
                        async with self._turn:
                            await asyncio.sleep(0)
                    frames, place = feed.after(cursor, place, MAX_FRAMES)
                    if frames:
                        is_silent = False
                        yield b"".join(frames)
                if is_last:
                    if tail.error is not None:
                        raise tail.error
                    yield tail.end
                    return
                if is_silent:
                    yield b": nothing new\n\n"
                await news.wait()
        finally:
            tail.num_clients -= 1
            if tail.num_clients == 0:
                self._forget(run_id, tail)

    async def _watch(self, run_id: str, tail: _Tail) -> None:
        told = time.monotonic()
        try:
            while not tail.end:
                if await run_in_threadpool(self._look, run_id, tail) or time.monotonic() - told > KEEP_ALIVE_S:
                    tail.wake()
                    told = time.monotonic()
                await asyncio.sleep(0 if tail.end else max(self._poll_s, PER_CLIENT_S * tail.num_clients))
        except Exception as error:
            # Whoever listens gets it; a task's own exception would reach nobody.
            tail.error = error
            tail.wake()
        # A client that comes now may find the run resumed: it gets a tail of its own.
        self._forget(run_id, tail)

    def _look(self, run_id: str, tail: _Tail) -> bool:
        """Bring the tail up to date; is there news?"""
        fold = self._reader.find_fold(run_id)
        if fold is None:
            history, feed = History(), tail.feed
        else:
            history, feed = fold.refresh().history, self._feed_of(fold)
        feed.extend(history)
        tail.feed = feed
        # From the same history as the events: they are complete up to an end.
        status = self._reader.status(run_id, history)
        if status in TERMINAL:
            last = history.steps[-1].finished if history.steps else self._reader.created(run_id)
            tail.end = end_frame(last, status)
        # By length, not by what this look added: a list of events may have added it before.
        is_news, tail.num_told = len(feed) != tail.num_told, len(feed)
        return is_news or bool(tail.end)

    def _feed_of(self, fold: RunFold) -> Feed:
        return self._feeds.setdefault(fold, Feed())

    def _forget(self, run_id: str, tail: _Tail) -> None:
        if tail.task is not None and tail.num_clients == 0:
            tail.task.cancel()
        if self._tails.get(run_id) is tail:
            del self._tails[run_id]
