"""Estimators that need no draw of the student: divergences on a support, teacher draws, and the supervised losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.errors import ShapeError
from asyncopd.losses.contract import RowLosses, StepContext
from asyncopd.losses.cross_entropy import cross_entropy
from asyncopd.losses.forward_kl import forward_kl
from asyncopd.losses.forward_kl_draws import forward_kl_draws
from asyncopd.losses.npd import npd
from asyncopd.losses.rows import TokenRows

Outcomes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student, teacher) log-probs on a support -> on outcomes; see tails.py."""
Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student, teacher) log-probs [T, K] -> [T]."""


@dataclass(frozen=True)
class Support:
    """Ids a divergence sums over, with the teacher's log-probs there."""

    ids_TK: Tensor
    teacher_logprobs_TK: Tensor


def teacher_support(rows: TokenRows, top_k: int) -> Support:
    """The teacher's `top_k` most likely ids."""
    ids_TK = first_columns("topk_ids", rows.topk_ids_TK, top_k)
    return Support(ids_TK, rows.topk_logprobs_TK[:, :top_k])


def student_support(rows: TokenRows, top_k: int) -> Support:
    """The sampling student's `top_k` most likely ids."""
    ids_TK = first_columns("head_ids", rows.head_ids_TK, top_k)
    return Support(ids_TK, rows.head_teacher_logprobs_TK[:, :top_k])


def full_support(rows: TokenRows) -> Support:
    """Every id; `check_cache` has made sure that the cached top-k is the vocabulary."""
    return Support(rows.topk_ids_TK, rows.topk_logprobs_TK)


def first_columns(name: str, ids_TK: Tensor, width: int) -> Tensor:
    """[T, width] the first columns. Raises ShapeError when fewer are cached."""
    if ids_TK.shape[1] < width:
        raise ShapeError(f"{name} holds {ids_TK.shape[1]} ids per token, the estimator asks for {width}.")
    return ids_TK[:, :width]


class NoStepPass:
    """Base of the estimators that judge every row on its own."""

    needs_step_pass = False

    def step_context(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> StepContext:
        del rows, student_logprobs_TJ
        return StepContext()


@dataclass(frozen=True)
class SupportDivergence(NoStepPass):
    """A divergence on a support: forward and reverse KL, dense or not, generalised JSD, skew KL."""

    support: Callable[[TokenRows], Support]
    outcomes: Outcomes
    divergence: Divergence

    def student_ids(self, rows: TokenRows) -> Tensor:
        return self.support(rows).ids_TK

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        teacher_logprobs_TK = self.support(rows).teacher_logprobs_TK
        loss_T = self.divergence(*self.outcomes(student_logprobs_TJ, teacher_logprobs_TK))
        return RowLosses(loss_T, support_masses(student_logprobs_TJ, teacher_logprobs_TK))


@dataclass(frozen=True)
class TeacherDraws(NoStepPass):
    """Forward KL from the first `num_draws` ids that the teacher drew."""

    num_draws: int

    def student_ids(self, rows: TokenRows) -> Tensor:
        return first_columns("teacher_draw_ids", rows.teacher_draw_ids_TM, self.num_draws)

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        return RowLosses(forward_kl_draws(student_logprobs_TJ, rows.teacher_draw_logprobs_TM[:, : self.num_draws]))


@dataclass(frozen=True)
class CrossEntropy(NoStepPass):
    """Supervised fine-tuning on the response tokens."""

    def student_ids(self, rows: TokenRows) -> Tensor:
        return rows.response_ids_T[:, None]

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        return RowLosses(cross_entropy(student_logprobs_TJ[:, 0]))


@dataclass(frozen=True)
class NearPolicy(NoStepPass):
    """(1−λ)·cross-entropy + λ·forward KL on the teacher's top-k."""

    top_k: int
    outcomes: Outcomes
    kl_weight: float

    def student_ids(self, rows: TokenRows) -> Tensor:
        return torch.cat([rows.response_ids_T[:, None], teacher_support(rows, self.top_k).ids_TK], -1)

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        student_logprobs_TK = student_logprobs_TJ[:, 1:]
        teacher_logprobs_TK = teacher_support(rows, self.top_k).teacher_logprobs_TK
        cross_entropy_T = cross_entropy(student_logprobs_TJ[:, 0])
        kl_T = forward_kl(*self.outcomes(student_logprobs_TK, teacher_logprobs_TK))
        parts = {"loss/cross_entropy_nats": cross_entropy_T.detach(), "loss/topk_kl_nats": kl_T.detach()}
        return RowLosses(
            npd(cross_entropy_T, kl_T, kl_weight=self.kl_weight),
            {**parts, **support_masses(student_logprobs_TK, teacher_logprobs_TK)},
        )


def support_masses(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> dict[str, Tensor]:
    """P_S and Q_S: how much of each distribution the support covers."""
    return {
        "loss/support_mass_student": student_logprobs_TK.detach().exp().sum(-1),
        "loss/support_mass_teacher": teacher_logprobs_TK.exp().sum(-1),
    }
