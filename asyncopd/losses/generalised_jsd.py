"""Generalised Jensen–Shannon divergence between student and teacher, between forward and reverse KL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncopd.losses.forward_kl import forward_kl


def generalised_jsd(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, *, beta: float) -> Tensor:
    """ℓ = β KL(q ‖ m) + (1−β) KL(p_θ ‖ m), m = β q + (1−β) p_θ, over the given outcomes (proper distributions).

    Convention (GKD's): β weighs the teacher. β→0 is forward KL and β→1 reverse KL after division by the vanishing
    factor: ℓ/β → D_F, ℓ/(1−β) → D_R; the loss itself is not rescaled, so a small β needs a larger learning rate.
    β = ½ is the Jensen–Shannon divergence, bounded by ln 2.

    Args:
        student_logprobs_TK: [T, K] nats, with gradient; gradient also flows through m.
        teacher_logprobs_TK: [T, K] nats.
        beta: in (0, 1).
    Returns:
        [T] nats in [0, ln 2], with gradient; one loss per row.
    Source:
        GKD, arXiv 2306.13649, equation 1.
    """
    mixture_TK = torch.logaddexp(teacher_logprobs_TK + math.log(beta), student_logprobs_TK + math.log1p(-beta))
    from_teacher_T = forward_kl(mixture_TK, teacher_logprobs_TK)
    from_student_T = forward_kl(mixture_TK, student_logprobs_TK)
    return beta * from_teacher_T + (1 - beta) * from_student_T
