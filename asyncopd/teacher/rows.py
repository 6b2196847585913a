"""From full rows of log-probs over the vocabulary to TeacherScores: top-k, given ids and teacher draws, by numpy.

For vocabularies that fit as whole rows in memory: the oracle, tiny models, tests. Rows may be shared: a table of all
rows there are is sorted once, and every token names its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import EngineError
from asyncopd.models.random import derive, stream_key, uniforms
from asyncopd.ports import ScoreRequest
from asyncopd.types import FloatArray, IntArray, TeacherScores, Trajectory


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
        self.temperature = temperature
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
    if not 0 <= request.top_k <= table.vocab_size or request.num_teacher_draws < 0:
        raise EngineError(
            f"score request with top_k {request.top_k} and num_teacher_draws {request.num_teacher_draws}: expected "
            f"0 <= top_k <= {table.vocab_size} (vocabulary size), num_teacher_draws >= 0. Correct the loss settings."
        )
    if not trajectories:
        return []
    # One numpy call per quantity serves all trajectories: at eleven tokens each, calls cost more than numbers.
    lengths = [len(rows_T) for rows_T in rows]
    rows_T = np.concatenate(rows)
    topk_ids_TK = table.ranking_RV[rows_T, : request.top_k]
    topk_logprobs_TK = table.logprobs_RV[rows_T[:, None], topk_ids_TK]
    draw_ids_TM = _teacher_draws(table, rows_T, lengths, [trajectory.index for trajectory in trajectories], request)
    draw_logprobs_TM = table.logprobs_RV[rows_T[:, None], draw_ids_TM]
    sampled = _at(table, rows_T, lengths, [trajectory.response_ids for trajectory in trajectories])
    heads = _at(table, rows_T, lengths, [trajectory.candidates.head_ids_TK for trajectory in trajectories])
    draws = _at(table, rows_T, lengths, [trajectory.candidates.draw_ids_TN for trajectory in trajectories])
    stops = list(accumulate(lengths))
    return [
        TeacherScores(
            index=trajectory.index,
            teacher=teacher,
            teacher_digest=teacher_digest,
            temperature=table.temperature,
            sampled_logprobs_T=sampled[number],
            topk_ids_TK=topk_ids_TK[stop - length : stop],
            topk_logprobs_TK=topk_logprobs_TK[stop - length : stop],
            head_logprobs_TK=heads[number],
            draw_logprobs_TN=draws[number],
            teacher_draw_ids_TM=draw_ids_TM[stop - length : stop],
            teacher_draw_logprobs_TM=draw_logprobs_TM[stop - length : stop],
        )
        for number, (trajectory, length, stop) in enumerate(zip(trajectories, lengths, stops, strict=True))
    ]


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
    """Log-probs at each trajectory's own ids, in the shape of its ids: [T] or [T, *]."""
    sizes = [array.size for array in ids]
    flat_ids = np.concatenate([array.reshape(-1) for array in ids])
    # numpy would take a negative id from the end of the row.
    if flat_ids.size and not (flat_ids.min() >= 0 and flat_ids.max() < table.vocab_size):
        raise EngineError(
            f"response or candidate ids reach from {flat_ids.min()} to {flat_ids.max()}, but the teacher's vocabulary "
            f"has {table.vocab_size} ids. Student and teacher must share one tokenizer."
        )
    widths = np.repeat([size // length for size, length in zip(sizes, lengths, strict=True)], lengths)
    logprobs = table.logprobs_RV[np.repeat(rows_T, widths), flat_ids]
    return [
        logprobs[stop - size : stop].reshape(array.shape)
        for array, size, stop in zip(ids, sizes, accumulate(sizes), strict=True)
    ]
