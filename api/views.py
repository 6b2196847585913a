"""What a run's history looks like: curves, histograms, rates, lineage, lanes. Called in threads; storage is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from api.schemas import (
    Checkpoint,
    CheckpointList,
    EvaluationList,
    EvaluationOut,
    Lane,
    Metrics,
    Policy,
    PolicyList,
    Staleness,
    Throughput,
    Timeline,
)
from asyncopd.types import Span
from storage.history import FINISHED, NUM_TOKENS, STEP
from storage.learner_log import surviving
from storage.run_view import RunView


def metrics_of(view: RunView, keys: Sequence[str] | None, first: int, stop: int | None, max_points: int) -> Metrics:
    """Means of the metrics `keys`, or of all, over stretches of the steps from `first` to before `stop`."""
    columns = view.history.columns
    # By number, not by place: a replay's first step has its parent's number.
    numbers = columns.values(STEP)
    chosen = (numbers >= first) & (numbers < (np.inf if stop is None else stop))
    starts = stretches(int(chosen.sum()), max_points)
    finished = columns.values(FINISHED)
    totals = columns.values(NUM_TOKENS).cumsum()[chosen]
    lasts = [*(starts[1:] - 1), int(chosen.sum()) - 1] if len(starts) else []
    names = [name for name in columns.metrics() if keys is None or name in keys]
    series = {name: columns.values(name)[chosen] for name in names}
    return Metrics(
        steps=[float(mean or 0) for mean in means(numbers[chosen], starts)],
        wall_s=(finished[chosen][lasts] - finished[0]).tolist() if lasts else [],
        tokens=[int(total) for total in totals[lasts]] if lasts else [],
        # One that no step in the window has is left out.
        series={name: means(values, starts) for name, values in series.items() if not np.isnan(values).all()},
    )


def staleness_of(view: RunView, first: int, stop: int | None, max_points: int) -> Staleness:
    """Trained tokens by staleness, over the same stretches."""
    steps = [step for step in view.history.steps if first <= step.step and (stop is None or step.step < stop)]
    bounds = [*stretches(len(steps), max_points).tolist(), len(steps)]
    groups = [steps[start:end] for start, end in pairwise(bounds)]
    versions = sorted({age for step in steps for age in step.staleness_tokens})
    return Staleness(
        steps=[float(np.mean([step.step for step in group])) for group in groups],
        versions=versions,
        tokens=[[sum(s.staleness_tokens.get(age, 0) for s in group) for group in groups] for age in versions],
        max_staleness=view.config.staleness.max_staleness,
    )


def throughput_of(view: RunView, max_points: int) -> Throughput:
    """Tokens per second of each stage, in equal stretches of the time from the first to the last of them."""
    stages = {**_published(view), "trained": [(step.finished, step.num_tokens) for step in view.history.steps]}
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


def _published(view: RunView) -> dict[str, list[tuple[float, int]]]:
    """`generated` and `scored` -> (Unix time of publication, tokens) of every shard."""
    view.read("scores", "trajectories")
    stages = {"generated": view.trajectories(), "scored": view.scores(view.config.teacher.name)}
    return {
        stage: [(manifest.created, manifest.facts.num_tokens or 0) for manifest in shards.values()]
        for stage, shards in stages.items()
    }


def policies_of(view: RunView) -> PolicyList:
    """The surviving lineage, what it superseded, and the rewinds."""
    made = {step.version: step.finished for step in view.history.steps}
    quality = {evaluation.version: evaluation for evaluation in view.history.evaluations}
    published, rewinds = view.listed("policy"), view.read("rewind").rewinds
    kept = surviving(published, rewinds)
    policies = []
    for version in kept:
        evaluation = quality.get(version)
        policies.append(
            Policy(
                number=version.number,
                rewind=version.rewind,
                created=made.get(version),
                accuracy=evaluation.accuracy if evaluation else None,
                kl_nats=evaluation.kl_nats if evaluation else None,
            )
        )
    are_kept = set(kept)
    return PolicyList(
        data=policies,
        superseded=[Policy(number=v.number, rewind=v.rewind) for v in published if v not in are_kept],
        rewinds=[{"rewind": r.number, "to_step": r.to_step, "time": r.recorded} for r in rewinds],
    )


def checkpoints_of(view: RunView) -> CheckpointList:
    """Of the surviving lineage."""
    states = surviving(view.listed("checkpoint"), view.read("rewind").rewinds)
    return CheckpointList(data=[Checkpoint(step=state.number, rewind=state.rewind) for state in states])


def evaluations_of(view: RunView) -> EvaluationList:
    """Of the surviving lineage."""
    return EvaluationList(
        data=[
            EvaluationOut(
                version=e.version.number,
                num_prompts=e.num_prompts,
                accuracy=e.accuracy,
                accuracy_by_group=dict(e.accuracy_by_group),
                kl_nats=e.kl_nats,
                kl_standard_error_nats=e.kl_standard_error_nats,
                mean_response_tokens=e.mean_response_tokens,
                finished=e.finished,
            )
            for e in view.history.evaluations
        ]
    )


def timeline_of(view: RunView, start_s: float, stop_s: float | None, max_spans: int) -> Timeline:
    """Spans between `start_s` and `stop_s` after the first, in a lane for each worker."""
    spans = view.read("spans").spans()
    if not spans:
        return Timeline(origin=0.0, duration_s=0.0, resolution_s=0.0, lanes=[])
    origin = spans[0].start
    stop = stop_s if stop_s is not None else max(span.end for span in spans) - origin
    lanes: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        if span.end - origin >= start_s and span.start - origin <= stop:
            lanes[span.role, span.worker].append(span)
    resolution = max(stop - start_s, 0.0) / max_spans
    return Timeline(
        origin=origin,
        duration_s=stop,
        resolution_s=resolution,
        lanes=[_lane(role, worker, own, origin, resolution) for (role, worker), own in sorted(lanes.items())],
    )


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
        worker=worker,
        role=role,
        starts=[float(j[0]) for j in joined],
        ends=[float(j[1]) for j in joined],
        activities=[str(j[2]) for j in joined],
        details=[str(j[3]) for j in joined],
    )


def stretches(num: int, max_points: int) -> NDArray[np.int64]:
    """Where each of at most `max_points` stretches of `num` steps begins."""
    return np.arange(0, num, max(1, -(-num // max_points)))


def means(values: NDArray[np.float64], starts: NDArray[np.int64]) -> list[float | None]:
    """Mean of the finite values of each stretch; None where there is none."""
    if not len(values):
        return []
    finite = np.isfinite(values)
    nums = np.add.reduceat(finite, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    return [total / num if num else None for total, num in zip(sums.tolist(), nums.tolist(), strict=True)]
