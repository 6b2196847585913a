"""`/v1/runs/{id}/…`: what happened to a run, as events, curves, histograms, rates, lineage and lanes.

Plain functions, which FastAPI calls in threads: a view that takes long holds up nobody but who asked for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray

from api import schemas
from api.deps import KnownRun, Reader, Streams, View, query
from api.events import Cursor
from api.problems import responses
from api.schemas import Number, Schema, field
from asyncopd.metrics import LOSS, SECONDS
from asyncopd.types import Span
from storage.events import surviving
from storage.history import FINISHED, NUM_TOKENS, STEP

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["observations"], dependencies=[Reader])
EVENT_ID = "e0-0.f0.r0.s0-41.t1"
MaxPoints = Annotated[int, query("Points per curve; more steps are averaged.", 200, ge=2, le=5000)]
FromStep = Annotated[int, query("First step.", 0, ge=0)]
ToStep = Annotated[int | None, query("Step to stop before.", 100, ge=1)]


@router.get("/events", operation_id="list_events", response_model=schemas.EventPage, responses=responses(404))
async def list_events(
    view: View,
    streams: Streams,
    after: Annotated[str | None, query("`id` of the last event you have.", EVENT_ID, max_length=200)] = None,
    limit: Annotated[int, query("Events per page.", 100, ge=1, le=1000)] = 100,
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
    after: Annotated[str | None, query("As Last-Event-ID.", EVENT_ID, max_length=200)] = None,
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
    key: Annotated[list[str] | None, query("Only these metrics; all when left out.", [LOSS.key])] = None,
    from_step: FromStep = 0,
    to_step: ToStep = None,
    max_points: MaxPoints = 500,
) -> schemas.Metrics:
    """Training curves."""
    columns = view.history.columns
    # By number, not by place: a replay's first step has its parent's number.
    numbers = columns.values(STEP)
    chosen = (numbers >= from_step) & (numbers < (np.inf if to_step is None else to_step))
    starts = stretches(int(chosen.sum()), max_points)
    finished = columns.values(FINISHED)
    totals = columns.values(NUM_TOKENS).cumsum()[chosen]
    lasts = [*(starts[1:] - 1), int(chosen.sum()) - 1] if len(starts) else []
    series = {name: columns.values(name)[chosen] for name in columns.metrics() if key is None or name in key}
    return schemas.Metrics(
        steps=[float(mean or 0) for mean in means(numbers[chosen], starts)],
        wall_s=(finished[chosen][lasts] - finished[0]).tolist() if lasts else [],
        tokens=[int(total) for total in totals[lasts]] if lasts else [],
        # One that no step in the window has is left out.
        series={name: means(values, starts) for name, values in series.items() if not np.isnan(values).all()},
    )


@router.get("/staleness", operation_id="get_staleness", responses=responses(404))
def get_staleness(
    view: View, from_step: FromStep = 0, to_step: ToStep = None, max_points: MaxPoints = 200
) -> schemas.Staleness:
    """Trained tokens by staleness over time."""
    steps = [s for s in view.history.steps if from_step <= s.step and (to_step is None or s.step < to_step)]
    bounds = [*stretches(len(steps), max_points).tolist(), len(steps)]
    groups = [steps[start:end] for start, end in pairwise(bounds)]
    versions = sorted({value for step in steps for value in step.staleness_tokens})
    return schemas.Staleness(
        steps=[float(np.mean([step.step for step in group])) for group in groups],
        versions=versions,
        tokens=[[sum(s.staleness_tokens.get(value, 0) for s in group) for group in groups] for value in versions],
        max_staleness=view.config.staleness.max_staleness,
    )


@router.get("/throughput", operation_id="get_throughput", responses=responses(404))
def get_throughput(view: View, max_points: MaxPoints = 60) -> schemas.Throughput:
    """Response tokens per second of rollout, scoring and learning; a shard's or step's are spread over its making."""
    view.read("scores", "trajectories")
    shards = {"generated": view.trajectories(), "scored": view.scores(view.config.teacher.name)}
    stages = {
        stage: [(m.created, m.facts.seconds or 0.0, m.facts.num_tokens or 0) for m in found.values()]
        for stage, found in shards.items()
    }
    stages["trained"] = [(s.finished, s.metrics.get(SECONDS.key, 0.0), s.num_tokens) for s in view.history.steps]
    # As short as a clock tells; then no piece is a point in time.
    stages = {stage: [(end, max(s, 1e-3), num) for end, s, num in made] for stage, made in stages.items()}
    pieces = [piece for made in stages.values() for piece in made]
    if not pieces:
        return schemas.Throughput(seconds=[], generated=[], scored=[], trained=[])
    edges = np.linspace(min(end - s for end, s, _ in pieces), max(end for end, *_ in pieces), max_points + 1)
    rates = {stage: spread(made, edges) for stage, made in stages.items()}
    middles = (edges[:-1] + edges[1:]) / 2 - edges[0]
    return schemas.Throughput(seconds=middles.tolist(), **{stage: rate.tolist() for stage, rate in rates.items()})


@router.get("/policies", operation_id="list_policies", responses=responses(404))
def list_policies(view: View) -> schemas.PolicyList:
    """Published versions of the surviving lineage, and the rewinds."""
    made = {step.version: step.finished for step in view.history.steps}
    quality = {e.version: {"accuracy": e.accuracy, "kl_nats": e.kl_nats} for e in view.history.evaluations}
    published, rewinds = view.listed("policy"), view.read("rewind").rewinds
    kept = surviving(published, rewinds)
    others = sorted(set(published) - set(kept))
    return schemas.PolicyList(
        data=[schemas.Policy(**vars(v), created=made.get(v), **quality.get(v, {})) for v in kept],
        superseded=[schemas.Policy(**vars(v)) for v in others],
        rewinds=[{"rewind": r.number, "to_step": r.to_step, "time": r.recorded} for r in rewinds],
    )


@router.get("/checkpoints", operation_id="list_checkpoints", responses=responses(404))
def list_checkpoints(view: View) -> schemas.CheckpointList:
    """States the learner can resume from."""
    states = surviving(view.listed("checkpoint"), view.read("rewind").rewinds)
    return schemas.CheckpointList(data=[schemas.Checkpoint(step=state.number, rewind=state.rewind) for state in states])


class ExampleOut(Schema):
    """A held-out response to read."""

    prompt: str = field("The prompt.", "n0 7 goal 3")
    response: str = field("The response, special tokens shown.", "+ 4 <eos>")
    correct: bool = field("Whether the verifier accepts it.", True)


class EvaluationOut(Schema):
    """Quality of one version on held-out prompts."""

    version: int = field("The version.", 100)
    num_prompts: int = field("Held-out prompts.", 300)
    accuracy: Number = field("Fraction right.", 0.78)
    accuracy_by_group: dict[str, Number] = field("The same by difficulty.", {"noise 0.05": 0.9})
    kl_nats: Number = field("KL to the teacher, nats per token.", 1.01)
    kl_standard_error_nats: Number = field("Its standard error.", 0.1)
    mean_response_tokens: Number = field("Mean length.", 33.0)
    finished: float = field("When.", 1_795_000_000.0)
    examples: list[ExampleOut] = field("The first few responses; the same prompts for every version.", [])


class EvaluationList(Schema):
    """Evaluations of the surviving lineage."""

    data: list[EvaluationOut] = field("By version.", [])


@router.get("/evals", operation_id="list_evaluations", responses=responses(404))
def list_evaluations(view: View) -> EvaluationList:
    """Quality on held-out prompts, by version."""
    found = [{**asdict(evaluation), "version": evaluation.version.number} for evaluation in view.history.evaluations]
    return EvaluationList(data=[EvaluationOut(**fields) for fields in found])


@router.get("/timeline", operation_id="get_timeline", responses=responses(404))
def get_timeline(
    view: View,
    start_s: Annotated[float, query("Window start, seconds after the first span.", 0.0, ge=0)] = 0.0,
    stop_s: Annotated[float | None, query("Window end.", 60.0, gt=0)] = None,
    max_spans: Annotated[int, query("Spans per worker, about.", 1500, ge=10, le=20_000)] = 1500,
) -> schemas.Timeline:
    """Who worked and who waited for what, in lanes."""
    spans = view.read("spans").spans()
    if not spans:
        return schemas.Timeline(origin=0.0, duration_s=0.0, resolution_s=0.0, lanes=[])
    origin = spans[0].start
    stop = stop_s if stop_s is not None else max(span.end for span in spans) - origin
    lanes: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        if span.end - origin >= start_s and span.start - origin <= stop:
            lanes[span.role, span.worker].append(span)
    resolution = max(stop - start_s, 0.0) / max_spans
    joined = [_lane(role, worker, own, origin, resolution) for (role, worker), own in sorted(lanes.items())]
    return schemas.Timeline(origin=origin, duration_s=stop, resolution_s=resolution, lanes=joined)


def _lane(role: str, worker: str, spans: Sequence[Span], origin: float, resolution: float) -> schemas.Lane:
    lane = schemas.Lane(worker=worker, role=role, starts=[], ends=[], activities=[], details=[])
    last: dict[str, int] = {}
    for span in spans:
        start, end = span.start - origin, span.end - origin
        place = last.get(span.activity)
        if place is not None and start - lane.ends[place] < resolution:
            lane.ends[place] = max(lane.ends[place], end)
            continue
        last[span.activity] = len(lane.starts)
        lane.starts.append(start)
        lane.ends.append(end)
        lane.activities.append(span.activity)
        lane.details.append(span.detail)
    return lane


def stretches(num: int, max_points: int) -> NDArray[np.int64]:
    """Where each of at most `max_points` stretches of `num` steps begins."""
    return np.arange(0, num, max(1, -(-num // max_points)))


def spread(pieces: Sequence[tuple[float, float, int]], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens per second between neighbouring `edges`, Unix seconds.

    Args:
        pieces: (end, seconds it took, tokens), each made evenly over its time: at its end alone, pieces longer than a
            stretch would look like bursts between standstills.
    """
    if not pieces:
        return np.zeros(len(edges) - 1)
    ends, seconds, tokens = np.array(pieces, np.float64).T
    ends = ends - edges[0]
    starts = np.maximum(ends - seconds, 0.0)
    times, slopes = np.concatenate([starts, ends]), tokens / (ends - starts)
    changes = np.concatenate([slopes, -slopes])
    order = times.argsort()
    rates = changes[order].cumsum()[:-1]
    totals = np.concatenate([[0.0], (rates * np.diff(times[order])).cumsum()])
    found: NDArray[np.float64] = np.diff(np.interp(edges - edges[0], times[order], totals)) / np.diff(edges)
    return found


def means(values: NDArray[np.float64], starts: NDArray[np.int64]) -> list[float | None]:
    """Mean of the finite values of each stretch; None where there is none."""
    if not len(values):
        return []
    finite = np.isfinite(values)
    nums = np.add.reduceat(finite, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    return [total / num if num else None for total, num in zip(sums.tolist(), nums.tolist(), strict=True)]
