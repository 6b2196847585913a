"""How far the sampling student and the trained one have drifted apart, from their log-probs on the sampled tokens.

Row-wise quantities are averaged over a step's tokens; the effective sample size and percentiles need all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncopd.losses.logspace import importance_log_ratio


def drift_k3(student_logprobs_T: Tensor, behaviour_logprobs_T: Tensor) -> Tensor:
    """[T] nats >= 0, detached; its mean estimates the drift KL(p_old‖p_θ) under samples of p_old.

    k3: with r = log p_old − log p_θ, e^{−r} + r − 1. Unbiased, because E_{p_old}[e^{−r}] = 1, never negative, and of
    far smaller variance than r itself.

    Source:
        J. Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio_T = importance_log_ratio(student_logprobs_T.detach(), behaviour_logprobs_T)
    # expm1: at drift 1e-6 the terms of e^{-r} + r − 1 cancel to nothing in float32.
    return torch.expm1(log_ratio_T) - log_ratio_T


def teacher_kl(student_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, teacher_logprobs_T: Tensor) -> Tensor:
    """[T] nats, detached; its mean estimates KL(p_θ‖q) under samples of p_old: ρ·(e^a − a − 1), a = log q − log p_θ.

    k3 under importance weights: unbiased at any drift, never negative.
    """
    student_logprobs_T = student_logprobs_T.detach()
    ratio_T = importance_log_ratio(student_logprobs_T, behaviour_logprobs_T).exp()
    advantage_T = importance_log_ratio(teacher_logprobs_T, student_logprobs_T)
    return ratio_T * (torch.expm1(advantage_T) - advantage_T)


def effective_sample_size(log_ratio_T: Tensor) -> float:
    """(Σρ)²/Σρ² / T in (0, 1]: the fraction of the samples that an on-policy batch as informative would need.

    Args:
        log_ratio_T: [T] log ρ of the sampled tokens of the whole step, T >= 1.
    """
    log_ratio_T = log_ratio_T.detach().double()
    log_ess = 2 * log_ratio_T.logsumexp(0) - (2 * log_ratio_T).logsumexp(0)
    return float(log_ess.exp()) / len(log_ratio_T)


def ratio_percentiles(log_ratio_T: Tensor, percentiles: tuple[float, ...] = (1.0, 50.0, 99.0)) -> dict[float, float]:
    """Percentile in [0, 100] -> ρ at it, linear between neighbours of log ρ.

    Args:
        log_ratio_T: [T] log ρ of the sampled tokens of the whole step, T >= 1.
    """
    # Not torch.quantile: it refuses more than 16 million elements.
    ordered_T = log_ratio_T.detach().double().sort().values
    values: dict[float, float] = {}
    for percentile in percentiles:
        position = percentile / 100 * (len(ordered_T) - 1)
        low = int(position)
        high = min(low + 1, len(ordered_T) - 1)
        value = torch.lerp(ordered_T[low], ordered_T[high], position - low)
        values[percentile] = float(value.exp())
    return values
