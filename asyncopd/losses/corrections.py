"""The importance ratio and its corrections: each a function of (log ρ, A) that says what takes the place of ρ·A.

All trade bias for variance: outside their region they are the identity, inside it they remove or bound the gradient.
None changes the normalisation: a masked draw still counts in N and its token in the step's token count.

M2PO bounds the second moment of the log-ratio by a threshold that is found over the whole optimizer step, because one
for each micro-batch would make the loss depend on how the step is split:

    micro-batches, ranks --harmful_shifts--> one 1-D tensor --second_moment_threshold--> τ --m2po--> each micro-batch

Everywhere `log_ratio_TN` is [T, N] log ρ with gradient, and `advantage_TN` [T, N] nats, detached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.config.losses import Clip, CorrectionSettings, Decoupled, M2po, Mask, NoCorrection, Truncate
from asyncopd.errors import ConfigError
from asyncopd.losses.contract import StepContext
from asyncopd.metrics import CLIPPED, MASKED, TRUNCATED, Metric

MAX_LOG_RATIO = 20.0
"""|log ρ| is clamped to this before exp: e^20 = 4.9e8 is far beyond use and far from float32's overflow."""


def importance_log_ratio(student_logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """log ρ = log p_θ − log p_old, clamped to ±MAX_LOG_RATIO; gradient flows to the student inside the clamp."""
    return (student_logprobs - behaviour_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


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
    log_ratio_TN: Tensor, advantage_TN: Tensor, *, epsilon_low: float, epsilon_high: float, dual_clip: float = math.inf
) -> Corrected:
    """min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A), and for A < 0 at least c·A (dual clip).

    Where the ratio has already moved in the direction the advantage asks for, beyond the bounds, the term is constant
    and its gradient 0; likewise where A < 0 and ρ > c, which bounds the damage of an exploded ratio.

    Args:
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
    bound_TN = torch.where(exploded_TN, dual_clip, torch.where(too_low_TN, 1 - epsilon_low, bound_TN))
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
    objective_TN = weight_TN.masked_fill(masked_TN, 0) * inner.objective_TN
    return Corrected(objective_TN, masked_TN | inner.affected_TN)


def truncate(log_ratio_TN: Tensor, advantage_TN: Tensor, *, max_ratio: float) -> Corrected:
    """min(ρ, c)·A with gradient min(ρ, c) A ∇log p_θ: large weights are bounded, not removed.

    Unlike `clip`, a draw beyond c keeps pulling, with weight c.

    Args:
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
        max_ratio: c > 1; above e^20 nothing is masked, since |log ρ| is clamped there.
    Source:
        IcePop, in "Every Step Evolves", arXiv 2510.18855.
    """
    masked_TN = log_ratio_TN.detach().abs() > min(math.log(max_ratio), MAX_LOG_RATIO)
    objective_TN = log_ratio_TN.exp() * advantage_TN
    return Corrected(torch.where(masked_TN, torch.zeros_like(objective_TN), objective_TN), masked_TN)


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
        threshold: τ of the whole optimizer step, from `second_moment_threshold`.
    Source:
        M2PO, arXiv 2510.01161, as docs/estimators.md states it (mean over the harmful set, clip at τ).
    """
    clipped_TN = harmful(log_ratio_TN, advantage_TN) & (log_ratio_TN.detach().abs() > threshold)
    bounded_TN = log_ratio_TN.detach().clamp(-threshold, threshold)
    return Corrected(torch.where(clipped_TN, bounded_TN, log_ratio_TN).exp() * advantage_TN, clipped_TN)


@dataclass(frozen=True)
class Correction:
    """A configured correction."""

    correct: Callable[[Tensor, Tensor, StepContext], Corrected]
    """(log ρ, A) [T, N] and what is known of the whole step -> what takes the place of ρ·A."""
    affected: Metric
    """Counts what it changed."""
    needs_step_pass: bool = False


def correction_of(settings: CorrectionSettings) -> Correction:
    """The correction that `settings` describe. Raises ConfigError when there is none for them."""
    options = settings.model_dump(exclude={"name"})
    match settings:
        case NoCorrection():
            return Correction(lambda log_ratio, a, _: no_correction(log_ratio, a), CLIPPED)
        case Clip():
            options["dual_clip"] = settings.dual_clip or math.inf
            return Correction(lambda log_ratio, a, _: clip(log_ratio, a, **options), CLIPPED)
        case Decoupled():
            # One optimizer step per learner step: the snapshot at its start is the student itself.
            return Correction(lambda log_ratio, a, _: decoupled(log_ratio, a, log_ratio.detach(), **options), MASKED)
        case M2po():

            def bounded(log_ratio_TN: Tensor, advantage_TN: Tensor, context: StepContext) -> Corrected:
                threshold = second_moment_threshold(context.required_shifts_H(), **options)
                return m2po(log_ratio_TN, advantage_TN, threshold=threshold)

            return Correction(bounded, CLIPPED, needs_step_pass=True)
        case Truncate():
            return Correction(lambda log_ratio, a, _: truncate(log_ratio, a, **options), TRUNCATED)
        case Mask():
            return Correction(lambda log_ratio, a, _: mask(log_ratio, a, **options), MASKED)
    raise ConfigError(f"loss.correction {settings.name!r} has settings but no function (CONTRIBUTING.md).")
