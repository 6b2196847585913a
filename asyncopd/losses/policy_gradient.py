"""Reverse KL by policy gradient over N tokens that a stale student drew: advantages, baselines and the surrogate.

Log-probs are [T, N] nats at the drawn ids, the student's with gradient; advantages and baselines are detached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.config.losses import PolicyGradientConfig
from asyncopd.losses.contract import Estimator, RowLosses, StepContext, estimator_of
from asyncopd.losses.corrections import Corrected, Correction, correction_of, harmful_shifts
from asyncopd.losses.logspace import importance_log_ratio, unit_log_ratio
from asyncopd.losses.rows import Draws, TokenRows, first_draws, full_support, sampled_token
from asyncopd.metrics import MAX_RATIO


def current_advantage(student_logprobs_TN: Tensor, teacher_logprobs_TN: Tensor) -> Tensor:
    """A_cur = log q − sg[log p_θ], recomputed under the student being trained.

    With the importance ratio it gives exactly ∇D_R in expectation, at any drift.

    Positive where the teacher likes the token more than the student does.

    Source:
        AsyncOPD, arXiv 2606.24143, the recomputed reverse-KL signal.
    """
    return (teacher_logprobs_TN - student_logprobs_TN).detach()


def behaviour_advantage(behaviour_logprobs_TN: Tensor, teacher_logprobs_TN: Tensor) -> Tensor:
    """A_old = log q − log p_old, frozen at sampling time. A baseline for comparison, named as such.

    With the ratio it descends D_R − KL(p_θ‖p_old), linear in p_θ and without an entropy term: on a frozen cache it
    collapses onto argmax q/p_old.

    Source:
        AsyncOPD, arXiv 2606.24143; docs/estimators.md.
    """
    return (teacher_logprobs_TN - behaviour_logprobs_TN).detach()


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
        log_ratio = importance_log_ratio if self.settings.ratio == "importance" else unit_log_ratio
        log_ratio_TN = log_ratio(student_TN, draws.behaviour_logprobs_TN)
        match self.settings.advantage:
            case "current":
                advantage_TN = current_advantage(student_TN, draws.teacher_logprobs_TN)
            case "behaviour":
                advantage_TN = behaviour_advantage(draws.behaviour_logprobs_TN, draws.teacher_logprobs_TN)
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
