"""What every teacher is asked and answers, and the answers from full rows of log-probs over the vocabulary, by numpy.

    RowTable --scores_from_rows: top-k, given ids, teacher draws--> assembled --> TeacherScores

Rows are for vocabularies that fit as whole rows in memory: the oracle, tiny models, tests. They may be shared: a table
of all rows there are is sorted once, and every token names its row. Suffixes: T response tokens, K top-k, M teacher
draws, J ids asked for at a token (sampled, head, draws).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import EngineError
from asyncopd.models.random import derive, stream_key, uniforms
from asyncopd.ports import ScoreRequest
from asyncopd.types import LOGPROB_FLOOR, FloatArray, IntArray, TeacherScores, Trajectory


def asked_ids(trajectory: Trajectory) -> IntArray:
    """[T, J]: the sampled token, the head and the draws of every position."""
    candidates = trajectory.candidates
    return np.concatenate([trajectory.response_ids[:, None], candidates.head_ids_TK, candidates.draw_ids_TN], axis=1)


def check_request(
    request: ScoreRequest, trajectories: Sequence[Trajectory] = (), *, vocab_size: int, teacher: str
) -> None:
    """Refuse what no teacher with this vocabulary can answer.

    Raises:
        EngineError: the request makes no sense for the vocabulary, or an id of `trajectories` lies outside it.
    """
    if not (0 <= request.top_k <= vocab_size and request.num_teacher_draws >= 0 and request.temperature > 0):
        raise EngineError(
            f"score request {request}: expected 0 <= top_k <= {vocab_size} (the vocabulary size of teacher {teacher}), "
            "num_teacher_draws >= 0 and a temperature above 0. Correct the loss settings."
        )
    for trajectory in trajectories:
        for ids in (trajectory.prompt_ids, asked_ids(trajectory)):
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise EngineError(
                    f"index {trajectory.index}: ids reach from {ids.min()} to {ids.max()}, but the vocabulary of "
                    f"teacher {teacher} has {vocab_size}. Student and teacher must share one tokenizer."
                )


def assembled(
    trajectories: Sequence[Trajectory],
    asked: Sequence[FloatArray],
    topk_ids_TK: IntArray,
    topk_logprobs_TK: FloatArray,
    draw_ids_TM: IntArray,
    draw_logprobs_TM: FloatArray,
    *,
    temperature: float,
    teacher: str,
    teacher_digest: str,
) -> list[TeacherScores]:
    """One TeacherScores for every trajectory; log-probs below `LOGPROB_FLOOR`, −inf included, become it.

    Args:
        asked: of each trajectory the log-probs at its `asked_ids`, [T, J].
        topk_ids_TK, topk_logprobs_TK, draw_ids_TM, draw_logprobs_TM: of all trajectories, one after the other.
    """
    topk_logprobs_TK, draw_logprobs_TM = (np.maximum(x, LOGPROB_FLOOR) for x in (topk_logprobs_TK, draw_logprobs_TM))
    scores, stop = [], 0
    for trajectory, unbounded_TJ in zip(trajectories, asked, strict=True):
        logprobs_TJ = np.maximum(unbounded_TJ, LOGPROB_FLOOR)
        start, stop = stop, stop + len(logprobs_TJ)
        head_end = 1 + trajectory.candidates.head_ids_TK.shape[1]
        scores.append(
            TeacherScores(
                index=trajectory.index,
                teacher=teacher,
                teacher_digest=teacher_digest,
                temperature=temperature,
                sampled_logprobs_T=logprobs_TJ[:, 0],
                topk_ids_TK=topk_ids_TK[start:stop],
                topk_logprobs_TK=topk_logprobs_TK[start:stop],
                head_logprobs_TK=logprobs_TJ[:, 1:head_end],
                draw_logprobs_TN=logprobs_TJ[:, head_end:],
                teacher_draw_ids_TM=draw_ids_TM[start:stop],
                teacher_draw_logprobs_TM=draw_logprobs_TM[start:stop],
            )
        )
    return scores


class RowTable:
    """R distributions over V ids, ready to be asked.

    Args:
        logprobs_RV: [R, V] finite, nats, any scale: rows are normalised after division by `temperature`.
        temperature: of the softmax the answers are of; > 0.
    Raises:
        EngineError: `temperature` is not positive.
    """

    def __init__(self, logprobs_RV: NDArray[np.floating], temperature: float) -> None:
        if not temperature > 0:
            raise EngineError(
                f"temperature {temperature} of a score request: expected a number above 0. "
                f"Set rollout.temperature to the temperature responses are sampled at."
            )
        scaled_RV = np.asarray(logprobs_RV, np.float64) / temperature
        scaled_RV -= scaled_RV.max(-1, keepdims=True)
        probabilities_RV = np.exp(scaled_RV)
        sum_R1 = probabilities_RV.sum(-1, keepdims=True)
        self.logprobs_RV: FloatArray = (scaled_RV - np.log(sum_R1)).astype(np.float32)
        """[R, V] float32, nats, normalised."""
        # Sorting is stable, so equal log-probs are ordered by id. It must see the float32 values that are returned.
        self.ranking_RV: IntArray = np.argsort(-self.logprobs_RV, axis=-1, kind="stable").astype(np.int32)
        """[R, V] ids, most likely first, equals by id."""
        # Row r's distribution function is shifted by r: one binary search over the flat table serves all rows.
        self._shifted_cdf_RV = (probabilities_RV / sum_R1).cumsum(-1) + np.arange(len(scaled_RV))[:, None]
        self._shifted_cdf_RV[:, -1] = np.arange(1, len(scaled_RV) + 1)

    @property
    def vocab_size(self) -> int:
        return int(self.logprobs_RV.shape[1])

    def draws(self, rows_T: NDArray[np.int64], uniforms_TM: NDArray[np.float64]) -> IntArray:
        """[T, M] ids drawn from the rows by inversion of uniforms in [0, 1)."""
        flat = np.searchsorted(self._shifted_cdf_RV.ravel(), uniforms_TM + rows_T[:, None], side="right")
        ids_TM = flat - rows_T[:, None] * self.vocab_size
        # A uniform just below 1 may round up to the next row.
        return np.asarray(np.clip(ids_TM, 0, self.vocab_size - 1), np.int32)


def scores_from_rows(
    table: RowTable,
    trajectories: Sequence[Trajectory],
    rows: Sequence[NDArray[np.int64]],
    request: ScoreRequest,
    *,
    teacher: str,
    teacher_digest: str,
) -> list[TeacherScores]:
    """Answer a request from tabulated distributions.

    Args:
        table: the distributions, at the request's temperature.
        trajectories: what to score.
        rows: for every trajectory [T], the row of `table` at each of its response tokens.
        request: what to return. Teacher draws depend on its seed and the trajectory's index only.
        teacher, teacher_digest: written into the scores.
    Returns:
        TeacherScores in the order of `trajectories`.
    Raises:
        EngineError: an id lies outside the vocabulary, or `top_k` exceeds it.
    """
    check_request(request, vocab_size=table.vocab_size, teacher=teacher)
    if not trajectories:
        return []
    # One numpy call per quantity serves all trajectories: at eleven tokens each, calls cost more than numbers.
    lengths = [len(rows_T) for rows_T in rows]
    rows_T = np.concatenate(rows)
    topk_ids_TK = table.ranking_RV[rows_T, : request.top_k]
    draw_ids_TM = _teacher_draws(table, rows_T, lengths, [trajectory.index for trajectory in trajectories], request)
    return assembled(
        trajectories,
        _at(table, rows_T, lengths, [asked_ids(trajectory) for trajectory in trajectories]),
        topk_ids_TK,
        table.logprobs_RV[rows_T[:, None], topk_ids_TK],
        draw_ids_TM,
        table.logprobs_RV[rows_T[:, None], draw_ids_TM],
        temperature=request.temperature,
        teacher=teacher,
        teacher_digest=teacher_digest,
    )


def _teacher_draws(
    table: RowTable, rows_T: NDArray[np.int64], lengths: Sequence[int], indices: Sequence[int], request: ScoreRequest
) -> IntArray:
    """[T, M] ids for all trajectories in a row, each from its own stream."""
    num_draws = request.num_teacher_draws
    if num_draws == 0:
        return np.zeros((len(rows_T), 0), np.int32)
    key = stream_key("teacher draws", request.seed)
    keys_T = np.repeat(np.array([derive(key, index) for index in indices], np.uint64), lengths)
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    counters_TM = positions_T[:, None] * num_draws + np.arange(num_draws)
    return table.draws(rows_T, uniforms(keys_T[:, None], counters_TM))


def _at(
    table: RowTable, rows_T: NDArray[np.int64], lengths: Sequence[int], ids: Sequence[IntArray]
) -> list[FloatArray]:
    """Log-probs at each trajectory's own ids, in the shape of its ids: [T, J]."""
    flat_ids = np.concatenate([ids_TJ.ravel() for ids_TJ in ids])
    # numpy would take a negative id from the end of the row.
    if not (flat_ids.min() >= 0 and flat_ids.max() < table.vocab_size):
        raise EngineError(
            f"response or candidate ids reach from {flat_ids.min()} to {flat_ids.max()}, but the teacher's vocabulary "
            f"has {table.vocab_size} ids. Student and teacher must share one tokenizer."
        )
    widths = np.repeat([ids_TJ.shape[1] for ids_TJ in ids], lengths)
    logprobs = table.logprobs_RV[np.repeat(rows_T, widths), flat_ids]
    stops = accumulate(ids_TJ.size for ids_TJ in ids)
    return [logprobs[stop - ids_TJ.size : stop].reshape(ids_TJ.shape) for ids_TJ, stop in zip(ids, stops, strict=True)]
