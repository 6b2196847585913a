"""Divergences that need no draw of the student: on a support, on the teacher's draws, and the supervised losses.

    cached log q on S, log p_θ on S --tail: bucket, drop, renormalise--> outcomes --divergence--> loss per row [T]

Divergences and tails take (student, teacher) log-probs [T, K], nats, at the same ids, and pass gradient to the student.
A loss is [T] nats, one per row, not normalised by anything. On a full support (K = V) the tail `drop` is exact,
because there is none. The bindings to their settings stand at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from asyncopd.config import losses as c
from asyncopd.losses.contract import Estimator, RowLosses, StepContext, estimator_of
from asyncopd.losses.rows import Support, TokenRows, first_columns, full_support, student_support, teacher_support
from asyncopd.metrics import CROSS_ENTROPY, SUPPORT_MASS_STUDENT, SUPPORT_MASS_TEACHER, TOPK_KL, Metric

Outcomes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student, teacher) log-probs on a support -> on outcomes."""
Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student, teacher) log-probs [T, K] -> [T]."""


def forward_kl(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> Tensor:
    """ℓ = Σ_k q_k (log q_k − log p_θ,k) over the given outcomes.

    With the full vocabulary it is D_F(s) exactly (dense forward KL). On a teacher top-k the tail is the caller's
    choice (below): `bucket` gives a lower bound of D_F, the KL of the coarser K + 1 outcomes, zero at p = q;
    `drop` has the gradient −Σ_S q_k ∇log p_k, which does not vanish at p = q but empties the tail. An outcome that
    the teacher excludes (−inf) contributes 0.

    Source:
        GKD, arXiv 2306.13649 (supervised direction); docs/estimators.md.
    """
    teacher_probs_TK = teacher_logprobs_TK.exp()
    gap_TK = teacher_logprobs_TK - student_logprobs_TK
    return torch.where(teacher_probs_TK > 0, teacher_probs_TK * gap_TK, torch.zeros_like(gap_TK)).sum(-1)


def reverse_kl(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> Tensor:
    """ℓ = Σ_k p_θ,k (log p_θ,k − log q_k) over the given outcomes.

    Gradient: Σ_k p_k (log p_k − log q_k + 1) ∇log p_k. On the full vocabulary (dense reverse KL) the "+1" cancels,
    because Σ_v ∇p_v = 0; on a partial support it does not, and `drop` leaks mass towards p_k = q_k/e. `bucket`
    (below) restores the cancellation and gives a lower bound of D_R. Both are biased for D_R unless S = V; on a
    stale student's support the bias grows with drift. For teacher or student support, by which ids are passed. The
    teacher's log-probs are finite: where it excludes an outcome, reverse KL is infinite.

    Source:
        MiniLLM, arXiv 2306.08543, the per-token reverse KL; docs/estimators.md.
    """
    return (student_logprobs_TK.exp() * (student_logprobs_TK - teacher_logprobs_TK)).sum(-1)


def generalised_jsd(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, *, beta: float) -> Tensor:
    """ℓ = β KL(q ‖ m) + (1−β) KL(p_θ ‖ m), m = β q + (1−β) p_θ, over the given outcomes (proper distributions).

    Convention (GKD's): β weighs the teacher. β→0 is forward KL and β→1 reverse KL after division by the vanishing
    factor: ℓ/β → D_F, ℓ/(1−β) → D_R; the loss itself is not rescaled, so a small β needs a larger learning rate.
    β = ½ is the Jensen–Shannon divergence, bounded by ln 2.

    Gradient also flows through m. The loss is in [0, ln 2].

    Source:
        GKD, arXiv 2306.13649, equation 1.
    """
    mixture_TK = _mixture(teacher_logprobs_TK, student_logprobs_TK, beta)
    from_teacher_T = forward_kl(mixture_TK, teacher_logprobs_TK)
    from_student_T = forward_kl(mixture_TK, student_logprobs_TK)
    return beta * from_teacher_T + (1 - beta) * from_student_T


def skew_kl(own_logprobs_TK: Tensor, other_logprobs_TK: Tensor, *, alpha: float) -> Tensor:
    """ℓ = KL(own ‖ α own + (1−α) other) over the given outcomes; the mixture is inside the log, ℓ <= −ln α.

    With the teacher's as own, α→0 is forward KL, and the gradient of a token that the student all but excludes is
    bounded by (1−α)/α, where forward KL's grows without limit in log p. With the student's as own, α→0 is reverse KL,
    gradient flows through both places of p_θ, and it is finite also where the teacher excludes a token.

    Args:
        alpha: weight of own in the mixture, in (0, 1).
    Source:
        DistiLLM, arXiv 2402.03898, SKL and SRKL.
    """
    return forward_kl(_mixture(own_logprobs_TK, other_logprobs_TK, alpha), own_logprobs_TK)


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
    student_tail_T1, teacher_tail_T1 = (
        log1mexp(logprobs_TK.logsumexp(-1, keepdim=True)) for logprobs_TK in (student_logprobs_TK, teacher_logprobs_TK)
    )
    return torch.cat([student_logprobs_TK, student_tail_T1], -1), torch.cat([teacher_logprobs_TK, teacher_tail_T1], -1)


def renormalise(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides conditioned on S: the odds inside S are learned, the mass of S is not."""
    return torch.log_softmax(student_logprobs_TK, -1), torch.log_softmax(teacher_logprobs_TK, -1)


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


def cross_entropy(student_logprobs_T: Tensor) -> Tensor:
    """ℓ = −log p_θ(y_t): plain supervised fine-tuning on the cached responses.

    On the student's own samples its expected gradient at p_θ = p_old is zero: it fits whoever wrote the responses,
    no teacher is involved. Takes log-probs [T] at the response ids.
    """
    return -student_logprobs_T


@dataclass(frozen=True)
class SupportDivergence(Estimator):
    """A divergence on a support: forward and reverse KL, dense or not, generalised JSD, skew KL."""

    support: Callable[[TokenRows], Support]
    outcomes: Outcomes
    divergence: Divergence

    def student_ids(self, rows: TokenRows) -> Tensor:
        return self.support(rows).ids_TK

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        teacher_logprobs_TK = self.support(rows).teacher_logprobs_TK
        loss_T = self.divergence(*self.outcomes(student_logprobs_TJ, teacher_logprobs_TK))
        return RowLosses(loss_T, support_masses(student_logprobs_TJ, teacher_logprobs_TK))


@dataclass(frozen=True)
class TeacherDraws(Estimator):
    """Forward KL from ids that the teacher drew: ℓ = (1/M) Σ_j (log q(v_j) − log p_θ(v_j)), v_j i.i.d. from q.

    Value unbiased for D_F, gradient −(1/M) Σ_j ∇log p_θ(v_j) unbiased for ∇D_F; the variance of both falls as 1/M.
    M = 1 is supervised training on tokens that the teacher would have written at the student's prefixes. A single
    realisation is not zero at p = q in gradient, only its expectation is. docs/estimators.md.
    """

    num_draws: int

    def student_ids(self, rows: TokenRows) -> Tensor:
        return first_columns("teacher_draw_ids", rows.teacher_draw_ids_TM, self.num_draws)

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        return RowLosses((rows.teacher_draw_logprobs_TM[:, : self.num_draws] - student_logprobs_TJ).mean(-1))


@dataclass(frozen=True)
class CrossEntropy(Estimator):
    """Supervised fine-tuning on the response tokens."""

    def student_ids(self, rows: TokenRows) -> Tensor:
        return rows.response_ids_T[:, None]

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        return RowLosses(cross_entropy(student_logprobs_TJ[:, 0]))


@dataclass(frozen=True)
class NearPolicy(Estimator):
    """NPD (reconstructed): ℓ = (1−λ)·cross-entropy + λ·forward KL on the teacher's top-k.

    The paper's text is not public in detail. No divergence to the teacher: the cross-entropy part follows the selected
    responses, so at p = q the gradient is (1−λ) times that of supervised training. docs/estimators.md.
    """

    top_k: int
    outcomes: Outcomes
    kl_weight: float

    def student_ids(self, rows: TokenRows) -> Tensor:
        return torch.cat([rows.response_ids_T[:, None], teacher_support(rows, self.top_k).ids_TK], -1)

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        student_logprobs_TK = student_logprobs_TJ[:, 1:]
        teacher_logprobs_TK = teacher_support(rows, self.top_k).teacher_logprobs_TK
        cross_entropy_T = cross_entropy(student_logprobs_TJ[:, 0])
        kl_T = forward_kl(*self.outcomes(student_logprobs_TK, teacher_logprobs_TK))
        parts = {CROSS_ENTROPY: cross_entropy_T.detach(), TOPK_KL: kl_T.detach()}
        return RowLosses(
            (1 - self.kl_weight) * cross_entropy_T + self.kl_weight * kl_T,
            {**parts, **support_masses(student_logprobs_TK, teacher_logprobs_TK)},
        )


def support_masses(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor) -> dict[Metric, Tensor]:
    """P_S and Q_S: how much of each distribution the support covers."""
    return {
        SUPPORT_MASS_STUDENT: student_logprobs_TK.detach().exp().sum(-1),
        SUPPORT_MASS_TEACHER: teacher_logprobs_TK.exp().sum(-1),
    }


_TAILS: dict[c.TailName, Outcomes] = {"bucket": bucket, "drop": drop, "renormalise": renormalise}


@estimator_of.register
def _(settings: c.DenseForwardKLConfig | c.DenseReverseKLConfig) -> Estimator:
    divergence = forward_kl if isinstance(settings, c.DenseForwardKLConfig) else reverse_kl
    # A full support has no tail to bucket: `drop` is exact there.
    return SupportDivergence(full_support, drop, divergence)


@estimator_of.register
def _(settings: c.ForwardKLConfig) -> Estimator:
    return SupportDivergence(partial(teacher_support, top_k=settings.top_k), _TAILS[settings.tail], forward_kl)


@estimator_of.register
def _(settings: c.ReverseKLConfig) -> Estimator:
    support = {"teacher": teacher_support, "student": student_support}[settings.support]
    return SupportDivergence(partial(support, top_k=settings.top_k), _TAILS[settings.tail], reverse_kl)


@estimator_of.register
def _(settings: c.GeneralisedJSDConfig) -> Estimator:
    divergence = partial(generalised_jsd, beta=settings.beta)
    return SupportDivergence(partial(teacher_support, top_k=settings.top_k), bucket, divergence)


@estimator_of.register
def _(settings: c.SkewKLConfig) -> Estimator:
    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        own, other = (teacher, student) if settings.direction == "forward" else (student, teacher)
        return skew_kl(own, other, alpha=settings.alpha)

    return SupportDivergence(partial(teacher_support, top_k=settings.top_k), bucket, divergence)


@estimator_of.register
def _(settings: c.ForwardKLDrawsConfig) -> Estimator:
    return TeacherDraws(settings.num_teacher_draws)


@estimator_of.register
def _(settings: c.NPDConfig) -> Estimator:
    return NearPolicy(settings.top_k, _TAILS[settings.tail], settings.kl_weight)


@estimator_of.register
def _(settings: c.CrossEntropyConfig) -> Estimator:
    return CrossEntropy()
