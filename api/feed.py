"""What happened to a run, as a list of numbered events that only grows.

    History --Feed.extend--> frames, as they are streamed        cursor = how far a client has seen each kind of event

A cursor counts storage's own records (state 2, step 41 of rewind 0, ...), so it stays valid when the service restarts.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

from api.fold import History
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


Place = tuple[str, tuple[int, int] | int]
"""Field of the cursor that an event moves, and to where."""
_DATA = b"\ndata: "


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
            found = [*self._states(history), *self._steps(history), *self._rewinds(history)]
            found += [*self._evaluations(history), *self._failures(history)]
            for place, event in sorted(found, key=lambda item: item[1].time):
                self._cursor = replace(self._cursor, **{place[0]: place[1]})  # type: ignore[arg-type]
                number = str(self._cursor)
                self._places.append(place)
                self._stops[number] = len(self._places)
                # Last: whoever sees the frame finds the rest.
                self._frames.append(frame_of(event.model_copy(update={"id": number})))
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

    def _states(self, history: History) -> list[tuple[Place, Event]]:
        return [
            (("state", s.number), _event("state", s.recorded, s.state + (f": {s.reason}" if s.reason else ""),
                                         {"state": s.state, "reason": s.reason}))
            for s in history.states if s.number > self._cursor.state
        ]  # fmt: skip

    def _steps(self, history: History) -> list[tuple[Place, Event]]:
        new = [s for s in history.steps if (s.rewind, s.step + 1) > self._cursor.step]
        return [(("step", (s.rewind, s.step + 1)), _step_event(s)) for s in new]

    def _rewinds(self, history: History) -> list[tuple[Place, Event]]:
        return [
            (("rewind", r.number), _event("rewind", r.recorded, f"the learner went back to step {r.to_step}",
                                          {"to_step": r.to_step, "rewind": r.number}))
            for r in history.rewinds if r.number > self._cursor.rewind
        ]  # fmt: skip

    def _evaluations(self, history: History) -> list[tuple[Place, Event]]:
        # By time, because several evaluators need not end in the order of the versions.
        places = [((int(e.finished * 1000), e.version.number), e) for e in history.evaluations]
        return [(("evaluation", place), _evaluation_event(e)) for place, e in places if place > self._cursor.evaluation]

    def _failures(self, history: History) -> list[tuple[Place, Event]]:
        return [
            (("failure", number), _event("failure", f.failed, f"{f.role}: {f.reason}", {"role": f.role}))
            for number, f in enumerate(history.failures, start=1) if number > self._cursor.failure
        ]  # fmt: skip


def end_frame(time: float, status: str) -> bytes:
    """The event that closes a stream. It has no id: nothing comes after it."""
    return frame_of(_event("end", time, status, {"status": status}))


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
