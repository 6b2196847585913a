"""Reverse KL by policy gradient over N tokens that a stale student drew: advantages, baselines and the surrogate.
And the weight of prefixes, which any on-policy estimator may have around it.

Log-probs are [T, N] nats at the drawn ids, the student's with gradient; advantages and baselines are detached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.config.losses import PolicyGradientConfig
from asyncopd.losses.contract import Estimator, RowLosses, StepContext, estimator_of
from asyncopd.losses.corrections import Corrected, Correction, correction_of, harmful_shifts, importance_log_ratio
from asyncopd.losses.rows import Draws, TokenRows, first_draws, full_support, sampled_token
from asyncopd.metrics import MAX_RATIO, PREFIX_TRUNCATED, PREFIX_WEIGHT


def advantage(own_logprobs_TN: Tensor, teacher_logprobs_TN: Tensor) -> Tensor:
    """A = log q − sg[log p]: positive where the teacher likes the token more than the student does.

    Under the student being trained, p = p_θ, it is A_cur: with the importance ratio exactly ∇D_R in expectation, at any
    drift. Under the sampler, p = p_old, it is A_old, frozen at sampling time; a baseline for comparison. With the ratio
    that descends D_R − KL(p_θ‖p_old), linear in p_θ and without an entropy term: on a frozen cache it collapses onto
    argmax q/p_old.

    Source:
        AsyncOPD, arXiv 2606.24143, the recomputed reverse-KL signal; docs/estimators.md.
    """
    return (teacher_logprobs_TN - own_logprobs_TN).detach()


def leave_one_out_baseline(log_ratio_TN: Tensor, advantage_TN: Tensor) -> Tensor:
    """b_j = (1/(N−1)) Σ_{i≠j} ρ_i A_i: an estimate of E_{p_θ}[A] that does not depend on draw j.

    Because E_{p_θ}[∇log p_θ] = 0, subtracting it leaves the expected gradient as it is (with the ratio on). N >= 2.
    """
    weighted_TN = (log_ratio_TN.exp() * advantage_TN).detach()
    return (weighted_TN.sum(-1, keepdim=True) - weighted_TN) / (weighted_TN.shape[-1] - 1)


def exact_baseline(student_logprobs_TV: Tensor, teacher_logprobs_TV: Tensor) -> Tensor:
    """b = E_{p_θ}[A_cur] = −D_R(s) [T, 1], from rows over the full vocabulary: what leave-one-out estimates."""
    advantage_TV = teacher_logprobs_TV - student_logprobs_TV
    return (student_logprobs_TV.exp() * advantage_TV).sum(-1, keepdim=True).detach()


def policy_gradient(
    log_ratio_TN: Tensor, advantage_TN: Tensor, baseline_TN: Tensor, correct: Callable[[Tensor, Tensor], Corrected]
) -> tuple[Tensor, Tensor]:
    """ℓ = −(1/N) Σ_j [ρ_j sg(A_j − b_j) + sg(b_j)], v_j i.i.d. from p_old; gradient flows through ρ only.

    Expected gradient with A_cur, the importance ratio and no correction: E_{p_old}[−ρ A ∇log p_θ] = ∇D_R exactly, for
    every N and drift; variance 1/N per prefix. The detached b is added back so that the value too estimates D_R.
    The correction sees A − b, whose sign decides what counts as harmful.

    Args:
        log_ratio_TN: [T, N] log ρ, clamped, with gradient.
        advantage_TN: [T, N] nats, detached.
        baseline_TN: broadcastable to [T, N], nats, detached, independent of draw j in column j.
        correct: (log ρ, advantage) -> what takes the place of ρ·A; see corrections.py.
    Returns:
        Loss [T], nats, with gradient; and [T, N] bool, the draws whose gradient the correction changed.
    Source:
        AsyncOPD, arXiv 2606.24143; docs/estimators.md.
    """
    corrected = correct(log_ratio_TN, advantage_TN - baseline_TN)
    return -(corrected.objective_TN + baseline_TN).mean(-1), corrected.affected_TN


@dataclass(frozen=True)
class PolicyGradient(Estimator):
    """The surrogate on cached draws, its parts chosen by the settings."""

    settings: PolicyGradientConfig
    correction: Correction

    @property
    def needs_step_pass(self) -> bool:
        return self.correction.needs_step_pass

    def num_sampled(self, num_ids: int) -> int:
        return num_ids

    def student_ids(self, rows: TokenRows) -> Tensor:
        ids_TN = self._draws(rows).ids_TN
        # The exact baseline looks at every id, behind the draws.
        return torch.cat([ids_TN, full_support(rows).ids_TK], -1) if self.settings.baseline == "exact" else ids_TN

    def step_context(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> StepContext:
        if not self.needs_step_pass:
            return StepContext()
        log_ratio_TN, advantage_TN, baseline_TN = self._terms(rows, student_logprobs_TJ.detach())
        return StepContext(harmful_shifts(log_ratio_TN, advantage_TN - baseline_TN))

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        log_ratio_TN, advantage_TN, baseline_TN = self._terms(rows, student_logprobs_TJ)
        loss_T, affected_TN = policy_gradient(
            log_ratio_TN, advantage_TN, baseline_TN, lambda log_ratio, a: self.correction.correct(log_ratio, a, context)
        )
        ratio_TN = log_ratio_TN.detach().exp()
        affected_T = affected_TN.to(ratio_TN.dtype).mean(-1)
        return RowLosses(loss_T, {self.correction.affected: affected_T, MAX_RATIO: ratio_TN.amax(-1)})

    def _draws(self, rows: TokenRows) -> Draws:
        num_draws = self.settings.num_draws
        return sampled_token(rows) if num_draws == 1 else first_draws(rows, num_draws)

    def _terms(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log ρ, advantage and baseline."""
        draws, num_draws = self._draws(rows), self.settings.num_draws
        student_TN, all_student_TV = student_logprobs_TJ[:, :num_draws], student_logprobs_TJ[:, num_draws:]
        if self.settings.ratio == "importance":
            log_ratio_TN = importance_log_ratio(student_TN, draws.behaviour_logprobs_TN)
        else:  # A ratio of 1 with ∇log p_θ as gradient: on-policy arithmetic on stale draws, biased.
            log_ratio_TN = student_TN - student_TN.detach()
        own_TN = student_TN if self.settings.advantage == "current" else draws.behaviour_logprobs_TN
        advantage_TN = advantage(own_TN, draws.teacher_logprobs_TN)
        match self.settings.baseline:
            case "none":
                baseline_TN = torch.zeros_like(advantage_TN)
            case "leave_one_out":
                baseline_TN = leave_one_out_baseline(log_ratio_TN, advantage_TN)
            case "exact":
                baseline_TN = exact_baseline(all_student_TV, full_support(rows).teacher_logprobs_TK)
        return log_ratio_TN, advantage_TN, baseline_TN


@estimator_of.register
def _(settings: PolicyGradientConfig) -> Estimator:
    return PolicyGradient(settings, correction_of(settings.correction))


# -- weights of prefixes ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PrefixWeighted(Estimator):
    """Another estimator, each row weighted by how much likelier the current student is to reach its prefix."""

    inner: Estimator
    max_weight: float

    @property
    def needs_step_pass(self) -> bool:
        return self.inner.needs_step_pass

    def num_sampled(self, num_ids: int) -> int:
        return 1 + self.inner.num_sampled(num_ids - 1)

    def student_ids(self, rows: TokenRows) -> Tensor:
        return torch.cat([rows.response_ids_T[:, None], self.inner.student_ids(rows)], -1)

    def step_context(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> StepContext:
        return self.inner.step_context(rows, student_logprobs_TJ[:, 1:])

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        losses = self.inner(rows, student_logprobs_TJ[:, 1:], context)
        weight_T, truncated_T = prefix_weights(
            student_logprobs_TJ[:, 0], rows.behaviour_logprobs_T, rows.trajectory_T, max_weight=self.max_weight
        )
        own = {PREFIX_WEIGHT: weight_T, PREFIX_TRUNCATED: truncated_T.to(weight_T.dtype)}
        return RowLosses(losses.loss_T * weight_T, {**losses.statistics_T, **own})


def prefix_weights(
    student_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, trajectory_T: Tensor, *, max_weight: float
) -> tuple[Tensor, Tensor]:
    """w_t = min(Π_{s<t} ρ(y_s), c): how much more often the current student would have reached prefix s_t.

    The product runs over the previous tokens of the same response only; the first token has weight 1. Untruncated it
    makes E_{p_old} over prefixes an E_{p_θ}; its variance grows exponentially with t, hence the cap, and hence off by
    default. Rows must be whole trajectories in response order. The summed log is exact to float64.

    Args:
        student_logprobs_T: [T] log p_θ of the sampled tokens, nats; not differentiated.
        behaviour_logprobs_T: [T] log p_old of them, nats.
        trajectory_T: [T] int64, constant over the consecutive rows of a trajectory.
        max_weight: c >= 1.
    Returns:
        Weights [T] in (0, max_weight], detached; and [T] bool, where the product exceeded the cap.
    """
    log_ratio_T = importance_log_ratio(student_logprobs_T.detach(), behaviour_logprobs_T).double()
    before_T = log_ratio_T.cumsum(0) - log_ratio_T
    _, lengths = torch.unique_consecutive(trajectory_T, return_counts=True)
    first_rows = lengths.cumsum(0) - lengths
    log_product_T = before_T - before_T[first_rows].repeat_interleave(lengths)
    log_cap = torch.tensor(max_weight, dtype=torch.float64).log()
    weight_T = log_product_T.clamp(max=log_cap.item()).exp().to(student_logprobs_T.dtype)
    return weight_T, log_product_T > log_cap
