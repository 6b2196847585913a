"""What happened to a run, as a list of numbered events that only grows.

    History --Feed.extend--> frames, as they are streamed        cursor = how far a client has seen each kind of event

A cursor counts storage's own records (state 2, step 41 of rewind 0, ...), so it stays valid when the service restarts.

Live streams: one task looks at a run that is watched, whatever the number of clients, and wakes them.

    storage --every poll_s--> History --> Feed (shared, only grows) --news--> client: its place in the feed

A client holds a place, not a queue: one that reads slowly is behind in the feed and costs no memory of its own.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool

from api.reader import TERMINAL, RunReader
from api.schemas import Event, EventKind
from asyncopd.metrics import LOSS
from storage.history import History
from storage.run_view import RunView

KEEP_ALIVE_S = 15.0
"""A silent stream says so this often: proxies close silent connections."""
MAX_FRAMES = 256
"""Events in one write: what a client that begins late has waiting at most, about 200 kB."""
Place = tuple[EventKind, tuple[int, int] | int]
"""Field of the cursor that an event moves, and to where."""
_CURSOR = re.compile(r"e(\d+)-(\d+)\.f(\d+)\.r(\d+)\.s(\d+)-(\d+)\.t(\d+)")
_DATA = b"\ndata: "


@dataclass(frozen=True)
class Cursor:
    """The last event seen of each kind: evaluations by (finished, ms; version), steps by (rewind, step + 1)."""

    evaluation: tuple[int, int] = (0, 0)
    failure: int = 0
    rewind: int = 0
    step: tuple[int, int] = (0, 0)
    state: int = 0

    def __str__(self) -> str:
        e, s = self.evaluation, self.step
        return f"e{e[0]}-{e[1]}.f{self.failure}.r{self.rewind}.s{s[0]}-{s[1]}.t{self.state}"

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """The inverse of str; the start of the feed for anything that is no cursor."""
        found = _CURSOR.fullmatch(text or "")
        if not found:
            return cls()
        e0, e1, f, r, s0, s1, t = map(int, found.groups())
        return cls((e0, e1), f, r, (s0, s1), t)


class Feed:
    """The events of one run, in the order this service saw them; each is encoded once, for all clients."""

    def __init__(self) -> None:
        self._cursor = Cursor()
        self._counters: tuple[int, ...] = ()
        self._places: list[Place] = []
        self._frames: list[bytes] = []
        self._stops: dict[str, int] = {}
        """Id of each event -> the place after it."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._frames)

    def is_at(self, history: History) -> bool:
        """Does it hold everything that `history` knows?"""
        return self._counters == history.counters

    def extend(self, history: History) -> None:
        """Append what is new in `history`. Blocks: it encodes."""
        with self._lock:
            if self.is_at(history):
                return
            for place, moment, message, data in sorted(_news(history, self._cursor), key=lambda news: news[1]):
                self._cursor = replace(self._cursor, **{place[0]: place[1]})  # type: ignore[arg-type]
                number = str(self._cursor)
                self._places.append(place)
                self._stops[number] = len(self._places)
                # Last: whoever sees the frame finds the rest.
                self._frames.append(frame_of(Event(id=number, kind=place[0], time=moment, message=message, data=data)))
            self._counters = history.counters

    def start(self, cursor: Cursor) -> int:
        """A place before which `cursor` has seen everything: right behind its event, or 0 where it is not known."""
        return self._stops.get(str(cursor), 0)

    def after(self, cursor: Cursor, start: int, limit: int) -> tuple[list[bytes], int]:
        """Frames from place `start` on that a client with `cursor` has not seen, and the place to go on from.

        Looks at `limit` events at most, so an empty list is the end only where that place is `len(feed)`.
        """
        frames = self._frames[start : start + limit]
        places = self._places[start : start + len(frames)]
        pairs = zip(places, frames, strict=True)
        return [frame for (kind, place), frame in pairs if place > getattr(cursor, kind)], start + len(frames)

    def seen(self, cursor: Cursor, stop: int) -> Cursor:
        """The cursor of a client that had `cursor` and then saw everything before place `stop`."""
        # Places of one kind only grow, so the last of each kind is what counts.
        latest = dict(self._places[:stop]).items()
        return replace(cursor, **{kind: max(place, getattr(cursor, kind)) for kind, place in latest})

    def page(self, cursor: Cursor, limit: int) -> tuple[list[bytes], bool]:
        """At most `limit` events after `cursor`, as JSON, and whether there are more."""
        found: list[bytes] = []
        place = self.start(cursor)
        while len(found) <= limit and place < len(self):
            frames, place = self.after(cursor, place, limit + 1)
            found += frames
        return [frame[frame.index(_DATA) + len(_DATA) : -2] for frame in found[:limit]], len(found) > limit


def _news(history: History, seen: Cursor) -> Iterator[tuple[Place, float, str, dict[str, Any]]]:
    """(Place, Unix time, message, data) of every event after `seen`, kind by kind."""
    for state in history.states:
        if state.number > seen.state:
            message = state.state + (f": {state.reason}" if state.reason else "")
            yield ("state", state.number), state.recorded, message, {"state": state.state, "reason": state.reason}
    for step in history.steps:
        if (step.rewind, step.step + 1) > seen.step:
            loss = step.metrics.get(LOSS.key)
            message = f"step {step.step} trained {step.num_tokens:,} tokens" + (
                f", loss {loss:.4g} nats" if loss else ""
            )
            data = {
                "step": step.step,
                "tokens": step.num_tokens,
                "metrics": {name: value for name, value in step.metrics.items() if value == value},
                "staleness_tokens": {str(k): v for k, v in step.staleness_tokens.items()},
            }
            yield ("step", (step.rewind, step.step + 1)), step.finished, message, data
    for rewind in history.rewinds:
        if rewind.number > seen.rewind:
            message = f"the learner went back to step {rewind.to_step}"
            data = {"to_step": rewind.to_step, "rewind": rewind.number}
            yield ("rewind", rewind.number), rewind.recorded, message, data
    for found in history.evaluations:
        # By time, because several evaluators need not end in the order of the versions.
        version, place = found.version.number, (int(found.finished * 1000), found.version.number)
        if place > seen.evaluation:
            data, accuracy = {"version": version, "kl_nats": found.kl_nats}, ""
            if found.accuracy == found.accuracy:
                data["accuracy"], accuracy = found.accuracy, f"accuracy {found.accuracy:.1%}, "
            message = f"version {version}: {accuracy}KL {found.kl_nats:.4g} nats"
            yield ("evaluation", place), found.finished, message, data
    for number, failure in enumerate(history.failures, start=1):
        if number > seen.failure:
            yield ("failure", number), failure.failed, f"{failure.role}: {failure.reason}", {"role": failure.role}


def frame_of(event: Event) -> bytes:
    """An event on the wire; JSON holds no line break."""
    number = f"id: {event.id}\n" if event.id else ""
    return f"event: {event.kind}\n{number}data: {event.model_dump_json()}\n\n".encode()


@dataclass
class _Tail:
    """A run that is watched."""

    feed: Feed = field(default_factory=Feed)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once, when there is news; then another takes its place."""
    num_told: int = 0
    """Events in the feed when the clients were woken last."""
    num_clients: int = 0
    task: asyncio.Task[None] | None = None
    end: bytes = b""
    """The last frame, once nothing works on the run any more."""
    error: Exception | None = None

    def wake(self) -> None:
        old, self.news = self.news, asyncio.Event()
        old.set()


class Hub:
    """Feeds of the runs in memory, and their streams."""

    def __init__(self, reader: RunReader, poll_s: float) -> None:
        self._reader, self._poll_s = reader, poll_s
        self._feeds: WeakKeyDictionary[RunView, Feed] = WeakKeyDictionary()
        self._tails: dict[str, _Tail] = {}

    async def feed(self, view: RunView) -> Feed:
        """A run's feed, up to what `view` has read."""
        feed = self._feeds.setdefault(view, Feed())
        if not feed.is_at(history := view.history):
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
                await asyncio.sleep(0 if tail.end else self._poll_s)
        except Exception as error:
            # Whoever listens gets it; a task's own exception would reach nobody.
            tail.error = error
            tail.wake()
        # A client that comes now may find the run resumed: it gets a tail of its own.
        self._forget(run_id, tail)

    def _look(self, run_id: str, tail: _Tail) -> bool:
        """Bring the tail up to date; is there news?"""
        view, history, feed = self._reader.find(run_id), History(), tail.feed
        if view is not None:
            history, feed = view.refresh().history, self._feeds.setdefault(view, Feed())
        feed.extend(history)
        tail.feed = feed
        # From the same history as the events: they are complete up to an end.
        status = self._reader.status(run_id, history)
        if status in TERMINAL:
            last = history.steps[-1].finished if history.steps else self._reader.created(run_id)
            # It has no id: nothing comes after it.
            tail.end = frame_of(Event(id="", kind="end", time=last, message=status, data={"status": status}))
        # By length, not by what this look added: a list of events may have added it before.
        is_news, tail.num_told = len(feed) != tail.num_told, len(feed)
        return is_news or bool(tail.end)

    def _forget(self, run_id: str, tail: _Tail) -> None:
        if tail.task is not None and tail.num_clients == 0:
            tail.task.cancel()
        if self._tails.get(run_id) is tail:
            del self._tails[run_id]
