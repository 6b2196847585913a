"""Corrections of the importance ratio: each a function of (log ρ, A) that says what takes the place of ρ·A.

All trade bias for variance: outside their region they are the identity, inside it they remove or bound the gradient.
None changes the normalisation: a masked draw still counts in N and its token in the step's token count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.losses.logspace import MAX_LOG_RATIO


@dataclass(frozen=True)
class Corrected:
    """What a correction makes of ρ·A."""

    objective_TN: Tensor
    """[T, N] nats, to be maximised, with gradient."""
    affected_TN: Tensor
    """[T, N] bool: where the gradient differs from that of ρ·A."""


def no_correction(log_ratio_TN: Tensor, advantage_TN: Tensor) -> Corrected:
    """ρ·A itself: gradient ρ A ∇log p_θ."""
    return Corrected(log_ratio_TN.exp() * advantage_TN, torch.zeros_like(advantage_TN, dtype=torch.bool))


def clip(
    log_ratio_TN: Tensor,
    advantage_TN: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float = float("inf"),
) -> Corrected:
    """min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A), and for A < 0 at least c·A (dual clip).

    Where the ratio has already moved in the direction the advantage asks for, beyond the bounds, the term is constant
    and its gradient 0; likewise where A < 0 and ρ > c, which bounds the damage of an exploded ratio.

    Args:
        log_ratio_TN: [T, N] log ρ, with gradient.
        advantage_TN: [T, N] nats, detached.
        epsilon_low: >= 0; from 1 on there is no lower bound.
        epsilon_high: >= 0; infinity for no upper bound.
        dual_clip: c > 1 + ε_high; infinity for none.
    Source:
        PPO, arXiv 1707.06347; asymmetric bounds: DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729.
    """
    ratio_TN = log_ratio_TN.exp()
    value_TN = ratio_TN.detach()
    too_high_TN = (advantage_TN > 0) & (value_TN > 1 + epsilon_high)
    too_low_TN = (advantage_TN < 0) & (value_TN < 1 - epsilon_low)
    exploded_TN = (advantage_TN < 0) & (value_TN > dual_clip)
    bound_TN = torch.full_like(value_TN, 1 + epsilon_high)
    bound_TN = torch.where(too_low_TN, 1 - epsilon_low, bound_TN)
    bound_TN = torch.where(exploded_TN, dual_clip, bound_TN)
    clipped_TN = too_high_TN | too_low_TN | exploded_TN
    return Corrected(torch.where(clipped_TN, bound_TN, ratio_TN) * advantage_TN, clipped_TN)


def decoupled(
    log_ratio_TN: Tensor,
    advantage_TN: Tensor,
    proximal_log_ratio_TN: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    max_behaviour_weight: float,
) -> Corrected:
    """w · min(ρ_prox A, clip(ρ_prox) A) with ρ_prox = p_θ/p_prox and behaviour weight w = p_prox/p_old.

    The trust region is around a proximal snapshot, the student at the start of the learner step, not around the stale
    sampler. Draws whose w exceeds the cap are masked. At the first mini-batch of a step p_prox = p_θ: nothing is
    clipped, and the gradient is that of ρ·A wherever w is within the cap.

    Args:
        log_ratio_TN: [T, N] log(p_θ/p_old), with gradient.
        advantage_TN: [T, N] nats, detached.
        proximal_log_ratio_TN: [T, N] log(p_prox/p_old), detached.
        epsilon_low, epsilon_high: of the clip around the snapshot.
        max_behaviour_weight: cap of w, > 0.
    Source:
        AReaL, arXiv 2505.24298, the decoupled PPO objective.
    """
    weight_TN = proximal_log_ratio_TN.exp().detach()
    masked_TN = weight_TN > max_behaviour_weight
    inner = clip(
        log_ratio_TN - proximal_log_ratio_TN.detach(), advantage_TN, epsilon_low=epsilon_low, epsilon_high=epsilon_high
    )
    objective_TN = torch.where(masked_TN, torch.zeros_like(weight_TN), weight_TN) * inner.objective_TN
    return Corrected(objective_TN, masked_TN | inner.affected_TN)


def truncate(log_ratio_TN: Tensor, advantage_TN: Tensor, *, max_ratio: float) -> Corrected:
    """min(ρ, c)·A with gradient min(ρ, c) A ∇log p_θ: large weights are bounded, not removed.

    Unlike `clip`, a draw beyond c keeps pulling, with weight c.

    Args:
        log_ratio_TN: [T, N] log ρ, with gradient.
        advantage_TN: [T, N] nats, detached.
        max_ratio: c > 0.
    Source:
        Truncated importance sampling: Espeholt et al., IMPALA, arXiv 1802.01561; "TIS" of recent RL frameworks.
    """
    ratio_TN = log_ratio_TN.exp()
    value_TN = ratio_TN.detach()
    scale_TN = (max_ratio / value_TN).clamp(max=1.0)
    return Corrected(ratio_TN * scale_TN * advantage_TN, value_TN > max_ratio)


def mask(log_ratio_TN: Tensor, advantage_TN: Tensor, *, max_ratio: float) -> Corrected:
    """ρ·A where ρ is in [1/c, c], else 0 with gradient 0: draws the two students disagree about are dropped.

    Args:
        log_ratio_TN: [T, N] log ρ, with gradient.
        advantage_TN: [T, N] nats, detached.
        max_ratio: c > 1; above e^20 nothing is masked, since |log ρ| is clamped there.
    Source:
        IcePop, in "Every Step Evolves", arXiv 2510.18855.
    """
    masked_TN = log_ratio_TN.detach().abs() > min(math.log(max_ratio), MAX_LOG_RATIO)
    objective_TN = log_ratio_TN.exp() * advantage_TN
    return Corrected(torch.where(masked_TN, torch.zeros_like(objective_TN), objective_TN), masked_TN)
