"""The trained tokens of a micro-batch as flat tensors, and the supports and draws that estimators read off them.

Padding never gets here; losses know no batch axis.
Row t speaks about the distribution at the prefix that produced `response_ids_T[t]` in every tensor (the alignment
contract of docs/estimators.md). Every response token is a row, the first one and EOS too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncopd.errors import ShapeError
from asyncopd.types import ScoredTrajectory


@dataclass(frozen=True)
class TokenRows:
    """What is cached about T trained tokens. Ids are int64; log-probs are nats, float32 (float64 in tests)."""

    response_ids_T: Tensor
    """[T] the token that was sampled."""
    behaviour_logprobs_T: Tensor
    """[T] log p_old of it, of the law really sampled from."""
    teacher_logprobs_T: Tensor
    """[T] log q of it."""
    topk_ids_TK: Tensor
    """[T, K] the teacher's most likely ids, descending; K may be 0, and K = V is the full vocabulary."""
    topk_logprobs_TK: Tensor
    """[T, K] log q at `topk_ids_TK`."""
    head_ids_TK: Tensor
    """[T, K'] the sampling student's most likely ids, descending; K' may be 0."""
    head_behaviour_logprobs_TK: Tensor
    """[T, K'] log p_old at `head_ids_TK`."""
    head_teacher_logprobs_TK: Tensor
    """[T, K'] log q at `head_ids_TK`."""
    tail_logmass_T: Tensor
    """[T] log P_old(H^c), the behaviour mass outside the head; -inf where the head holds everything."""
    draw_ids_TN: Tensor
    """[T, N] i.i.d. draws with replacement under the law the configuration states: `policy` or `tail`."""
    draw_behaviour_logprobs_TN: Tensor
    """[T, N] log p_old at `draw_ids_TN`: of p_old itself, whatever the law."""
    draw_teacher_logprobs_TN: Tensor
    """[T, N] log q at `draw_ids_TN`."""
    teacher_draw_ids_TM: Tensor
    """[T, M] i.i.d. draws from q."""
    teacher_draw_logprobs_TM: Tensor
    """[T, M] log q at `teacher_draw_ids_TM`."""
    trajectory_T: Tensor
    """[T] int64 index of the trajectory the row belongs to. Its rows are consecutive and in response order."""

    def __post_init__(self) -> None:
        num_rows = len(self.response_ids_T)
        for name, rows in vars(self).items():
            if len(rows) != num_rows:
                raise ShapeError(f"TokenRows.{name} has {len(rows)} rows, response_ids_T has {num_rows}.")
        for ids, *logprobs in (
            ("topk_ids_TK", "topk_logprobs_TK"),
            ("head_ids_TK", "head_behaviour_logprobs_TK", "head_teacher_logprobs_TK"),
            ("draw_ids_TN", "draw_behaviour_logprobs_TN", "draw_teacher_logprobs_TN"),
            ("teacher_draw_ids_TM", "teacher_draw_logprobs_TM"),
        ):
            expected = getattr(self, ids).shape
            for name in logprobs:
                if getattr(self, name).shape != expected:
                    raise ShapeError(f"TokenRows.{name} is {getattr(self, name).shape}, {ids} is {expected}.")

    def __len__(self) -> int:
        return len(self.response_ids_T)

    def select(self, rows: slice | Tensor) -> TokenRows:
        """The given rows, in the given order: a slice, int64 positions, or a bool mask.

        Anything that uses `trajectory_T` (the prefix weight) needs whole trajectories in response order.
        """
        return TokenRows(**{name: values[rows] for name, values in vars(self).items()})

    @classmethod
    def from_scored(cls, batch: Sequence[ScoredTrajectory], device: torch.device | str = "cpu") -> TokenRows:
        """Concatenate the response tokens of `batch`, in its order, on `device`.

        Raises:
            ShapeError: the batch is empty, or its members were cached with different K, N or M.
        """
        if not batch:
            raise ShapeError("an empty batch has no token rows.")
        candidates = [member.trajectory.candidates for member in batch]
        scores = [member.scores for member in batch]

        def ids(name: str, arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic] = np.int64) -> Tensor:
            width = arrays[0].shape[1:]
            for array, member in zip(arrays, batch, strict=True):
                if array.shape[1:] != width:
                    raise ShapeError(
                        f"{name}: index {member.trajectory.index} was cached {array.shape[1:]} wide, index "
                        f"{batch[0].trajectory.index} {width}. One batch needs one width; back-fill the narrower ones."
                    )
            return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

        logprobs = partial(ids, dtype=np.float32)

        return cls(
            response_ids_T=ids("response_ids", [m.trajectory.response_ids for m in batch]),
            behaviour_logprobs_T=logprobs("behaviour_logprobs", [m.trajectory.behaviour_logprobs_T for m in batch]),
            teacher_logprobs_T=logprobs("sampled_logprobs", [s.sampled_logprobs_T for s in scores]),
            topk_ids_TK=ids("topk_ids", [s.topk_ids_TK for s in scores]),
            topk_logprobs_TK=logprobs("topk_logprobs", [s.topk_logprobs_TK for s in scores]),
            head_ids_TK=ids("head_ids", [c.head_ids_TK for c in candidates]),
            head_behaviour_logprobs_TK=logprobs("head_logprobs", [c.head_logprobs_TK for c in candidates]),
            head_teacher_logprobs_TK=logprobs("head_logprobs", [s.head_logprobs_TK for s in scores]),
            tail_logmass_T=logprobs("tail_logmass", [c.tail_logmass_T for c in candidates]),
            draw_ids_TN=ids("draw_ids", [c.draw_ids_TN for c in candidates]),
            draw_behaviour_logprobs_TN=logprobs("draw_logprobs", [c.draw_logprobs_TN for c in candidates]),
            draw_teacher_logprobs_TN=logprobs("draw_logprobs", [s.draw_logprobs_TN for s in scores]),
            teacher_draw_ids_TM=ids("teacher_draw_ids", [s.teacher_draw_ids_TM for s in scores]),
            teacher_draw_logprobs_TM=logprobs("teacher_draw_logprobs", [s.teacher_draw_logprobs_TM for s in scores]),
            trajectory_T=ids("index", [np.full(len(m.trajectory.response_ids), m.trajectory.index) for m in batch]),
        )


@dataclass(frozen=True)
class Support:
    """Ids a divergence sums over, with the teacher's log-probs there."""

    ids_TK: Tensor
    teacher_logprobs_TK: Tensor


def teacher_support(rows: TokenRows, top_k: int) -> Support:
    """The teacher's `top_k` most likely ids."""
    return Support(first_columns("topk_ids", rows.topk_ids_TK, top_k), rows.topk_logprobs_TK[:, :top_k])


def student_support(rows: TokenRows, top_k: int) -> Support:
    """The sampling student's `top_k` most likely ids."""
    return Support(first_columns("head_ids", rows.head_ids_TK, top_k), rows.head_teacher_logprobs_TK[:, :top_k])


def full_support(rows: TokenRows) -> Support:
    """Every id; `check_cache` has made sure that the cached top-k is the vocabulary."""
    return Support(rows.topk_ids_TK, rows.topk_logprobs_TK)


def first_columns(name: str, ids_TK: Tensor, width: int) -> Tensor:
    """[T, width] the first columns. Raises ShapeError when fewer are cached."""
    if ids_TK.shape[1] < width:
        raise ShapeError(f"{name} holds {ids_TK.shape[1]} ids per token, the estimator asks for {width}.")
    return ids_TK[:, :width]


@dataclass(frozen=True)
class Draws:
    """Ids that the sampling student drew i.i.d. from p_old, with both log-probs."""

    ids_TN: Tensor
    behaviour_logprobs_TN: Tensor
    teacher_logprobs_TN: Tensor


def sampled_token(rows: TokenRows) -> Draws:
    """The emitted token as the only draw; every log holds it."""
    return Draws(rows.response_ids_T[:, None], rows.behaviour_logprobs_T[:, None], rows.teacher_logprobs_T[:, None])


def first_draws(rows: TokenRows, num_draws: int) -> Draws:
    """The first `num_draws` cached draws."""
    return Draws(
        first_columns("draw_ids", rows.draw_ids_TN, num_draws),
        rows.draw_behaviour_logprobs_TN[:, :num_draws],
        rows.draw_teacher_logprobs_TN[:, :num_draws],
    )
