"""Exact head + sampled tail: reverse KL summed exactly where the mass is, estimated without bias where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.config.losses import HeadTailConfig
from asyncopd.errors import ShapeError
from asyncopd.losses.contract import Estimator, RowLosses, StepContext, estimator_of
from asyncopd.losses.corrections import importance_log_ratio
from asyncopd.losses.divergences import support_masses
from asyncopd.losses.rows import TokenRows, first_draws, teacher_support
from asyncopd.metrics import MAX_RATIO


def head_tail(
    head_student_logprobs_TK: Tensor,
    head_teacher_logprobs_TK: Tensor,
    tail_student_logprobs_TN: Tensor,
    tail_behaviour_logprobs_TN: Tensor,
    tail_teacher_logprobs_TN: Tensor,
    tail_logmass_T: Tensor,
    *,
    in_head_TK: Tensor,
    in_tail_TN: Tensor,
) -> tuple[Tensor, Tensor]:
    """A surrogate whose gradient is unbiased for ∇D_R at any drift, with d = log p_θ − log q (nats) and d − b detached:

        ℓ = Σ_{v∈H} p_θ(v)(d(v) − b) + (P_old(H^c)/n) Σ_i ρ(v_i)(d(v_i) − b) + b,   v_i ~ p_old restricted to H^c

        b = Σ_H p_θ d / Σ_H p_θ  (detached)

    ∇ℓ = ĝ of docs/estimators.md, since ∇p_θ = p_θ ∇log p_θ and ∇ρ = ρ ∇log p_θ. Any b that does not depend on the
    draws leaves E[ĝ] = ∇D_R; this one makes the head a proper KL inside itself. The value is unbiased for D_R too.

    The head may be larger than the set the draws avoid (the teacher's top-k joined to the sampler's): a draw that
    falls into the joined head then counts 0 (`in_tail_TN`), which keeps the sum over the rest unbiased.
    Needs p_old > 0 wherever p_θ is: under truncated sampling (top-p < 1) an id that entered the nucleus is never drawn.

    Args:
        head_student_logprobs_TK: [T, K] with gradient; K >= 1, fixed before any draw.
        head_teacher_logprobs_TK: [T, K] same ids.
        tail_student_logprobs_TN: [T, N] with gradient, at the draws.
        tail_behaviour_logprobs_TN: [T, N] log p_old at the draws (not renormalised on the tail).
        tail_teacher_logprobs_TN: [T, N] log q at the draws.
        tail_logmass_T: [T] log P_old of the set the draws came from; −inf where it is empty.
        in_head_TK: [T, K] bool, False for a column that repeats another one.
        in_tail_TN: [T, N] bool, False for a draw that is in the head.
    Returns:
        Loss [T], nats, with gradient, not normalised by anything; and the largest p_θ/p_old among the tail draws, [T],
        detached: large where p_θ grew in a tail that p_old neglected.
    Source:
        This project; docs/estimators.md.
    """
    head_logprobs_TK = torch.where(in_head_TK, head_student_logprobs_TK, -torch.inf)
    gap_TK = (head_student_logprobs_TK - head_teacher_logprobs_TK).detach()
    baseline_T1 = (torch.softmax(head_logprobs_TK.detach(), -1) * gap_TK).sum(-1, keepdim=True)
    head_T = (head_logprobs_TK.exp() * (gap_TK - baseline_T1)).sum(-1)

    # A tail of mass 0 has no draws; what stands in their columns must not reach the loss, not even as 0 · inf.
    counts_TN = in_tail_TN & torch.isfinite(tail_logmass_T)[:, None]
    log_ratio_TN = importance_log_ratio(tail_student_logprobs_TN, tail_behaviour_logprobs_TN)
    gap_TN = (tail_student_logprobs_TN - tail_teacher_logprobs_TN).detach() - baseline_T1
    weight_TN = torch.where(counts_TN, log_ratio_TN.exp(), 0.0)
    tail_T = tail_logmass_T.exp() * (weight_TN * torch.where(counts_TN, gap_TN, 0.0)).mean(-1)
    return head_T + tail_T + baseline_T1[:, 0], weight_TN.detach().amax(-1)


@dataclass(frozen=True)
class HeadTail(Estimator):
    """Exact head + sampled tail, optionally with the teacher's top-k joined to the head."""

    head: int
    num_draws: int
    teacher_top_k: int

    def num_sampled(self, num_ids: int) -> int:
        return num_ids

    def student_ids(self, rows: TokenRows) -> Tensor:
        if rows.head_ids_TK.shape[1] != self.head:
            raise ShapeError(
                f"head_ids holds {rows.head_ids_TK.shape[1]} ids per token, and the tail draws avoid all of them; the "
                f"estimator asks for a head of {self.head}."
            )
        draws = first_draws(rows, self.num_draws)
        return torch.cat([rows.head_ids_TK, teacher_support(rows, self.teacher_top_k).ids_TK, draws.ids_TN], -1)

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        draws, teacher = first_draws(rows, self.num_draws), teacher_support(rows, self.teacher_top_k)
        head_ids_TK = torch.cat([rows.head_ids_TK, teacher.ids_TK], -1)
        width = head_ids_TK.shape[1]
        head_student_TK, tail_student_TN = student_logprobs_TJ[:, :width], student_logprobs_TJ[:, width:]
        head_teacher_TK = torch.cat([rows.head_teacher_logprobs_TK, teacher.teacher_logprobs_TK], -1)
        repeats_TK = torch.zeros_like(head_ids_TK, dtype=torch.bool)
        repeats_TK[:, self.head :] = _contains(rows.head_ids_TK, teacher.ids_TK)
        loss_T, max_ratio_T = head_tail(
            head_student_TK,
            head_teacher_TK,
            tail_student_TN,
            draws.behaviour_logprobs_TN,
            draws.teacher_logprobs_TN,
            rows.tail_logmass_T,
            in_head_TK=~repeats_TK,
            in_tail_TN=~_contains(head_ids_TK, draws.ids_TN),
        )
        masses = support_masses(*(torch.where(repeats_TK, -torch.inf, at) for at in (head_student_TK, head_teacher_TK)))
        return RowLosses(loss_T, {**masses, MAX_RATIO: max_ratio_T})


def _contains(set_TK: Tensor, ids_TN: Tensor) -> Tensor:
    """[T, N] bool: is the id among the row's set?"""
    return (ids_TN[:, :, None] == set_TK[:, None, :]).any(-1)


@estimator_of.register
def _(settings: HeadTailConfig) -> Estimator:
    return HeadTail(settings.head, settings.num_draws, settings.teacher_top_k)
