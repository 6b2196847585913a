"""`/v1/runs/{id}/…`: what happened to a run, as lists, curves and a live stream.

Plain functions, which FastAPI calls in threads: a view that takes long holds up nobody but who asked for it.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from api import views
from api.deps import KnownRun, Reader, Streams, View
from api.events import Cursor
from api.problems import responses
from api.schemas import CheckpointList, EvaluationList, EventPage, Metrics, PolicyList, Staleness, Throughput, Timeline
from asyncopd.metrics import LOSS

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["observations"], dependencies=[Reader])
EVENT_ID = "e0-0.f0.r0.s0-41.t1"
MaxPoints = Annotated[
    int, Query(ge=2, le=5000, description="Points per curve; more steps are averaged.", examples=[200])
]
FromStep = Annotated[int, Query(ge=0, description="First step.", examples=[0])]
ToStep = Annotated[int | None, Query(ge=1, description="Step to stop before.", examples=[100])]


@router.get("/events", operation_id="list_events", response_model=EventPage, responses=responses(404))
async def list_events(
    view: View,
    streams: Streams,
    after: Annotated[
        str | None, Query(description="`id` of the last event you have.", examples=[EVENT_ID], max_length=200)
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events per page.", examples=[100])] = 100,
) -> Response:
    """States, steps, rewinds, evaluations and failures, oldest first."""
    found, has_more = (await streams.feed(view)).page(Cursor.parse(after), limit)
    # They are JSON already.
    body = b'{"data":[%b],"has_more":%b}' % (b",".join(found), b"true" if has_more else b"false")
    return Response(body, media_type="application/json")


@router.get(
    "/events/stream",
    operation_id="stream_events",
    response_class=StreamingResponse,
    responses={**responses(404), 200: {"description": "Events", "content": {"text/event-stream": {}}}},
)
async def stream_events(
    run_id: KnownRun,
    streams: Streams,
    after: Annotated[str | None, Query(description="As Last-Event-ID.", examples=[EVENT_ID], max_length=200)] = None,
    last_event_id: Annotated[
        str | None, Header(description="Events after this one.", max_length=200, examples=[EVENT_ID])
    ] = None,
) -> StreamingResponse:
    """The same events as they happen, as server-sent events. An `end` event closes the stream."""
    # Not FastAPI's own encoder: it encodes for every client anew and reports each that leaves as an error.
    frames = streams.stream(run_id, Cursor.parse(last_event_id or after))
    return StreamingResponse(frames, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/metrics", operation_id="get_metrics", responses=responses(404))
def get_metrics(
    view: View,
    key: Annotated[
        list[str] | None, Query(description="Only these metrics; all when left out.", examples=[[LOSS.key]])
    ] = None,
    from_step: FromStep = 0,
    to_step: ToStep = None,
    max_points: MaxPoints = 500,
) -> Metrics:
    """Training curves."""
    return views.metrics_of(view, key, from_step, to_step, max_points)


@router.get("/staleness", operation_id="get_staleness", responses=responses(404))
def get_staleness(
    view: View, from_step: FromStep = 0, to_step: ToStep = None, max_points: MaxPoints = 200
) -> Staleness:
    """Trained tokens by staleness over time."""
    return views.staleness_of(view, from_step, to_step, max_points)


@router.get("/throughput", operation_id="get_throughput", responses=responses(404))
def get_throughput(view: View, max_points: MaxPoints = 60) -> Throughput:
    """Response tokens per second of rollout, scoring and learning."""
    return views.throughput_of(view, max_points)


@router.get("/policies", operation_id="list_policies", responses=responses(404))
def list_policies(view: View) -> PolicyList:
    """Published versions of the surviving lineage, and the rewinds."""
    return views.policies_of(view)


@router.get("/checkpoints", operation_id="list_checkpoints", responses=responses(404))
def list_checkpoints(view: View) -> CheckpointList:
    """States the learner can resume from."""
    return views.checkpoints_of(view)


@router.get("/evals", operation_id="list_evaluations", responses=responses(404))
def list_evaluations(view: View) -> EvaluationList:
    """Quality on held-out prompts, by version."""
    return views.evaluations_of(view)


@router.get("/timeline", operation_id="get_timeline", responses=responses(404))
def get_timeline(
    view: View,
    start_s: Annotated[
        float, Query(ge=0, description="Window start, seconds after the first span.", examples=[0.0])
    ] = 0.0,
    stop_s: Annotated[float | None, Query(gt=0, description="Window end.", examples=[60.0])] = None,
    max_spans: Annotated[int, Query(ge=10, le=20_000, description="Spans per worker, about.", examples=[1500])] = 1500,
) -> Timeline:
    """Who worked and who waited for what, in lanes."""
    return views.timeline_of(view, start_s, stop_s, max_spans)
