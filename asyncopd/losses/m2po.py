"""M2PO: a trust region on the second moment of the log-ratio, found over the whole optimizer step.

    micro-batches, ranks --harmful_shifts--> one 1-D tensor --second_moment_threshold--> τ --m2po--> each micro-batch

A per-micro-batch τ would make the loss depend on how the step is split; hence the pass before the step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncopd.losses.corrections import Corrected


def harmful(log_ratio_TN: Tensor, advantage_TN: Tensor) -> Tensor:
    """[T, N] bool: the ratio already moved where the advantage pushes, (A>0 & ρ>1) or (A<0 & ρ<1).

    Only there can importance weighting run away; elsewhere the update brings the policies closer.
    """
    return log_ratio_TN.detach() * advantage_TN.sign() > 0


def harmful_shifts(log_ratio_TN: Tensor, advantage_TN: Tensor) -> Tensor:
    """[H] |δ| = |log p_old − log p_θ| of the harmful draws, detached, any order: all that τ depends on."""
    log_ratio_TN = log_ratio_TN.detach()
    return log_ratio_TN[harmful(log_ratio_TN, advantage_TN)].abs()


def second_moment_threshold(shifts_H: Tensor, *, budget: float) -> float:
    """The largest τ with mean(min(|δ|, τ)²) <= budget over the step's harmful draws; infinity within budget.

    Args:
        shifts_H: [H] |δ| of all harmful draws of the optimizer step, all micro-batches and ranks; may be empty.
        budget: > 0, nats².
    Returns:
        τ in nats, or infinity when nothing needs clipping.
    """
    num_shifts = len(shifts_H)
    if num_shifts == 0:
        return math.inf
    # float64: the sum runs over every draw of a step.
    squares_H = shifts_H.double().square().sort().values
    total = budget * num_shifts
    smaller_sums_H = squares_H.cumsum(0) - squares_H
    num_clipped_H = num_shifts - torch.arange(num_shifts, device=shifts_H.device)
    # Clipping at the i-th smallest |δ| leaves Σ_{<i} δ² + (H − i) δ_i², growing with i: τ is below the first excess.
    exceeds_H = smaller_sums_H + num_clipped_H * squares_H > total
    if not bool(exceeds_H.any()):
        return math.inf
    first = int(exceeds_H.int().argmax())
    return math.sqrt((total - float(smaller_sums_H[first])) / (num_shifts - first))


def m2po(log_ratio_TN: Tensor, advantage_TN: Tensor, *, threshold: float) -> Corrected:
    """ρ·A with |log ρ| of harmful draws clipped at τ: value e^{±τ}·A and gradient 0 beyond it.

    With τ = infinity it is `no_correction`, bit for bit. Any N: a draw is judged on its own.

    Args:
        log_ratio_TN: [T, N] log ρ, with gradient.
        advantage_TN: [T, N] nats, detached.
        threshold: τ of the whole optimizer step, from `second_moment_threshold`.
    Source:
        M2PO, arXiv 2510.01161, as docs/estimators.md 4.5 states it (mean over the harmful set, clip at τ).
    """
    clipped_TN = harmful(log_ratio_TN, advantage_TN) & (log_ratio_TN.detach().abs() > threshold)
    bounded_TN = log_ratio_TN.detach().clamp(-threshold, threshold)
    return Corrected(torch.where(clipped_TN, bounded_TN, log_ratio_TN).exp() * advantage_TN, clipped_TN)
