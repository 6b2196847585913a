"""Reverse KL on a set of outcomes: student-weighted, seeks modes. Exact when the outcomes are the full vocabulary."""

from __future__ import annotations

from torch import Tensor


def reverse_kl(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> Tensor:
    """ℓ = Σ_k p_θ,k (log p_θ,k − log q_k) over the given outcomes.

    Gradient: Σ_k p_k (log p_k − log q_k + 1) ∇log p_k. On the full vocabulary (dense reverse KL) the "+1" cancels,
    because Σ_v ∇p_v = 0; on a partial support it does not, and `drop` leaks mass towards p_k = q_k/e. `bucket`
    (tails.py) restores the cancellation and gives a lower bound of D_R. Both are biased for D_R unless S = V; on a
    stale student's support the bias grows with drift. For teacher or student support, by which ids are passed.

    Args:
        student_logprobs_TK: [T, K] nats, with gradient.
        teacher_logprobs_TK: [T, K] nats, finite: where the teacher excludes an outcome, reverse KL is infinite.
    Returns:
        [T] nats, with gradient; one loss per row, not normalised by anything.
    Source:
        MiniLLM, arXiv 2306.08543, the per-token reverse KL; docs/estimators.md 4.3.
    """
    return (student_logprobs_TK.exp() * (student_logprobs_TK - teacher_logprobs_TK)).sum(-1)
