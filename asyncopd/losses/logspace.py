"""Arithmetic on log-probabilities that stays finite, in value and gradient, at both ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""|log ρ| is clamped to this before exp: e^20 = 4.9e8 is far beyond use and far from float32's overflow."""


def log1mexp(logprobs: Tensor) -> Tensor:
    """log(1 − e^x) for x <= 0: the log-probability of the complement.

    Near 0 it is log(−expm1(x)), below −ln 2 log1p(−e^x) (each loses all digits on the other's side). A probability
    that rounds to 1, or by rounding exceeds it (the log of a sum over the full vocabulary), counts as 1 − eps, so
    that the result is at least log(eps) and the gradient at most 1/eps, finite.

    Args:
        logprobs: any shape, nats; values above −eps are taken as −eps, with zero gradient.
    Returns:
        Same shape, nats, in [log eps, 0].
    Source:
        Mächler, "Accurately computing log(1 − exp(−|a|))", 2012.
    """
    x = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    near_zero = x > -math.log(2.0)
    # Both branches of `where` get a gradient: each must see an argument at which its own is finite.
    by_expm1 = torch.log(-torch.expm1(torch.where(near_zero, x, -math.log(2.0))))
    by_log1p = torch.log1p(-torch.exp(torch.where(near_zero, -math.log(2.0), x)))
    return torch.where(near_zero, by_expm1, by_log1p)


def importance_log_ratio(student_logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """log ρ = log p_θ − log p_old, clamped to ±MAX_LOG_RATIO; gradient flows to the student inside the clamp."""
    return (student_logprobs - behaviour_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def unit_log_ratio(student_logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """log of a ratio that is 1 in value and has ∇log p_θ as gradient: on-policy arithmetic on stale draws, biased.

    `behaviour_logprobs` is unused, so that it can stand in for `importance_log_ratio`.
    """
    del behaviour_logprobs
    return student_logprobs - student_logprobs.detach()
