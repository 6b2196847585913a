"""`/v1/runs/{id}/trajectories`: responses, down to single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from functools import lru_cache
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path

from api.deps import Reader, View, query
from api.problems import ProblemError, responses
from api.schemas import Alternative, Token, TrajectoryOut, TrajectoryPage, TrajectorySummary
from asyncopd.config import RunConfig
from asyncopd.ports import Task, Tokenizer
from asyncopd.tasks.build import build_task
from asyncopd.types import IndexRange, TeacherScores, Trajectory
from storage.run_log import StoredRunLog
from storage.run_view import RunView

router = APIRouter(prefix="/v1/runs/{run_id}/trajectories", tags=["trajectories"], dependencies=[Reader])
MAX_SHARDS_READ = 50
"""A page whose filter matches nothing ends after so many shards, with a cursor to go on from."""
MAX_DECODED = 64
"""Shards that stay decoded: what pages show first."""
Row = tuple[TrajectorySummary, Set[int]]
"""A trajectory as lists show it, and the versions that produced tokens of it."""


@router.get("", operation_id="list_trajectories", responses=responses(404))
def list_trajectories(
    view: View,
    after: Annotated[int, query("`next_cursor` of the page before.", -1, ge=-1)] = -1,
    limit: Annotated[int, query("Trajectories per page.", 50, ge=1, le=500)] = 50,
    version: Annotated[int | None, query("Only those with tokens of this version.", 12, ge=0)] = None,
    correct: Annotated[bool | None, query("Only right, or only wrong ones.", True)] = None,
    group: Annotated[str | None, query("Only this difficulty.", "noise 0.35", max_length=100)] = None,
    min_tokens: Annotated[int, query("Only responses at least this long.", 1, ge=1)] = 1,
) -> TrajectoryPage:
    """Responses in index order, filtered."""
    found: list[TrajectorySummary] = []
    shards = [shard for shard in view.log.trajectory_shards() if shard.stop > after + 1]
    for number, shard in enumerate(shards):
        for summary, versions in _rows_of(view, shard):
            is_shown = (
                summary.index > after
                and summary.num_tokens >= min_tokens
                and (version is None or version in versions)
                and (correct is None or summary.correct is correct)
                and (not group or summary.group == group)
            )
            if is_shown:
                found.append(summary)
                if len(found) == limit:
                    return TrajectoryPage(data=found, next_cursor=summary.index)
        if number + 1 == MAX_SHARDS_READ and number + 1 < len(shards):
            return TrajectoryPage(data=found, next_cursor=shard.stop - 1)
    return TrajectoryPage(data=found)


@router.get("/{index}", operation_id="get_trajectory", responses=responses(404))
def get_trajectory(
    view: View, index: Annotated[int, Path(ge=0, description="Address in the run.", examples=[128])]
) -> TrajectoryOut:
    """A response token by token, with what teacher and student thought at each."""
    shard = view.log.shard_of(index)
    stored = view.log.read_trajectories(shard) if shard is not None else ()
    trajectory = next((t for t in stored if t.index == index), None)
    if shard is None or trajectory is None:
        raise ProblemError(
            404, "no-such-trajectory", f"Index {index} of run {view.log.run_id} is not produced yet, or was dropped."
        )
    teacher = view.config.teacher.name
    has_scores = view.log.find_scores(teacher, shard) is not None
    found = view.log.read_scores(teacher, shard) if has_scores else ()
    scores = next((scores for scores in found if scores.index == index), None)
    tokenizer = _task_of(view.config.task.model_dump_json(), view.config.seed).tokenizer
    step = next((s for s in view.history.steps if index in s.indices.indices), None)
    return TrajectoryOut(
        summary=_summary(trajectory, scores),
        prompt=tokenizer.decode(trajectory.prompt_ids.tolist()),
        response=tokenizer.decode(trajectory.response_ids.tolist()),
        tokens=list(_tokens(trajectory, scores, tokenizer)),
        teacher=teacher,
        teacher_top_of="head" if scores is not None and not scores.topk_ids_TK.size else "topk",
        trained_at_step=step.step if step else None,
        staleness=step.step - trajectory.version_first if step else None,
    )


@lru_cache(maxsize=16)
def _task_of(task: str, seed: int) -> Task:
    """The task of a run, for its tokenizer; built once per configuration."""
    config = RunConfig.model_validate_json(f'{{"task": {task}}}').task
    if config.kind == "text" and config.tokenizer != "bytes":
        raise ProblemError(
            422,
            "tokenizer-not-loaded",
            f"The service loads no Hugging Face tokenizer ({config.tokenizer}); read ids through /v1/sql instead.",
        )
    return build_task(config, seed=seed, tokenizer=None)


def _rows_of(view: RunView, shard: IndexRange) -> Sequence[Row]:
    """The rows of a shard, decoded once: its manifests say whether it is still the same."""
    log, teacher = view.log, view.config.teacher.name
    manifests = (log.find_trajectories(shard), log.find_scores(teacher, shard))
    return _decoded(log, teacher, shard, *(found and found.created for found in manifests))


@lru_cache(MAX_DECODED)
def _decoded(
    log: StoredRunLog, teacher: str, shard: IndexRange, produced: float | None, scored: float | None
) -> Sequence[Row]:
    scores = {} if scored is None else {found.index: found for found in log.read_scores(teacher, shard)}
    return [
        (_summary(trajectory, scores.get(trajectory.index)), {run.version for run in trajectory.version_runs})
        for trajectory in log.read_trajectories(shard)
    ]


def _summary(trajectory: Trajectory, scores: TeacherScores | None) -> TrajectorySummary:
    gap = None if scores is None else float(np.mean(trajectory.behaviour_logprobs_T - scores.sampled_logprobs_T))
    return TrajectorySummary(
        index=trajectory.index,
        prompt_id=trajectory.prompt_id,
        group=trajectory.group,
        correct=trajectory.correct,
        num_tokens=len(trajectory.response_ids),
        finish_reason=trajectory.finish_reason,
        version_first=trajectory.version_first,
        version_last=trajectory.version_last,
        kl_nats=gap,
    )


def _tokens(trajectory: Trajectory, scores: TeacherScores | None, tokenizer: Tokenizer) -> Iterator[Token]:
    def top(ids: list[int], logprobs: list[float]) -> list[Alternative]:
        ranked = sorted(zip(ids, logprobs, strict=True), key=lambda pair: -pair[1])[:8]
        return [Alternative(id=i, text=tokenizer.token_text(i), logprob=logprob) for i, logprob in ranked]

    candidates, versions = trajectory.candidates, trajectory.versions_T
    for t, token_id in enumerate(trajectory.response_ids.tolist()):
        teacher_top: list[Alternative] = []
        if scores is not None:
            ids, logprobs = scores.topk_ids_TK[t].tolist(), scores.topk_logprobs_TK[t].tolist()
            if not ids:
                # No top-k was asked for; what the teacher said about the student's head is the next best thing.
                ids, logprobs = candidates.head_ids_TK[t].tolist(), scores.head_logprobs_TK[t].tolist()
            teacher_top = top(ids, logprobs)
        yield Token(
            id=token_id,
            text=tokenizer.token_text(token_id),
            version=int(versions[t]),
            behaviour_logprob=float(trajectory.behaviour_logprobs_T[t]),
            teacher_logprob=None if scores is None else float(scores.sampled_logprobs_T[t]),
            teacher_top=teacher_top,
            student_top=top(candidates.head_ids_TK[t].tolist(), candidates.head_logprobs_TK[t].tolist()),
        )
