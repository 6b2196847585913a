"""Forward KL on a set of outcomes: teacher-weighted, covers modes. Knows nothing of p_old, so no staleness bias."""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> Tensor:
    """ℓ = Σ_k q_k (log q_k − log p_θ,k) over the given outcomes.

    With the full vocabulary it is D_F(s) exactly (dense forward KL). On a teacher top-k the tail is the caller's
    choice (tails.py): `bucket` gives a lower bound of D_F, the KL of the coarser K + 1 outcomes, zero at p = q;
    `drop` has the gradient −Σ_S q_k ∇log p_k, which does not vanish at p = q but empties the tail.

    Args:
        student_logprobs_TK: [T, K] nats, with gradient.
        teacher_logprobs_TK: [T, K] nats; −inf means an outcome the teacher excludes, it contributes 0.
    Returns:
        [T] nats, with gradient; one loss per row, not normalised by anything.
    Source:
        GKD, arXiv 2306.13649 (supervised direction); docs/estimators.md 4.1.
    """
    teacher_probs_TK = teacher_logprobs_TK.exp()
    gap_TK = teacher_logprobs_TK - student_logprobs_TK
    return torch.where(teacher_probs_TK > 0, teacher_probs_TK * gap_TK, torch.zeros_like(gap_TK)).sum(-1)
