"""Forward KL from ids drawn by the teacher: unbiased for any student, however stale the prefix."""

from __future__ import annotations

from torch import Tensor


def forward_kl_draws(student_logprobs_TM: Tensor, teacher_logprobs_TM: Tensor) -> Tensor:
    """ℓ = (1/M) Σ_j (log q(v_j) − log p_θ(v_j)), v_j i.i.d. from q.

    Value unbiased for D_F, gradient −(1/M) Σ_j ∇log p_θ(v_j) unbiased for ∇D_F; the variance of both falls as 1/M.
    M = 1 is supervised training on tokens that the teacher would have written at the student's prefixes. A single
    realisation is not zero at p = q in gradient, only its expectation is.

    Args:
        student_logprobs_TM: [T, M] nats, with gradient, at the drawn ids.
        teacher_logprobs_TM: [T, M] nats, same ids.
    Returns:
        [T] nats, with gradient; one loss per row.
    Source:
        docs/estimators.md 4.2.
    """
    return (teacher_logprobs_TM - student_logprobs_TM).mean(-1)
