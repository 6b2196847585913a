"""Skew KL: a KL whose second argument is mixed with the first, so that the log-ratio is bounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncopd.losses.forward_kl import forward_kl


def skew_forward_kl(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, *, alpha: float) -> Tensor:
    """ℓ = KL(q ‖ α q + (1−α) p_θ) over the given outcomes; the mixture is inside the log, ℓ <= −ln α.

    α→0 is forward KL. The gradient of a token that the student all but excludes is bounded by (1−α)/α, where forward
    KL's grows without limit in log p.

    Args:
        student_logprobs_TK: [T, K] nats, with gradient.
        teacher_logprobs_TK: [T, K] nats.
        alpha: weight of the teacher in the mixture, in (0, 1).
    Returns:
        [T] nats, with gradient; one loss per row.
    Source:
        DistiLLM, arXiv 2402.03898, SKL.
    """
    return forward_kl(_mixture(teacher_logprobs_TK, student_logprobs_TK, alpha), teacher_logprobs_TK)


def skew_reverse_kl(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, *, alpha: float) -> Tensor:
    """ℓ = KL(p_θ ‖ α p_θ + (1−α) q) over the given outcomes; gradient flows through both places of p_θ.

    α→0 is reverse KL. Finite also where the teacher excludes a token.

    Args, Returns, Source: as `skew_forward_kl`, with alpha the weight of the student; DistiLLM's SRKL.
    """
    return forward_kl(_mixture(student_logprobs_TK, teacher_logprobs_TK, alpha), student_logprobs_TK)


def _mixture(own_logprobs_TK: Tensor, other_logprobs_TK: Tensor, alpha: float) -> Tensor:
    """log(α own + (1−α) other)."""
    return torch.logaddexp(own_logprobs_TK + math.log(alpha), other_logprobs_TK + math.log1p(-alpha))
