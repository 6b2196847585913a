"""`/v1/runs/{id}/…`: what happened to a run, as lists, curves and a live stream.

Views of a run as JSON, made in a thread, once for everybody who asks within a moment.

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

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from api import views
from api.deps import Fold, KnownRun, Reader, Streams
from api.events import Cursor
from api.problems import responses
from api.schemas import (
    CheckpointList,
    EvaluationList,
    EventPage,
    Metrics,
    PolicyList,
    Schema,
    Staleness,
    Throughput,
    Timeline,
)
from storage.run_view import RunView

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["observations"], dependencies=[Reader])
MaxPoints = Annotated[
    int, Query(ge=2, le=5000, description="Points per curve; more steps are averaged.", examples=[200])
]
FromStep = Annotated[int, Query(ge=0, description="First step.", examples=[0])]
ToStep = Annotated[int | None, Query(ge=1, description="Step to stop before.", examples=[100])]


@router.get("/events", operation_id="list_events", response_model=EventPage, responses=responses(404))
async def list_events(
    fold: Fold,
    streams: Streams,
    after: Annotated[
        str | None,
        Query(description="`id` of the last event you have.", examples=["e0-0.f0.r0.s0-41.t1"], max_length=200),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events per page.", examples=[100])] = 100,
) -> Response:
    """States, steps, rewinds, evaluations and failures, oldest first."""
    found, has_more = (await streams.feed(fold)).page(Cursor.parse(after), limit)
    # They are JSON already.
    return json_response(b'{"data":[%b],"has_more":%b}' % (b",".join(found), b"true" if has_more else b"false"))


@router.get(
    "/events/stream",
    operation_id="stream_events",
    response_class=StreamingResponse,
    responses={**responses(404), 200: {"description": "Events", "content": {"text/event-stream": {}}}},
)
async def stream_events(
    run_id: KnownRun,
    streams: Streams,
    after: Annotated[
        str | None, Query(description="As Last-Event-ID.", examples=["e0-0.f0.r0.s0-41.t1"], max_length=200)
    ] = None,
    last_event_id: Annotated[
        str | None, Header(description="Events after this one.", max_length=200, examples=["e0-0.f0.r0.s0-41.t1"])
    ] = None,
) -> StreamingResponse:
    """The same events as they happen, as server-sent events. An `end` event closes the stream."""
    # Not FastAPI's own encoder: it encodes for every client anew and reports each that leaves as an error.
    frames = streams.stream(run_id, Cursor.parse(last_event_id or after))
    return StreamingResponse(frames, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/metrics", operation_id="get_metrics", response_model=Metrics, responses=responses(404))
async def get_metrics(
    answer: Answered,
    key: Annotated[
        list[str] | None, Query(description="Only these metrics; all when left out.", examples=[["train/loss_nats"]])
    ] = None,
    from_step: FromStep = 0,
    to_step: ToStep = None,
    max_points: MaxPoints = 500,
) -> Response:
    """Training curves."""
    return await answer(lambda fold: views.metrics_of(fold, key, from_step, to_step, max_points))


@router.get("/staleness", operation_id="get_staleness", response_model=Staleness, responses=responses(404))
async def get_staleness(
    answer: Answered, from_step: FromStep = 0, to_step: ToStep = None, max_points: MaxPoints = 200
) -> Response:
    """Trained tokens by staleness over time."""
    return await answer(lambda fold: views.staleness_of(fold, from_step, to_step, max_points))


@router.get("/throughput", operation_id="get_throughput", response_model=Throughput, responses=responses(404))
async def get_throughput(answer: Answered, max_points: MaxPoints = 60) -> Response:
    """Response tokens per second of rollout, scoring and learning."""
    return await answer(lambda fold: views.throughput_of(fold, max_points))


@router.get("/policies", operation_id="list_policies", response_model=PolicyList, responses=responses(404))
async def list_policies(answer: Answered) -> Response:
    """Published versions of the surviving lineage, and the rewinds."""
    return await answer(views.policies_of)


@router.get("/checkpoints", operation_id="list_checkpoints", response_model=CheckpointList, responses=responses(404))
async def list_checkpoints(answer: Answered) -> Response:
    """States the learner can resume from."""
    return await answer(views.checkpoints_of)


@router.get("/evals", operation_id="list_evaluations", response_model=EvaluationList, responses=responses(404))
async def list_evaluations(answer: Answered) -> Response:
    """Quality on held-out prompts, by version."""
    return await answer(views.evaluations_of)


@router.get("/timeline", operation_id="get_timeline", response_model=Timeline, responses=responses(404))
async def get_timeline(
    answer: Answered,
    start_s: Annotated[
        float, Query(ge=0, description="Window start, seconds after the first span.", examples=[0.0])
    ] = 0.0,
    stop_s: Annotated[float | None, Query(gt=0, description="Window end.", examples=[60.0])] = None,
    max_spans: Annotated[int, Query(ge=10, le=20_000, description="Spans per worker, about.", examples=[1500])] = 1500,
) -> Response:
    """Who worked and who waited for what, in lanes."""
    return await answer(lambda fold: views.timeline_of(fold, start_s, stop_s, max_spans))


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

    def serves(self, fold: RunView, age_s: float) -> bool:
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

    async def get(self, key: str, fold: RunView, make: Callable[[RunView], Schema | bytes]) -> bytes:
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


def _make(fold: RunView, make: Callable[[RunView], Schema | bytes]) -> _Made:
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

    async def __call__(self, make: Callable[[RunView], Schema | bytes]) -> Response:
        """`make(fold)` as JSON; it is called in a thread, unless another request was answered a moment ago."""
        return json_response(await self._answers.get(self._key, self._fold, make))


Answered = Annotated[Answer, Depends()]
