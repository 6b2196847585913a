"""`/v1/runs/{id}/…`: what happened to a run, as lists, curves and a live stream."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from api import views
from api.answers import Answered, json_response
from api.feed import Cursor
from api.problems import responses
from api.schemas import (
    CheckpointList,
    EvaluationList,
    EventPage,
    Metrics,
    PolicyList,
    Staleness,
    Throughput,
    Timeline,
)
from api.security import Reader
from api.state import Fold, KnownRun, Streams

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
    "/events/stream", operation_id="stream_events", response_class=StreamingResponse,
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
