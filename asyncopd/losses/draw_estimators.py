"""Estimators of reverse KL from draws of a stale student: policy gradient, exact head + sampled tail, prefix weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asyncopd.errors import ShapeError
from asyncopd.losses.contract import Estimator, RowLosses, StepContext
from asyncopd.losses.corrections import Corrected
from asyncopd.losses.head_tail import head_tail
from asyncopd.losses.m2po import harmful_shifts
from asyncopd.losses.policy_gradient import exact_baseline, policy_gradient
from asyncopd.losses.prefix_weight import prefix_weights
from asyncopd.losses.rows import TokenRows
from asyncopd.losses.support_estimators import (
    NoStepPass,
    first_columns,
    full_support,
    support_masses,
    teacher_support,
)


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


class Baseline(Protocol):
    """What is subtracted from the advantage, and the ids beyond the draws that it wants to see."""

    def student_ids(self, rows: TokenRows) -> Tensor: ...

    def __call__(
        self, rows: TokenRows, student_logprobs_TJ: Tensor, log_ratio_TN: Tensor, advantage_TN: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class DrawBaseline:
    """A baseline made of the draws themselves."""

    function: Callable[[Tensor, Tensor], Tensor]

    def student_ids(self, rows: TokenRows) -> Tensor:
        return rows.response_ids_T[:, None][:, :0]

    def __call__(
        self, rows: TokenRows, student_logprobs_TJ: Tensor, log_ratio_TN: Tensor, advantage_TN: Tensor
    ) -> Tensor:
        return self.function(log_ratio_TN, advantage_TN)


@dataclass(frozen=True)
class ExactBaseline:
    """−D_R from the teacher's full rows."""

    def student_ids(self, rows: TokenRows) -> Tensor:
        return full_support(rows).ids_TK

    def __call__(
        self, rows: TokenRows, student_logprobs_TJ: Tensor, log_ratio_TN: Tensor, advantage_TN: Tensor
    ) -> Tensor:
        return exact_baseline(student_logprobs_TJ, full_support(rows).teacher_logprobs_TK)


@dataclass(frozen=True)
class _Terms:
    log_ratio_TN: Tensor
    advantage_TN: Tensor
    baseline_TN: Tensor


@dataclass(frozen=True)
class PolicyGradient:
    """Reverse KL by policy gradient; its parts are chosen by `build_estimator`."""

    draws: Callable[[TokenRows], Draws]
    log_ratio: Callable[[Tensor, Tensor], Tensor]
    """(student, behaviour) log-probs -> log of the weight through which the gradient flows."""
    advantage: Callable[[Tensor, Draws], Tensor]
    baseline: Baseline
    correct: Callable[[Tensor, Tensor, StepContext], Corrected]
    needs_step_pass: bool
    affected_key: str
    """Name of the statistic that counts what the correction changed."""

    def student_ids(self, rows: TokenRows) -> Tensor:
        return torch.cat([self.draws(rows).ids_TN, self.baseline.student_ids(rows)], -1)

    def step_context(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> StepContext:
        if not self.needs_step_pass:
            return StepContext()
        terms = self._terms(rows, student_logprobs_TJ.detach())
        return StepContext(harmful_shifts(terms.log_ratio_TN, terms.advantage_TN - terms.baseline_TN))

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        terms = self._terms(rows, student_logprobs_TJ)
        surrogate = policy_gradient(
            terms.log_ratio_TN,
            terms.advantage_TN,
            terms.baseline_TN,
            lambda log_ratio_TN, advantage_TN: self.correct(log_ratio_TN, advantage_TN, context),
        )
        ratio_TN = terms.log_ratio_TN.detach().exp()
        affected_T = surrogate.affected_TN.to(ratio_TN.dtype).mean(-1)
        return RowLosses(surrogate.loss_T, {self.affected_key: affected_T}, {"loss/max_ratio": ratio_TN.amax(-1)})

    def _terms(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> _Terms:
        draws = self.draws(rows)
        num_draws = draws.ids_TN.shape[1]
        student_logprobs_TN = student_logprobs_TJ[:, :num_draws]
        log_ratio_TN = self.log_ratio(student_logprobs_TN, draws.behaviour_logprobs_TN)
        advantage_TN = self.advantage(student_logprobs_TN, draws)
        baseline_TN = self.baseline(rows, student_logprobs_TJ[:, num_draws:], log_ratio_TN, advantage_TN)
        return _Terms(log_ratio_TN, advantage_TN, baseline_TN)


@dataclass(frozen=True)
class HeadTail(NoStepPass):
    """Exact head + sampled tail, optionally with the teacher's top-k joined to the head."""

    head: int
    num_draws: int
    teacher_top_k: int

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
        result = head_tail(
            head_student_TK,
            head_teacher_TK,
            tail_student_TN,
            draws.behaviour_logprobs_TN,
            draws.teacher_logprobs_TN,
            rows.tail_logmass_T,
            in_head_TK=~repeats_TK,
            in_tail_TN=~_contains(head_ids_TK, draws.ids_TN),
        )
        minus_inf = torch.full_like(head_teacher_TK, -torch.inf)
        masses = support_masses(
            torch.where(repeats_TK, minus_inf, head_student_TK), torch.where(repeats_TK, minus_inf, head_teacher_TK)
        )
        return RowLosses(result.loss_T, masses, {"loss/max_ratio": result.max_ratio_T})


@dataclass(frozen=True)
class PrefixWeighted:
    """Another estimator, each row weighted by how much likelier the current student is to reach its prefix."""

    inner: Estimator
    max_weight: float

    @property
    def needs_step_pass(self) -> bool:
        return self.inner.needs_step_pass

    def student_ids(self, rows: TokenRows) -> Tensor:
        return torch.cat([rows.response_ids_T[:, None], self.inner.student_ids(rows)], -1)

    def step_context(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> StepContext:
        return self.inner.step_context(rows, student_logprobs_TJ[:, 1:])

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        losses = self.inner(rows, student_logprobs_TJ[:, 1:], context)
        weights = prefix_weights(
            student_logprobs_TJ[:, 0], rows.behaviour_logprobs_T, rows.trajectory_T, max_weight=self.max_weight
        )
        statistics_T = {
            **losses.statistics_T,
            "loss/prefix_weight": weights.weight_T,
            "loss/prefix_truncated_fraction": weights.truncated_T.to(weights.weight_T.dtype),
        }
        return RowLosses(losses.loss_T * weights.weight_T, statistics_T, losses.maxima_T)


def _contains(set_TK: Tensor, ids_TN: Tensor) -> Tensor:
    """[T, N] bool: is the id among the row's set?"""
    return (ids_TN[:, :, None] == set_TK[:, None, :]).any(-1)
