"""Estimators that need no draw of the student: divergences on a support, teacher draws, and the supervised losses.

Estimators of reverse KL from draws of a stale student: policy gradient, exact head + sampled tail, prefix weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asyncopd.errors import ShapeError
from asyncopd.losses.contract import Estimator, RowLosses, StepContext
from asyncopd.losses.corrections import Corrected, harmful_shifts
from asyncopd.losses.divergences import cross_entropy, forward_kl, forward_kl_draws, npd
from asyncopd.losses.head_tail import head_tail
from asyncopd.losses.policy_gradient import exact_baseline, policy_gradient, prefix_weights
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
