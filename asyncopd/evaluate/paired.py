"""Differences between students that answered the same prompts with the same random numbers: paired statistics.

Pairing: prompt i is answered once by every student, with the same uniforms. What is easy or hard about a prompt, and
about its random numbers, is in both answers and cancels in their difference d_i; the standard error of the mean of d_i
says how well the difference is known for *these two students*, over prompts and draws. It says nothing about training
them again on other rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import ShapeError
from asyncopd.evaluate.stage import kl_per_token
from asyncopd.types import ScoredTrajectory


@dataclass(frozen=True)
class Outcome:
    """What one student did on B held-out prompts."""

    correct_B: NDArray[np.float64]
    """[B] 1 where the verifier accepts the response, else 0."""
    kl_sum_B: NDArray[np.float64]
    """[B] KL(student‖teacher) summed over the response's tokens, nats, estimated."""
    num_tokens_B: NDArray[np.float64]
    """[B] response tokens, EOS included."""

    @property
    def accuracy(self) -> float:
        return float(self.correct_B.mean())

    @property
    def kl_nats(self) -> float:
        """KL per response token, nats: Σ KL / Σ tokens."""
        return float(self.kl_sum_B.sum() / self.num_tokens_B.sum())

    @property
    def kl_influence_B(self) -> NDArray[np.float64]:
        """[B] what each prompt adds to the ratio `kl_nats`, to first order (delta method); mean 0, nats."""
        return np.asarray((self.kl_sum_B - self.kl_nats * self.num_tokens_B) / self.num_tokens_B.mean())


@dataclass(frozen=True)
class Difference:
    """Second student minus first, of one figure."""

    value: float
    paired_error: float
    """Standard error, prompt by prompt."""
    unpaired_error: float
    """Standard error that two students with prompts of their own would have: what pairing saves."""


def outcome_of(scored: Sequence[ScoredTrajectory], correct: Sequence[bool]) -> Outcome:
    """The outcome of responses in the order of their prompts; every response with a head and tail draws."""
    return Outcome(
        correct_B=np.array(correct, np.float64),
        kl_sum_B=np.array([kl_per_token(s).sum() for s in scored]),
        num_tokens_B=np.array([len(s.trajectory.response_ids) for s in scored], np.float64),
    )


def accuracy_difference(first: Outcome, second: Outcome) -> Difference:
    """Of the fraction of accepted responses."""
    return _difference(second.accuracy - first.accuracy, first.correct_B, second.correct_B)


def kl_difference(first: Outcome, second: Outcome) -> Difference:
    """Of the KL per response token, nats; errors by the delta method for a ratio."""
    return _difference(second.kl_nats - first.kl_nats, first.kl_influence_B, second.kl_influence_B)


def _difference(value: float, first_B: NDArray[np.float64], second_B: NDArray[np.float64]) -> Difference:
    """Raises ShapeError when the students did not answer the same number of prompts, at least two."""
    if first_B.shape != second_B.shape or len(first_B) < 2:
        raise ShapeError(
            f"paired differences need the same prompts, at least two: found {len(first_B)} and {len(second_B)}."
        )
    return Difference(
        value=value,
        paired_error=math.sqrt((second_B - first_B).var(ddof=1) / len(first_B)),
        unpaired_error=math.sqrt((first_B.var(ddof=1) + second_B.var(ddof=1)) / len(first_B)),
    )
