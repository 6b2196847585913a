"""What becomes of the mass outside a support S: each function turns log-probs on S into outcomes a KL can be taken of.

All take and return (student, teacher) log-probs [T, K], nats, and pass gradient to the student. On a full support
(K = V) `drop` is exact, because there is no tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncopd.losses.logspace import log1mexp


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
