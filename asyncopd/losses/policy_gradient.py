"""Reverse KL by policy gradient over N tokens that a stale student drew: advantages, baselines and the surrogate.

The optional weight that corrects the distribution over prefixes, not the one over the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.losses.corrections import Corrected
from asyncopd.losses.logspace import importance_log_ratio


def current_advantage(student_logprobs_TN: Tensor, teacher_logprobs_TN: Tensor) -> Tensor:
    """A_cur = log q − sg[log p_θ], recomputed under the student being trained.

    With the importance ratio it gives exactly ∇D_R in expectation, at any drift.

    Args:
        student_logprobs_TN: [T, N] nats, at the drawn ids.
        teacher_logprobs_TN: [T, N] nats, same ids.
    Returns:
        [T, N] nats, detached; positive where the teacher likes the token more than the student does.
    Source:
        AsyncOPD, arXiv 2606.24143, the recomputed reverse-KL signal.
    """
    return (teacher_logprobs_TN - student_logprobs_TN).detach()


def behaviour_advantage(behaviour_logprobs_TN: Tensor, teacher_logprobs_TN: Tensor) -> Tensor:
    """A_old = log q − log p_old, frozen at sampling time. A baseline for comparison, named as such.

    With the ratio it descends D_R − KL(p_θ‖p_old), linear in p_θ and without an entropy term: on a frozen cache it
    collapses onto argmax q/p_old.

    Args:
        behaviour_logprobs_TN: [T, N] nats, at the drawn ids.
        teacher_logprobs_TN: [T, N] nats, same ids.
    Returns:
        [T, N] nats, detached.
    Source:
        AsyncOPD, arXiv 2606.24143; docs/estimators.md 4.5.
    """
    return (teacher_logprobs_TN - behaviour_logprobs_TN).detach()


def no_baseline(log_ratio_TN: Tensor, advantage_TN: Tensor) -> Tensor:
    """b = 0. [T, N]."""
    del log_ratio_TN
    return advantage_TN.new_zeros(()).expand_as(advantage_TN)


def leave_one_out_baseline(log_ratio_TN: Tensor, advantage_TN: Tensor) -> Tensor:
    """b_j = (1/(N−1)) Σ_{i≠j} ρ_i A_i: an estimate of E_{p_θ}[A] that does not depend on draw j.

    Because E_{p_θ}[∇log p_θ] = 0, subtracting it leaves the expected gradient as it is (with the ratio on).

    Args:
        log_ratio_TN: [T, N] log ρ, N >= 2.
        advantage_TN: [T, N] nats.
    Returns:
        [T, N] nats, detached.
    """
    weighted_TN = (log_ratio_TN.exp() * advantage_TN).detach()
    return (weighted_TN.sum(-1, keepdim=True) - weighted_TN) / (weighted_TN.shape[-1] - 1)


def exact_baseline(student_logprobs_TV: Tensor, teacher_logprobs_TV: Tensor) -> Tensor:
    """b = E_{p_θ}[A_cur] = −D_R(s), from full rows: the value the leave-one-out baseline estimates.

    Args:
        student_logprobs_TV: [T, V] nats, full vocabulary.
        teacher_logprobs_TV: [T, V] nats, same ids.
    Returns:
        [T, 1] nats, detached.
    """
    advantage_TV = teacher_logprobs_TV - student_logprobs_TV
    return (student_logprobs_TV.exp() * advantage_TV).sum(-1, keepdim=True).detach()


@dataclass(frozen=True)
class PolicyGradientLoss:
    """The surrogate per row, and which of its terms the correction changed."""

    loss_T: Tensor
    """[T] nats, with gradient."""
    affected_TN: Tensor
    """[T, N] bool: draws whose gradient the correction changed."""


def policy_gradient(
    log_ratio_TN: Tensor,
    advantage_TN: Tensor,
    baseline_TN: Tensor,
    correct: Callable[[Tensor, Tensor], Corrected],
) -> PolicyGradientLoss:
    """ℓ = −(1/N) Σ_j [ρ_j sg(A_j − b_j) + sg(b_j)], v_j i.i.d. from p_old; gradient flows through ρ only.

    Expected gradient with A_cur, the importance ratio and no correction: E_{p_old}[−ρ A ∇log p_θ] = ∇D_R exactly, for
    every N and drift; variance 1/N per prefix. The detached b is added back so that the value too estimates D_R.
    The correction sees A − b, whose sign decides what counts as harmful.

    Args:
        log_ratio_TN: [T, N] log ρ, clamped, with gradient.
        advantage_TN: [T, N] nats, detached.
        baseline_TN: broadcastable to [T, N], nats, detached, independent of draw j in column j.
        correct: (log ρ, advantage) -> what takes the place of ρ·A; see corrections.py.
    Source:
        AsyncOPD, arXiv 2606.24143; docs/estimators.md 4.5.
    """
    corrected = correct(log_ratio_TN, advantage_TN - baseline_TN)
    return PolicyGradientLoss(-(corrected.objective_TN + baseline_TN).mean(-1), corrected.affected_TN)


@dataclass(frozen=True)
class PrefixWeights:
    weight_T: Tensor
    """[T] in (0, max_weight], detached."""
    truncated_T: Tensor
    """[T] bool: the product exceeded the cap."""


def prefix_weights(
    student_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, trajectory_T: Tensor, *, max_weight: float
) -> PrefixWeights:
    """w_t = min(Π_{s<t} ρ(y_s), c): how much more often the current student would have reached prefix s_t.

    The product runs over the previous tokens of the same response only; the first token has weight 1. Untruncated it
    makes E_{p_old} over prefixes an E_{p_θ}; its variance grows exponentially with t, hence the cap, and hence off by
    default. Rows must be whole trajectories in response order. The summed log is exact to float64.

    Args:
        student_logprobs_T: [T] log p_θ of the sampled tokens, nats; not differentiated.
        behaviour_logprobs_T: [T] log p_old of them, nats.
        trajectory_T: [T] int64, constant over the consecutive rows of a trajectory.
        max_weight: c >= 1.
    """
    log_ratio_T = importance_log_ratio(student_logprobs_T.detach(), behaviour_logprobs_T).double()
    before_T = log_ratio_T.cumsum(0) - log_ratio_T
    _, lengths = torch.unique_consecutive(trajectory_T, return_counts=True)
    first_rows = lengths.cumsum(0) - lengths
    log_product_T = before_T - before_T[first_rows].repeat_interleave(lengths)
    log_cap = torch.tensor(max_weight, dtype=torch.float64).log()
    return PrefixWeights(
        weight_T=log_product_T.clamp(max=log_cap.item()).exp().to(student_logprobs_T.dtype),
        truncated_T=log_product_T > log_cap,
    )
