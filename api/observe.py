"""`/v1/runs/{id}/…`: what happened to a run, as lists, curves and a live stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from api.feed import Cursor, Feed
from api.problems import responses
from api.schemas import (
    Checkpoint,
    CheckpointList,
    EvaluationList,
    EvaluationOut,
    EventPage,
    Lane,
    Metrics,
    Policy,
    PolicyList,
    Staleness,
    Throughput,
    Timeline,
)
from api.security import Reader
from api.state import Fold, KnownRun, Streams
from asyncopd.types import Span, TrainStep
from storage.lineage import surviving

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["observations"], dependencies=[Reader])
MaxPoints = Annotated[
    int, Query(ge=2, le=5000, description="Points per curve; more steps are averaged.", examples=[200])
]
FromStep = Annotated[int, Query(ge=0, description="First step.", examples=[0])]
ToStep = Annotated[int | None, Query(ge=1, description="Step to stop before.", examples=[100])]


@router.get("/events", operation_id="list_events", responses=responses(404))
def list_events(
    fold: Fold,
    after: Annotated[
        str | None,
        Query(description="`id` of the last event you have.", examples=["e0-0.f0.r0.s0-41.t1"], max_length=200),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events per page.", examples=[100])] = 100,
) -> EventPage:
    """States, steps, rewinds, evaluations and failures, oldest first."""
    feed = Feed(fold)
    feed.extend()
    found = feed.after(Cursor.parse(after))
    return EventPage(data=found[:limit], has_more=len(found) > limit)


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


@router.get("/metrics", operation_id="get_metrics", responses=responses(404))
def get_metrics(
    fold: Fold,
    key: Annotated[
        list[str] | None, Query(description="Only these metrics; all when left out.", examples=[["train/loss_nats"]])
    ] = None,
    from_step: FromStep = 0,
    to_step: ToStep = None,
    max_points: MaxPoints = 500,
) -> Metrics:
    """Training curves."""
    steps = _between(fold.steps, from_step, to_step)
    groups = _groups(steps, max_points)
    names = sorted({name for step in steps for name in step.metrics if key is None or name in key})
    began = fold.steps[0].finished if fold.steps else 0.0
    before = sum(step.num_tokens for step in fold.steps if step.step < from_step)
    totals = np.cumsum([sum(step.num_tokens for step in group) for group in groups]) + before
    return Metrics(
        steps=[float(np.mean([step.step for step in group])) for group in groups],
        wall_s=[group[-1].finished - began for group in groups],
        tokens=[int(total) for total in totals],
        series={
            name: [_mean([s.metrics[name] for s in group if name in s.metrics]) for group in groups] for name in names
        },
    )


@router.get("/staleness", operation_id="get_staleness", responses=responses(404))
def get_staleness(
    fold: Fold, from_step: FromStep = 0, to_step: ToStep = None, max_points: MaxPoints = 200
) -> Staleness:
    """Trained tokens by staleness over time."""
    groups = _groups(_between(fold.steps, from_step, to_step), max_points)
    versions = sorted({age for group in groups for step in group for age in step.staleness_tokens})
    return Staleness(
        steps=[float(np.mean([step.step for step in group])) for group in groups],
        versions=versions,
        tokens=[[sum(s.staleness_tokens.get(age, 0) for s in group) for group in groups] for age in versions],
        max_staleness=fold.config.staleness.max_staleness,
    )


@router.get("/throughput", operation_id="get_throughput", responses=responses(404))
def get_throughput(fold: Fold, max_points: MaxPoints = 60) -> Throughput:
    """Response tokens per second of rollout, scoring and learning."""
    stages = {**fold.shard_tokens(), "trained": [(step.finished, step.num_tokens) for step in fold.steps]}
    times = [when for events in stages.values() for when, _ in events]
    if not times or min(times) == max(times):
        return Throughput(seconds=[], generated=[], scored=[], trained=[])
    edges = np.linspace(min(times), max(times), max_points + 1)
    rates = {
        stage: np.histogram([t for t, _ in events], edges, weights=[n for _, n in events])[0] / (edges[1] - edges[0])
        for stage, events in stages.items()
    }
    middles = (edges[:-1] + edges[1:]) / 2 - edges[0]
    return Throughput(seconds=middles.tolist(), **{stage: rate.tolist() for stage, rate in rates.items()})


@router.get("/policies", operation_id="list_policies", responses=responses(404))
def list_policies(fold: Fold) -> PolicyList:
    """Published versions of the surviving lineage, and the rewinds."""
    made = {step.version: step.finished for step in fold.steps}
    quality = {evaluation.version: evaluation for evaluation in fold.evaluations}
    policies = []
    published = fold.log.published_policies()
    found_rewinds = fold.log.rewinds()
    kept = surviving(published, found_rewinds)
    for version in kept:
        evaluation = quality.get(version)
        policies.append(Policy(
            number=version.number, rewind=version.rewind, created=made.get(version),
            accuracy=evaluation.accuracy if evaluation else None, kl_nats=evaluation.kl_nats if evaluation else None,
        ))  # fmt: skip
    rewinds = [{"rewind": r.number, "to_step": r.to_step, "time": r.recorded} for r in found_rewinds]
    superseded = [Policy(number=v.number, rewind=v.rewind) for v in published if v not in set(kept)]
    return PolicyList(data=policies, superseded=superseded, rewinds=rewinds)


@router.get("/checkpoints", operation_id="list_checkpoints", responses=responses(404))
def list_checkpoints(fold: Fold) -> CheckpointList:
    """States the learner can resume from."""
    return CheckpointList(data=[Checkpoint(step=step, rewind=rewind) for step, rewind in fold.log.checkpoints()])


@router.get("/evals", operation_id="list_evaluations", responses=responses(404))
def list_evaluations(fold: Fold) -> EvaluationList:
    """Quality on held-out prompts, by version."""
    return EvaluationList(data=[
        EvaluationOut(
            version=e.version.number, num_prompts=e.num_prompts, accuracy=e.accuracy,
            accuracy_by_group=dict(e.accuracy_by_group), kl_nats=e.kl_nats,
            kl_standard_error_nats=e.kl_standard_error_nats, mean_response_tokens=e.mean_response_tokens,
            finished=e.finished,
        )
        for e in fold.evaluations
    ])  # fmt: skip


@router.get("/timeline", operation_id="get_timeline", responses=responses(404))
def get_timeline(
    fold: Fold,
    start_s: Annotated[
        float, Query(ge=0, description="Window start, seconds after the first span.", examples=[0.0])
    ] = 0.0,
    stop_s: Annotated[float | None, Query(gt=0, description="Window end.", examples=[60.0])] = None,
    max_spans: Annotated[int, Query(ge=10, le=20_000, description="Spans per worker, about.", examples=[1500])] = 1500,
) -> Timeline:
    """Who worked and who waited for what, in lanes."""
    spans = fold.spans()
    if not spans:
        return Timeline(origin=0.0, duration_s=0.0, resolution_s=0.0, lanes=[])
    origin = spans[0].start
    stop = stop_s if stop_s is not None else max(span.end for span in spans) - origin
    window = [span for span in spans if span.end - origin >= start_s and span.start - origin <= stop]
    resolution = max(stop - start_s, 0.0) / max_spans
    workers = sorted({(span.role, span.worker) for span in window})
    lanes = [
        _lane(role, worker, [s for s in window if s.worker == worker], origin, resolution) for role, worker in workers
    ]
    return Timeline(origin=origin, duration_s=stop, resolution_s=resolution, lanes=lanes)


def _lane(role: str, worker: str, spans: Sequence[Span], origin: float, resolution: float) -> Lane:
    joined: list[list[float | str]] = []
    last: dict[str, list[float | str]] = {}
    for span in spans:
        previous = last.get(span.activity)
        if previous is not None and span.start - origin - float(previous[1]) < resolution:
            previous[1] = max(float(previous[1]), span.end - origin)
            continue
        last[span.activity] = [span.start - origin, span.end - origin, span.activity, span.detail]
        joined.append(last[span.activity])
    return Lane(
        worker=worker, role=role, starts=[float(j[0]) for j in joined], ends=[float(j[1]) for j in joined],
        activities=[str(j[2]) for j in joined], details=[str(j[3]) for j in joined],
    )  # fmt: skip


def _between(steps: Sequence[TrainStep], first: int, stop: int | None) -> Sequence[TrainStep]:
    """By number, not by place: a replay's first step has its parent's number."""
    return [step for step in steps if first <= step.step and (stop is None or step.step < stop)]


def _groups(steps: Sequence[TrainStep], max_points: int) -> list[Sequence[TrainStep]]:
    stride = max(1, -(-len(steps) // max_points))
    return [steps[start : start + stride] for start in range(0, len(steps), stride)]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None
