"""Supervised cross-entropy on the response tokens."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(student_logprobs_T: Tensor) -> Tensor:
    """ℓ = −log p_θ(y_t): plain supervised fine-tuning on the cached responses.

    On the student's own samples its expected gradient at p_θ = p_old is zero: it fits whoever wrote the responses,
    no teacher is involved.

    Args:
        student_logprobs_T: [T] nats, with gradient, at the response ids.
    Returns:
        [T] nats, with gradient; one loss per row.
    """
    return -student_logprobs_T
