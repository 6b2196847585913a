"""What every role process does besides its work: heartbeats, a timeline, waits with deadlines, lanes of tasks.

A role process hosts one engine and keeps several shards in work at once. Its lanes are coroutines on the main
thread; each asks the stage for the next shard, so the order of work is decided in one place:

    lane 1 --next shard?--> ShardStage --claim--> RunLog          heartbeat() renews the lease of every claim
    lane 2 --next shard?-->     |
                                +--wait for a version or a shard, with a deadline that names it

A process is busy while it has at least one piece of work in hand; its heartbeat tells the share of the last seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from asyncopd.errors import DeadlineError, RunStoppedError, StorageError
from asyncopd.ports import RunLog, Sampler
from asyncopd.records import WorkerStatus
from asyncopd.schedule import OpenShards, Plan
from asyncopd.types import IndexRange, Span

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
WINDOW_S = 10.0
"""Long enough to cover several steps of a small run, short enough to follow a change."""
PACE_S = 5.0
"""Over which tokens per second are averaged; several shards of the quickstart."""
STOPPED = 143
"""Exit status of a role that was asked to stop, as a shell reports SIGTERM."""


class Worker:
    """One role process as storage sees it: its name, its heartbeat, and the spans of its timeline."""

    def __init__(
        self, log: RunLog, role: str, *, poll_s: float, deadline_s: float, heartbeat_s: float, name: str | None = None
    ) -> None:
        self.log = log
        self.role = role
        self.name = name or f"{role}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        """No other process has it."""
        self.poll_s = poll_s
        self.deadline_s = deadline_s
        self.status = WorkerStatus(role=role, pid=os.getpid(), host=socket.gethostname())
        """Shown by every progress display; the stage changes it with `tell`, the heartbeat publishes it."""
        self.busy = BusyShare()
        """Stages wrap their pieces of work in `busy.working()`; the heartbeat tells the share."""
        self._pace = Pace()
        self._sampler: Sampler | None = None
        # A training or loading thread tells beside the event loop; a lost change would be shown until the next one.
        self._telling = threading.RLock()
        self._heartbeat_s = heartbeat_s
        self._stopped: str | None = None
        self._spans: list[Span] = []
        self._num_span_objects = 0

    def tell(self, **changes: Any) -> None:
        """Change fields of the status, as of the next heartbeat. From any thread."""
        with self._telling:
            self.status = replace(self.status, **changes)

    def count(self, **more: int) -> None:
        """Add to counters of the status."""
        with self._telling:
            self.tell(**{name: (getattr(self.status, name) or 0) + number for name, number in more.items()})

    def watch(self, sampler: Sampler) -> None:
        """Tell with every heartbeat what `sampler` has in hand; its tokens are in flight until `count` counts them."""
        self._sampler = sampler

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """The status says `what` while the body runs, and afterwards what it said before."""
        before = self.status.doing
        self.tell(doing=what)
        try:
            yield
        finally:
            self.tell(doing=before)

    async def load(self, what: str, make: Callable[[], Found]) -> Found:
        """What `make` returns, called in a thread: heartbeats go on, and say `what`, while a large model loads."""
        with self.doing(what):
            await asyncio.to_thread(self._beat)
            return await asyncio.to_thread(make)

    # -- timeline -------------------------------------------------------------------------------------------------
    def record(self, activity: str, start: float, end: float, detail: str = "") -> None:
        """Add a span that ended; times are Unix seconds."""
        self._spans.append(Span(self.role, self.name, activity, start, end, detail))

    @contextlib.contextmanager
    def span(self, activity: str, detail: str = "") -> Iterator[None]:
        """Record the time the body takes, also when it raises."""
        start = time.time()
        try:
            yield
        finally:
            self.record(activity, start, time.time(), detail)

    async def flush_spans(self) -> None:
        """Publish the spans recorded so far."""
        spans, self._spans = self._spans, []
        if spans:
            self._num_span_objects += 1
            await asyncio.to_thread(self.log.publish_spans, self.name, self._num_span_objects, spans)

    # -- life -----------------------------------------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Heartbeat while the body runs; retire at its end, however it ends, so that claims are free at once.

        An error that ends the body is published as the role's failure before it travels on.

        Raises:
            RunStoppedError: the run is stopped, or was stopped while the body ran; whoever started this worker need
                not know how to reach it.
        """
        state = self.log.run_state()
        if state is not None and state.ended:
            raise RunStoppedError(
                f"run {self.log.run_id} is {state.state} ({state.reason or 'no reason given'}). Go on with it first: "
                f"asyncopd train --run-id {self.log.run_id}."
            )
        self._beat()
        body = asyncio.current_task()
        assert body is not None
        beating = asyncio.create_task(self._beat_forever(body))
        try:
            yield
        except asyncio.CancelledError:
            if self._stopped is None:
                raise
            body.uncancel()
            raise RunStoppedError(self._stopped) from None
        except Exception as error:
            cause = _first_cause(error)
            self.log.publish_failure(self.role, self.name, f"{type(cause).__name__}: {cause}")
            if cause is error:
                raise
            raise cause from error
        finally:
            beating.cancel()
            # Shutdown is synchronous: a cancelled coroutine may not get another turn of the event loop.
            self._num_span_objects += 1
            if self._spans:
                self.log.publish_spans(self.name, self._num_span_objects, self._spans)
            self.log.retire(self.name)

    def _beat(self) -> None:
        now: dict[str, Any] = {"busy": round(self.busy.share(), 3)}
        total = self.status.num_tokens
        if self._sampler is not None and total is not None:
            held = self._sampler.in_flight()
            now |= {"num_begun": held.num_responses, "num_tokens_in_flight": max(0, held.num_generated - total)}
            now |= {"doing": held.doing or self.status.doing}
            total = max(total, held.num_generated)
        if total is not None:
            now["tokens_per_s"] = self._pace.rate(total, is_working=self.busy.is_working)
        self.log.heartbeat(self.name, replace(self.status, **now))

    async def _beat_forever(self, body: asyncio.Task[Any]) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(self._heartbeat_s)
            try:
                await asyncio.to_thread(self._beat)
                state = await asyncio.to_thread(self.log.run_state)
                ticks += 1
                if ticks % 5 == 0:
                    await self.flush_spans()
            except StorageError as error:
                # Storage may come back; a worker that gave up beating would work on without its leases, unseen.
                logger.warning("%s could not renew its leases: %s", self.name, error)
                continue
            if state is not None and state.ended:
                self._stopped = f"run {self.log.run_id} is {state.state} ({state.reason}); {self.name} ends with it."
                body.cancel()
                return

    # -- waiting --------------------------------------------------------------------------------------------------
    async def wait_for(self, probe: Callable[[], Found | None], what: str) -> Found:
        """Call `probe` in a thread until it finds something.

        Raises:
            DeadlineError: nothing was found for `deadline_s`; the message says `what` was waited for.
        """
        found = await asyncio.to_thread(probe)
        if found is not None:
            return found
        start, began = time.monotonic(), time.time()
        self.tell(waiting_for=what)
        while found is None:
            if time.monotonic() - start > self.deadline_s:
                raise DeadlineError(
                    f"{self.name} waited {self.deadline_s:.0f} s for {what} and nothing came. See which role stands "
                    f"still with `asyncopd status {self.log.run_id}`, or raise limits.deadline_s."
                )
            await asyncio.sleep(self.poll_s)
            found = await asyncio.to_thread(probe)
        self.tell(waiting_for=None)
        self.record(f"wait:{what.split(' ')[0]}", began, time.time(), what)
        return found


def _first_cause(error: Exception) -> Exception:
    """The error itself, or the first one inside a TaskGroup's: "1 sub-exception" is no reason to show anybody."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


async def until_terminated(body: Awaitable[object]) -> int:
    """Run a role's body to its end; SIGTERM and SIGINT cancel it from within, so that every `finally` runs.

    Returns:
        The exit status: 0, or STOPPED when a signal or the run's own record ended it early.
    """
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    try:
        await body
    except (asyncio.CancelledError, RunStoppedError) as ended:
        logger.warning("stopped: %s", ended or "by a signal")
        return STOPPED
    return 0


@dataclass(frozen=True)
class _Next:
    """The answer to "what is there to do?"."""

    shard: IndexRange | None
    """Claimed for the asker; None when the run has no more shards for this stage."""


class ShardStage(ABC):
    """A stage that works shard by shard, rollout and scoring; any number of workers may work on the same run."""

    def __init__(self, log: RunLog, worker: Worker, plan: Plan, *, stage: str, lease_s: float) -> None:
        """`stage` is the name under which its shards are claimed."""
        self._log, self._worker, self._plan, self._stage, self._lease_s = log, worker, plan, stage, lease_s
        self._open = OpenShards(plan)
        """Shards neither done nor claimed by this worker, in index order."""
        self._choosing = asyncio.Lock()

    async def next_shard(self) -> IndexRange | None:
        """Claim the lowest shard that may be worked on and that nobody did or holds; None when the run has no more.

        Waits for what the shard needs, and for other workers.
        """
        async with self._choosing:
            first = self._open.first
            if first is None:
                return None
            what = await asyncio.to_thread(self._what_is_missing, first)
            return (await self._worker.wait_for(self._claim_next, what)).shard

    async def work(self, shard: IndexRange) -> None:
        """Do and publish one claimed shard. Harmless when another worker publishes it first."""
        with self._worker.busy.working():
            await self._work(shard)

    def _claim_next(self) -> _Next | None:
        """What to do next; None when there is nothing to do right now."""
        ready = self._ready()
        if ready is None:
            return _Next(None)
        for shard in ready:
            if self._is_done(shard):
                self._open.remove(shard)
            elif self._log.claim(self._stage, shard, worker=self._worker.name, lease_s=self._lease_s):
                self._open.remove(shard)
                # Its last holder may have published between the look above and our claim.
                if not self._is_done(shard):
                    return _Next(shard)
        return None if self._open.first else _Next(None)

    @abstractmethod
    def _ready(self) -> Iterable[IndexRange] | None:
        """Those of the open shards that may be worked on, in index order; None when all further work would be waste."""

    @abstractmethod
    def _is_done(self, shard: IndexRange) -> bool:
        """Is the shard published?"""

    @abstractmethod
    def _what_is_missing(self, first: IndexRange) -> str:
        """What the lowest open shard waits for, in words."""

    @abstractmethod
    async def _work(self, shard: IndexRange) -> None: ...


async def work_on_shards(stage: ShardStage, max_shards: int) -> int:
    """One task's worth of work: up to `max_shards` shards, one after the other. Returns how many were done."""
    for done in range(max_shards):
        shard = await stage.next_shard()
        if shard is None:
            return done
        await stage.work(shard)
    return max_shards


async def run_lanes(task: Callable[[], Awaitable[int]], *, num_lanes: int, shards_per_task: int) -> None:
    """Run `task` again and again in `num_lanes` lanes at once, until it finds less work than it asked for.

    `task` is `work_on_shards` bound to a stage, plain or wrapped as a Prefect task.
    """

    async def lane() -> None:
        while await task() == shards_per_task:
            pass

    async with asyncio.TaskGroup() as lanes:
        for _ in range(num_lanes):
            lanes.create_task(lane())


class BusyShare:
    """Counts overlapping pieces of work as one; used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._num_in_hand = 0
        self._since = 0.0
        self._stretches: deque[tuple[float, float]] = deque()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The body is a piece of work."""
        if self._num_in_hand == 0:
            self._since = self._clock()
        self._num_in_hand += 1
        try:
            yield
        finally:
            self._num_in_hand -= 1
            if self._num_in_hand == 0:
                self._stretches.append((self._since, self._clock()))

    @property
    def is_working(self) -> bool:
        return self._num_in_hand > 0

    def share(self) -> float:
        """Busy part of the last WINDOW_S, or of the time since construction when that is shorter; 0 to 1."""
        now = self._clock()
        start = max(self._began, now - WINDOW_S)
        while self._stretches and self._stretches[0][1] <= start:
            self._stretches.popleft()
        busy_s = sum(end - max(begin, start) for begin, end in self._stretches)
        if self._num_in_hand:
            busy_s += now - max(self._since, start)
        return busy_s / (now - start) if now > start else 0.0


class Pace:
    """Tokens per second, from a total that is looked at now and then and may grow in bursts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()
        """(when, total) when work began and whenever the total had grown; the rate is counted from the first."""

    def rate(self, total: int, *, is_working: bool) -> float | None:
        """Over PACE_S, or from one growth of the total to the next where that takes longer; None before the first.

        Time in which a piece of work has not told its tokens yet does not count, time without work does.
        """
        now = self._clock()
        if not self._marks:
            if is_working:
                self._marks.append((now, total))
            return None
        if total > self._marks[-1][1]:
            self._marks.append((now, total))
        while len(self._marks) > 2 and now - self._marks[1][0] >= PACE_S:
            self._marks.popleft()
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        seconds = (end if is_working else now) - start
        return (after - before) / seconds if after > before and seconds > 0 else None
