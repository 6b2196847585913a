"""Forward KL on a set of outcomes: teacher-weighted, covers modes. Knows nothing of p_old, so no staleness bias.

Reverse KL on a set of outcomes: student-weighted, seeks modes. Exact when the outcomes are the full vocabulary.

Generalised Jensen–Shannon divergence between student and teacher, between forward and reverse KL.

Skew KL: a KL whose second argument is mixed with the first, so that the log-ratio is bounded.

What becomes of the mass outside a support S: each function turns log-probs on S into outcomes a KL can be taken of.

All take and return (student, teacher) log-probs [T, K], nats, and pass gradient to the student. On a full support
(K = V) `drop` is exact, because there is no tail.

Forward KL from ids drawn by the teacher: unbiased for any student, however stale the prefix.

Supervised cross-entropy on the response tokens.

Near-policy distillation: cross-entropy on slightly stale, selected responses mixed with a KL to the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncopd.losses.logspace import log1mexp


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


def drop(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Ignore the tail: K outcomes that do not sum to 1, so the result is no divergence.

    Forward KL then pushes the student's tail mass to zero; reverse KL leaks mass out of S, its fixed point on an
    unconstrained support is p = q/e (docs/estimators.md).
    """
    return student_logprobs_TK, teacher_logprobs_TK


def bucket(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> tuple[Tensor, Tensor]:
    """One more outcome that holds the tail, 1 − P_S against 1 − Q_S: proper distributions on K + 1 outcomes.

    Returns:
        Two [T, K + 1]; the last column is log(1 − mass of S), at least log of the dtype's eps.
    """
    return _with_tail(student_logprobs_TK), _with_tail(teacher_logprobs_TK)


def renormalise(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides conditioned on S: the odds inside S are learned, the mass of S is not."""
    return torch.log_softmax(student_logprobs_TK, -1), torch.log_softmax(teacher_logprobs_TK, -1)


def _with_tail(logprobs_TK: Tensor) -> Tensor:
    return torch.cat([logprobs_TK, log1mexp(logprobs_TK.logsumexp(-1, keepdim=True))], -1)


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


def npd(cross_entropy_T: Tensor, kl_T: Tensor, *, kl_weight: float) -> Tensor:
    """ℓ = (1−λ)·CE + λ·KL_topk.

    Not a divergence to the teacher: the cross-entropy part follows the selected responses, so at p = q the gradient is
    (1−λ) times that of supervised training. "NPD (reconstructed)": the paper's text is not public in detail.

    Args:
        cross_entropy_T: [T] nats, with gradient (cross_entropy.py).
        kl_T: [T] nats, with gradient: forward KL on the teacher's top-k (forward_kl.py, tails.py).
        kl_weight: λ in [0, 1].
    Returns:
        [T] nats, with gradient; one loss per row.
    Source:
        docs/estimators.md 4.6.
    """
    return (1 - kl_weight) * cross_entropy_T + kl_weight * kl_T
