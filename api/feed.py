"""What happened to a run, as a numbered feed that any number of clients follow for the cost of one look at storage.

    RunFold --new events--> Feed --wakes--> each client's stream        cursor = how far each kind of event was seen

A cursor counts storage's own records (state 2, step 41 of rewind 0, ...), so it stays valid when the service restarts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

from api.reader import TERMINAL, RunFold, RunReader
from api.schemas import Event, EventKind
from asyncopd.types import Evaluation, TrainStep

_CURSOR = re.compile(r"e(\d+)-(\d+)\.f(\d+)\.r(\d+)\.s(\d+)-(\d+)\.t(\d+)")


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


KEEP_ALIVE_S = 15.0
"""A silent stream says so this often: proxies close silent connections."""
Place = tuple[str, tuple[int, int] | int]
"""Field of the cursor that an event moves, and to where."""


class Feed:
    """The events of one run, in the order this service saw them."""

    def __init__(self, fold: RunFold) -> None:
        self._fold = fold
        self._cursor = Cursor()
        self.events: list[tuple[Place, Event]] = []
        self.frames: list[bytes] = []
        """Each event as it is streamed, encoded once for all clients."""

    def extend(self) -> int:
        """Look, and append what is new; returns how many events that were."""
        fold = self._fold.refresh()
        found = [*self._states(fold), *self._steps(fold), *self._rewinds(fold), *self._evaluations(fold)]
        found += self._failures(fold)
        for place, event in sorted(found, key=lambda item: item[1].time):
            self._cursor = replace(self._cursor, **{place[0]: place[1]})  # type: ignore[arg-type]
            numbered = event.model_copy(update={"id": str(self._cursor)})
            self.frames.append(frame_of(numbered))
            self.events.append((place, numbered))
        return len(found)

    def after(self, cursor: Cursor) -> list[Event]:
        """The events that a client with `cursor` has not seen."""
        return [event for (kind, place), event in self.events if place > getattr(cursor, kind)]

    def _states(self, fold: RunFold) -> list[tuple[Place, Event]]:
        return [
            (("state", s.number), _event("state", s.recorded, s.state + (f": {s.reason}" if s.reason else ""),
                                         {"state": s.state, "reason": s.reason}))
            for s in fold.states if s.number > self._cursor.state
        ]  # fmt: skip

    def _steps(self, fold: RunFold) -> list[tuple[Place, Event]]:
        new = [s for s in fold.steps if (s.rewind, s.step + 1) > self._cursor.step]
        return [(("step", (s.rewind, s.step + 1)), _step_event(s)) for s in new]

    def _rewinds(self, fold: RunFold) -> list[tuple[Place, Event]]:
        return [
            (("rewind", r.number), _event("rewind", r.recorded, f"the learner went back to step {r.to_step}",
                                          {"to_step": r.to_step, "rewind": r.number}))
            for r in fold.log.rewinds() if r.number > self._cursor.rewind
        ]  # fmt: skip

    def _evaluations(self, fold: RunFold) -> list[tuple[Place, Event]]:
        # By time, because several evaluators need not end in the order of the versions.
        places = [((int(e.finished * 1000), e.version.number), e) for e in fold.evaluations]
        return [(("evaluation", place), _evaluation_event(e)) for place, e in places if place > self._cursor.evaluation]

    def _failures(self, fold: RunFold) -> list[tuple[Place, Event]]:
        return [
            (("failure", number), _event("failure", f.failed, f"{f.role}: {f.reason}", {"role": f.role}))
            for number, f in enumerate(fold.failures, start=1) if number > self._cursor.failure
        ]  # fmt: skip


def _event(kind: EventKind, time: float, message: str, data: Mapping[str, object]) -> Event:
    return Event(id="", kind=kind, time=time, message=message, data=dict(data))


def _step_event(step: TrainStep) -> Event:
    loss = step.metrics.get("train/loss_nats")
    message = f"step {step.step} trained {step.num_tokens:,} tokens" + (f", loss {loss:.4g} nats" if loss else "")
    metrics = {name: value for name, value in step.metrics.items() if value == value}
    return _event("step", step.finished, message, {"step": step.step, "tokens": step.num_tokens, "metrics": metrics,
                  "staleness_tokens": {str(k): v for k, v in step.staleness_tokens.items()}})  # fmt: skip


def _evaluation_event(evaluation: Evaluation) -> Event:
    accuracy = evaluation.accuracy
    known = {"version": evaluation.version.number, "kl_nats": evaluation.kl_nats}
    if accuracy == accuracy:
        known["accuracy"] = accuracy
    message = f"version {evaluation.version.number}: " + (f"accuracy {accuracy:.1%}, " if accuracy == accuracy else "")
    return _event("evaluation", evaluation.finished, f"{message}KL {evaluation.kl_nats:.4g} nats", known)


def frame_of(event: Event) -> bytes:
    """An event on the wire; JSON holds no line break."""
    number = f"id: {event.id}\n" if event.id else ""
    return f"event: {event.kind}\n{number}data: {event.model_dump_json()}\n\n".encode()


class _Channel:
    """One run's feed with those who wait for its next event."""

    def __init__(self) -> None:
        self.feed: Feed | None = None
        self.ended = False
        self.news = asyncio.Condition()
        self.num_clients = 0
        self.task: asyncio.Task[None] | None = None
        self.error: Exception | None = None


class Hub:
    """Streams of all watched runs; one task per run looks at storage, whatever the number of clients."""

    def __init__(self, reader: RunReader, poll_s: float) -> None:
        self._reader, self._poll_s = reader, poll_s
        self._channels: dict[str, _Channel] = {}

    async def stream(self, run_id: str, cursor: Cursor) -> AsyncIterator[bytes]:
        """Frames of events after `cursor`, as they happen; an `end` event closes it when no flow works on the run."""
        channel = self._channels.setdefault(run_id, _Channel())
        channel.num_clients += 1
        if channel.task is None:
            channel.task = asyncio.create_task(self._watch(run_id, channel))
        seen = 0
        try:
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S), channel.news:
                        while not (channel.ended or (channel.feed is not None and len(channel.feed.events) > seen)):
                            await channel.news.wait()
                except TimeoutError:
                    yield b": nothing new\n\n"
                    continue
                ended = channel.ended
                batch = channel.feed.events[seen:] if channel.feed else []
                frames = channel.feed.frames[seen : seen + len(batch)] if channel.feed else []
                seen += len(batch)
                # One write for all of them.
                pairs = zip(batch, frames, strict=True)
                if new := [frame for ((kind, place), _), frame in pairs if place > getattr(cursor, kind)]:
                    yield b"".join(new)
                if ended:
                    if channel.error is not None:
                        raise channel.error
                    run = await asyncio.to_thread(self._reader.run, run_id)
                    yield frame_of(_event("end", run.updated or run.created, run.status, {"status": run.status}))
                    return
        finally:
            channel.num_clients -= 1
            if channel.num_clients == 0:
                channel.task.cancel()
                self._channels.pop(run_id, None)

    async def _watch(self, run_id: str, channel: _Channel) -> None:
        try:
            while not channel.ended:
                # The state first: what is read after it then includes everything up to the end.
                run = await asyncio.to_thread(self._reader.run, run_id)
                fold = await asyncio.to_thread(self._reader.find_fold, run_id)
                if channel.feed is None and fold is not None:
                    channel.feed = Feed(fold)
                num_new = await asyncio.to_thread(channel.feed.extend) if channel.feed else 0
                channel.ended = run.status in TERMINAL
                if num_new or channel.ended:
                    async with channel.news:
                        channel.news.notify_all()
                await asyncio.sleep(self._poll_s)
        except Exception as error:
            # Whoever listens gets it; a task's own exception would reach nobody.
            channel.error, channel.ended = error, True
            async with channel.news:
                channel.news.notify_all()
