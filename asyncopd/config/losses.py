"""The estimators' settings and the cached arrays each of them needs. Importing this loads no torch.

    loss.name --> one config class --requirements()--> CacheRequirements --> what sampler and scorer record
                                                        check_cache()   <--  what a log really holds

Naming an estimator selects vetted settings; combinations that make no sense are refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from asyncopd.config.corrections import (
    Clip,
    CorrectionConfig,
    Decoupled,
    LossSettings,
    M2po,
    Mask,
    NoCorrection,
    Truncate,
    name_checker,
)
from asyncopd.config.divergences import (
    DenseForwardKLConfig,
    DenseReverseKLConfig,
    ForwardKLConfig,
    ForwardKLDrawsConfig,
    GeneralisedJSDConfig,
    OnPolicySettings,
    ReverseKLConfig,
    SkewKLConfig,
    TailName,
    check_forward_tail,
)
from asyncopd.config.recorded import CacheRequirements, check_cache

__all__ = [
    "CacheRequirements",
    "Clip",
    "CorrectionConfig",
    "CrossEntropyConfig",
    "Decoupled",
    "DenseForwardKLConfig",
    "DenseReverseKLConfig",
    "ForwardKLConfig",
    "ForwardKLDrawsConfig",
    "GeneralisedJSDConfig",
    "HeadTailConfig",
    "LossConfig",
    "M2po",
    "Mask",
    "NPDConfig",
    "NoCorrection",
    "PolicyGradientConfig",
    "ReverseKLConfig",
    "SkewKLConfig",
    "TailName",
    "Truncate",
    "check_cache",
]


def _default_baseline(values: dict[str, Any]) -> Literal["none", "leave_one_out"]:
    return "leave_one_out" if values.get("num_draws", 0) > 1 and values.get("ratio") == "importance" else "none"


class PolicyGradientConfig(OnPolicySettings):
    """Reverse KL by policy gradient over tokens the sampling student drew."""

    name: Literal["policy_gradient"] = "policy_gradient"
    num_draws: int = Field(16, ge=1)
    """Draws from p_old per token, the emitted one included; 1 uses the emitted token alone and needs no candidates.
    16 is the least the method's paper uses; the variance falls as its inverse."""
    advantage: Literal["current", "behaviour"] = "current"
    """`current` recomputes log q − log p_θ and is unbiased. `behaviour` freezes log q − log p_old and on a frozen log
    collapses onto argmax q/p_old; for comparison."""
    ratio: Literal["importance", "none"] = "importance"
    """`none` pretends the draws were on-policy: biased as soon as there is drift."""
    baseline: Literal["none", "leave_one_out", "exact"] = Field(default_factory=_default_baseline)
    """Subtracted from the advantage. Leave-one-out wherever it exists (two draws or more, ratio on): no bias, and
    nothing more to ask of the teacher. It lowers the variance from about 16 draws on; with 2 to 4 its own noise can
    outweigh that (docs/estimators.md). `exact` needs full teacher rows."""
    correction: CorrectionConfig = NoCorrection()
    """What bounds the ratio; every one adds bias. None, because N draws and a baseline already tame the variance."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.baseline == "leave_one_out" and self.num_draws == 1:
            raise ValueError(
                "baseline leave_one_out with num_draws 1: there is no other draw. Use none, or num_draws 2."
            )
        if self.baseline == "exact" and self.advantage == "behaviour":
            raise ValueError(
                "baseline exact is E[A] under the current advantage; under advantage 'behaviour' it would need full "
                "rows of p_old, which no log holds. Use leave_one_out."
            )
        if self.ratio == "none":
            for option, value, off in (
                ("correction", self.correction.name, "none"),
                ("baseline", self.baseline, "none"),
                ("max_prefix_weight", self.max_prefix_weight, None),
            ):
                if value != off:
                    raise ValueError(
                        f"{option} {value} with ratio 'none': {_NEEDS_RATIO[option]}. Set ratio: importance."
                    )
        return self

    def requirements(self) -> CacheRequirements:
        full = self.baseline == "exact"
        if self.num_draws == 1:
            return CacheRequirements(full_vocabulary=full)
        return CacheRequirements(num_draws=self.num_draws, law="policy", full_vocabulary=full)


class HeadTailConfig(OnPolicySettings):
    """Exact head + sampled tail: unbiased reverse KL at top-k cost. The recommended default."""

    name: Literal["head_tail"] = "head_tail"
    head: int = Field(4, ge=1)
    """The sampling student's most likely ids, summed exactly. 4 hold most of a trained student's mass."""
    num_draws: int = Field(4, ge=1)
    """Draws from the rest. Below 4 a single draw with a large ratio dominates a row; 4 + 4 matched dense reverse KL."""
    teacher_top_k: int = Field(0, ge=0)
    """Teacher ids joined to the head after the draw, still unbiased: draws among them then count 0. Off by default, as
    it doubles the stored ids; worth it when `loss/max_ratio` shows the student growing where the sampler was thin."""

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(head=self.head, num_draws=self.num_draws, law="tail", top_k=self.teacher_top_k)


class NPDConfig(LossSettings):
    """NPD (reconstructed): (1−λ)·CE + λ·KL on the teacher's top-k."""

    name: Literal["npd"] = "npd"
    kl_weight: float = Field(0.9, gt=0, le=1)
    """λ. 0.9 is the near-policy method's; 0 would be cross_entropy."""
    top_k: int = Field(10, ge=1)
    """Teacher ids per token. 10 is the near-policy method's."""
    tail: TailName = "bucket"
    """As in forward_kl."""

    @model_validator(mode="after")
    def _tail_makes_sense(self) -> Self:
        check_forward_tail(self.name, self.top_k, self.tail)
        return self

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(top_k=self.top_k)


class CrossEntropyConfig(LossSettings):
    """Supervised fine-tuning on the cached responses; no teacher."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def requirements(self) -> CacheRequirements:
        return CacheRequirements()


_VARIANTS = (
    HeadTailConfig,
    PolicyGradientConfig,
    DenseReverseKLConfig,
    DenseForwardKLConfig,
    ForwardKLConfig,
    ForwardKLDrawsConfig,
    ReverseKLConfig,
    GeneralisedJSDConfig,
    SkewKLConfig,
    NPDConfig,
    CrossEntropyConfig,
)


LossConfig = Annotated[
    HeadTailConfig
    | PolicyGradientConfig
    | DenseReverseKLConfig
    | DenseForwardKLConfig
    | ForwardKLConfig
    | ForwardKLDrawsConfig
    | ReverseKLConfig
    | GeneralisedJSDConfig
    | SkewKLConfig
    | NPDConfig
    | CrossEntropyConfig,
    Field(discriminator="name"),
    BeforeValidator(name_checker("estimator", _VARIANTS)),
]
"""One section, one estimator, chosen by `name`."""

_NEEDS_RATIO = {
    "correction": "there is no ratio to correct",
    "baseline": "without the ratio E[∇log p_θ] is not 0 under stale draws, so a baseline would change the gradient it "
    "is meant to leave alone",
    "max_prefix_weight": "it would correct the prefixes and not the token",
}
