"""Settings of the divergences that need no draw of the student. Loads no torch."""

from __future__ import annotations

import warnings
from typing import Literal, Self

from pydantic import Field, model_validator

from asyncopd.config.corrections import LossSettings
from asyncopd.config.recorded import CacheRequirements

TailName = Literal["bucket", "drop", "renormalise"]


class OnPolicySettings(LossSettings):
    """Base of the estimators that aim at a divergence under the student's own prefixes."""

    max_prefix_weight: float | None = Field(None, ge=1)
    """Cap of the weight Π ρ over the previous tokens that corrects the distribution over prefixes. Off by default: the
    weight is unbiased only without a cap, and its variance grows with response length."""


class ForwardKLConfig(OnPolicySettings):
    """Forward KL on the teacher's top-k."""

    name: Literal["forward_kl"] = "forward_kl"
    top_k: int = Field(16, ge=1)
    """Teacher ids per token. 16 hold nearly all of a language model teacher's mass at 128 bytes per token."""
    tail: TailName = "bucket"
    """What becomes of the mass outside. `bucket` is a proper KL; `drop` empties the tail."""

    @model_validator(mode="after")
    def _tail_makes_sense(self) -> Self:
        check_forward_tail(self.name, self.top_k, self.tail)
        return self

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(top_k=self.top_k)


class ForwardKLDrawsConfig(OnPolicySettings):
    """Forward KL from ids drawn by the teacher: unbiased at any staleness."""

    name: Literal["forward_kl_draws"] = "forward_kl_draws"
    num_teacher_draws: int = Field(16, ge=1)
    """Draws per token; the variance falls as its inverse. 16 costs as much storage as a top-k of 16."""

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(num_teacher_draws=self.num_teacher_draws)


class ReverseKLConfig(OnPolicySettings):
    """Reverse KL on a partial support; kept for comparison, biased."""

    name: Literal["reverse_kl"] = "reverse_kl"
    support: Literal["teacher", "student"] = "teacher"
    """Whose most likely ids. The sampling student's grow stale with it."""
    top_k: int = Field(16, ge=1)
    """Ids per token."""
    tail: TailName = "bucket"
    """`bucket` removes the mass leak that `drop` has."""

    @model_validator(mode="after")
    def _tail_makes_sense(self) -> Self:
        _check_renormalised(self.name, self.top_k, self.tail)
        if self.top_k == 1 and self.tail == "drop":
            raise ValueError(
                "reverse_kl with top_k 1 and tail 'drop' pulls that one token towards p = q/e, whatever the others do: "
                "mass leaks away from the best token. Set tail: bucket, or a larger top_k."
            )
        return self

    def requirements(self) -> CacheRequirements:
        if self.support == "teacher":
            return CacheRequirements(top_k=self.top_k)
        return CacheRequirements(head=self.top_k)


class DenseForwardKLConfig(OnPolicySettings):
    """Exact forward KL over the full vocabulary; for small vocabularies."""

    name: Literal["dense_forward_kl"] = "dense_forward_kl"

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(full_vocabulary=True)


class DenseReverseKLConfig(OnPolicySettings):
    """Exact reverse KL over the full vocabulary; for small vocabularies. The reference for every other estimator."""

    name: Literal["dense_reverse_kl"] = "dense_reverse_kl"

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(full_vocabulary=True)


class GeneralisedJSDConfig(OnPolicySettings):
    """Generalised Jensen–Shannon divergence on the teacher's top-k plus a tail bucket."""

    name: Literal["generalised_jsd"] = "generalised_jsd"
    top_k: int = Field(16, ge=1)
    """Teacher ids per token."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture: towards 0 forward KL, towards 1 reverse KL. ½ is symmetric."""

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(top_k=self.top_k)


class SkewKLConfig(OnPolicySettings):
    """DistiLLM's skew KL on the teacher's top-k plus a tail bucket."""

    name: Literal["skew_kl"] = "skew_kl"
    direction: Literal["forward", "reverse"] = "forward"
    """KL(q ‖ αq + (1−α)p) or KL(p ‖ αp + (1−α)q)."""
    top_k: int = Field(16, ge=1)
    """Teacher ids per token."""
    alpha: float = Field(0.1, gt=0, lt=1)
    """Weight of the first argument in the mixture. 0.1 is DistiLLM's."""

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(top_k=self.top_k)


def _check_renormalised(name: str, top_k: int, tail: TailName) -> None:
    if top_k == 1 and tail == "renormalise":
        raise ValueError(
            f"{name} with top_k 1 and tail 'renormalise': one renormalised outcome has probability 1 on both sides, "
            "the loss is 0 whatever the student does. Set tail: bucket, or a larger top_k."
        )


def check_forward_tail(name: str, top_k: int, tail: TailName) -> None:
    """Refuse or warn about forward KL on a single id without a bucket."""
    _check_renormalised(name, top_k, tail)
    if top_k == 1 and tail == "drop":
        warnings.warn(
            f"{name} with top_k 1 and tail 'drop' is imitation of the teacher's argmax, not distillation of its "
            "distribution. Set tail: bucket, or a larger top_k.",
            stacklevel=3,
        )
