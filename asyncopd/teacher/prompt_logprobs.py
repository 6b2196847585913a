"""From the prompt log-probs a vLLM-like engine returns to TeacherScores: shared by `VllmScorer` and `OpenAIScorer`.

    response scored as part of a prompt --engine--> per token: its own log-prob, the top k, or the full vocabulary

Such engines speak about their top k at temperature 1. Anything else (other ids, another temperature, draws) is exact
from the full vocabulary only, which is Python numbers per token and id: for vocabularies up to `MAX_FULL_VOCABULARY`.
Suffixes: T response tokens, J entries of the engine's answer, A asked ids (sampled, head, draws), V vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asyncopd.errors import EngineError
from asyncopd.ports import ScoreRequest
from asyncopd.teacher.rows import RowTable, asked_ids, assembled, check_request, scores_from_rows
from asyncopd.types import FloatArray, IntArray, TeacherScores, Trajectory

MAX_FULL_VOCABULARY = 8192
"""A trajectory of 1000 tokens is then 8 million numbers, some seconds of parsing; more is not worth waiting for."""
FULL = -1
"""vLLM's `prompt_logprobs` for the whole vocabulary."""


@dataclass(frozen=True)
class PromptAnswer:
    """What an engine says about the response tokens of one trajectory, temperature 1, nats."""

    sampled_logprobs_T: FloatArray
    ids_TJ: IntArray
    """[T, K] the K most likely ids, descending; with K = V every id."""
    logprobs_TJ: FloatArray
    """[T, K] at `ids_TJ`."""
    asked_logprobs_TA: FloatArray | None = None
    """[T, A] at the ids of `asked_ids`, from engines that score given ids."""


async def all_answers(calls: Sequence[Coroutine[Any, Any, PromptAnswer]]) -> list[PromptAnswer]:
    """Answers of calls that run at once, in order. The first failure cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def num_logprobs(
    trajectories: Sequence[Trajectory], request: ScoreRequest, *, vocab_size: int, scores_ids: bool, teacher: str
) -> int:
    """What to ask for as `prompt_logprobs`: the request's top k, or FULL where only the whole vocabulary is exact.

    Args:
        scores_ids: the engine scores given ids by itself.
    Raises:
        EngineError: the request makes no sense for this vocabulary, an id lies outside it, or the full vocabulary is
            needed and too large.
    """
    check_request(request, trajectories, vocab_size=vocab_size, teacher=teacher)
    has_candidates = any(asked_ids(trajectory).shape[1] > 1 for trajectory in trajectories)
    reasons = [
        reason
        for reason, holds in (
            (f"temperature {request.temperature}", request.temperature != 1.0),
            (f"{request.num_teacher_draws} teacher draws", request.num_teacher_draws > 0),
            ("scores at the student's candidates", has_candidates and not scores_ids),
            (f"top_k {request.top_k} of {vocab_size}", request.top_k == vocab_size),
        )
        if holds
    ]
    if reasons and vocab_size > MAX_FULL_VOCABULARY:
        raise EngineError(
            f"teacher {teacher}: {', '.join(reasons)} would need the log-probs of all {vocab_size} ids at every token "
            f"from vLLM, which is supported up to {MAX_FULL_VOCABULARY}. Use teacher.engine hf, or a loss on the "
            "teacher's top k at rollout.temperature 1 (docs/engines.md)."
        )
    return FULL if reasons else request.top_k


def scores_of(
    trajectory: Trajectory, answer: PromptAnswer, request: ScoreRequest, *, full: bool, teacher: str, digest: str
) -> TeacherScores:
    """One trajectory's scores.

    Args:
        full: the answer holds the whole vocabulary.
    Raises:
        EngineError: the answer is not of this trajectory's length, holds NaN, or less than the whole vocabulary
            although `full`.
    """
    num_tokens = len(trajectory.response_ids)
    logprobs = answer.logprobs_TJ
    if len(logprobs) != num_tokens or np.isnan(logprobs).any() or np.isnan(answer.sampled_logprobs_T).any():
        raise EngineError(
            f"index {trajectory.index}: teacher {teacher} answered {len(logprobs)} rows with "
            f"{int(np.isnan(logprobs).sum())} NaN for {num_tokens} response tokens. Check its weights and dtype."
        )
    if full:
        rows_TV = np.full(logprobs.shape, np.nan, np.float64)
        np.put_along_axis(rows_TV, answer.ids_TJ.astype(np.int64), np.maximum(logprobs, -9999.0), axis=1)
        if np.isnan(rows_TV).any():
            raise EngineError(
                f"index {trajectory.index}: teacher {teacher} left out {int(np.isnan(rows_TV).sum())} of "
                f"{rows_TV.size} log-probs of the full vocabulary."
            )
        (scores,) = scores_from_rows(
            RowTable(rows_TV, request.temperature),
            [trajectory],
            [np.arange(num_tokens)],
            request,
            teacher=teacher,
            teacher_digest=digest,
        )
        return scores
    sampled_T1 = answer.sampled_logprobs_T[:, None]
    asked = answer.asked_logprobs_TA
    (scores,) = assembled(
        [trajectory],
        [sampled_T1 if asked is None else np.concatenate([sampled_T1, asked[:, 1:]], axis=1)],
        answer.ids_TJ,
        logprobs,
        np.empty((num_tokens, 0), np.int32),
        np.empty((num_tokens, 0), np.float32),
        temperature=request.temperature,
        teacher=teacher,
        teacher_digest=digest,
    )
    return scores
