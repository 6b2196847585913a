"""The estimators' settings: one class says its `name`, its options and what it needs recorded. Loads no torch.

    loss.name --ESTIMATORS--> one settings class --requirements()--> Requirements --> what sampler and scorer record
                                   |                                 check_cache()  <--  what a log really holds
                                   +--asyncopd/losses--> the function it binds

Naming an estimator selects vetted settings; combinations that make no sense are refused with the reason.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from asyncopd.config.base import Kinds, Named
from asyncopd.config.recorded import CacheRequirements

CORRECTIONS = Kinds("correction")
ESTIMATORS = Kinds("estimator")

TailName = Literal["bucket", "drop", "renormalise"]


class CorrectionSettings(Named):
    """Base of what may take the place of ρ·A: asyncopd/losses/corrections.py has the functions."""


@CORRECTIONS.add
class NoCorrection(CorrectionSettings):
    """ρ·A as it is: unbiased."""

    name: Literal["none"] = "none"


@CORRECTIONS.add
class Clip(CorrectionSettings):
    """PPO's clip; asymmetric bounds and a dual clip if wanted."""

    name: Literal["clip"] = "clip"
    epsilon_low: float = Field(0.2, ge=0)
    """Lower bound 1 − ε_low where A < 0. 0.2 is PPO's; 1 or more removes the bound."""
    epsilon_high: float = Field(0.2, ge=0)
    """Upper bound 1 + ε_high where A > 0. 0.2 is PPO's; DAPO raises it to 0.28."""
    dual_clip: float | None = Field(None, gt=1)
    """Where A < 0 and ρ exceeds it the gradient is 0; usual value 3. Off by default, as in PPO."""

    @model_validator(mode="after")
    def _dual_clip_is_outside(self) -> Self:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.epsilon_high:
            raise ValueError(
                f"dual_clip {self.dual_clip} must exceed 1 + epsilon_high = {1 + self.epsilon_high}: inside the trust "
                "region it would clip draws the region allows."
            )
        return self


@CORRECTIONS.add
class Decoupled(CorrectionSettings):
    """AReaL's decoupled objective. With one optimizer step per learner step, which is what the learner does, the
    proximal snapshot is the student itself: only the cap acts."""

    name: Literal["decoupled"] = "decoupled"
    epsilon_low: float = Field(0.2, ge=0)
    """Clip around the proximal snapshot; PPO's."""
    epsilon_high: float = Field(0.2, ge=0)
    """Clip around the proximal snapshot; PPO's."""
    max_behaviour_weight: float = Field(5.0, gt=1)
    """Draws with p_prox/p_old above it are masked. 5 is AReaL's."""


@CORRECTIONS.add
class M2po(CorrectionSettings):
    """Second-moment trust region over the harmful draws of the whole step."""

    name: Literal["m2po"] = "m2po"
    budget: float = Field(0.04, gt=0)
    """Largest mean δ² of the harmful draws, nats². 0.04 is M2PO's: a typical |log ρ| of 0.2, PPO's ε."""


@CORRECTIONS.add
class Truncate(CorrectionSettings):
    """Truncated importance sampling: gradient weight min(ρ, c)."""

    name: Literal["truncate"] = "truncate"
    max_ratio: float = Field(2.0, ge=1)
    """c. 2 is the usual value."""


@CORRECTIONS.add
class Mask(CorrectionSettings):
    """IcePop: draws with ρ outside [1/c, c] are dropped."""

    name: Literal["mask"] = "mask"
    max_ratio: float = Field(5.0, gt=1)
    """c. 5 lies well outside PPO's region: it drops accidents, not ordinary drift."""


CorrectionConfig = Annotated[CorrectionSettings, CORRECTIONS]
"""One section, one correction, chosen by `name`."""


class LossSettings(Named):
    """Base of every estimator's section."""

    def requirements(self) -> CacheRequirements:
        """The per-token arrays it needs recorded; the sampled token's log p_old and log q alone unless it says more."""
        return CacheRequirements()


class OnPolicySettings(LossSettings):
    """Base of the estimators that aim at a divergence under the student's own prefixes."""

    max_prefix_weight: float | None = Field(None, ge=1)
    """Cap of the weight Π ρ over the previous tokens that corrects the distribution over prefixes. Off by default: the
    weight is unbiased only without a cap, and its variance grows with response length."""


class TeacherTopK(LossSettings):
    """Base of the losses on the teacher's most likely ids."""

    top_k: int = Field(16, ge=1)
    """Teacher ids per token. 16 hold nearly all of a language model teacher's mass at 128 bytes per token."""

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(top_k=self.top_k)


class TeacherTopKWithTail(TeacherTopK):
    """Base of those with forward KL, where the mass outside has to go somewhere."""

    tail: TailName = "bucket"
    """What becomes of the mass outside. `bucket` is a proper KL; `drop` empties the tail."""

    @model_validator(mode="after")
    def _tail_makes_sense(self) -> Self:
        _check_renormalised(self.name, self.top_k, self.tail)
        if self.top_k == 1 and self.tail == "drop":
            warnings.warn(
                f"{self.name} with top_k 1 and tail 'drop' is imitation of the teacher's argmax, not distillation of "
                "its distribution. Set tail: bucket, or a larger top_k.",
                stacklevel=2,
            )
        return self


class FullVocabulary(OnPolicySettings):
    """Base of the exact divergences, for small vocabularies."""

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(full_vocabulary=True)


def _default_baseline(values: dict[str, Any]) -> Literal["none", "leave_one_out"]:
    return "leave_one_out" if values.get("num_draws", 0) > 1 and values.get("ratio") == "importance" else "none"


@ESTIMATORS.add
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


@ESTIMATORS.add
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
        no_baseline = (
            "without the ratio E[∇log p_θ] is not 0 under stale draws, so a baseline would change the gradient it is "
            "meant to leave alone"
        )
        for option, value, off, why in (
            ("correction", self.correction.name, "none", "there is no ratio to correct"),
            ("baseline", self.baseline, "none", no_baseline),
            ("max_prefix_weight", self.max_prefix_weight, None, "it would correct the prefixes and not the token"),
        ):
            if self.ratio == "none" and value != off:
                raise ValueError(f"{option} {value} with ratio 'none': {why}. Set ratio: importance.")
        return self

    def requirements(self) -> CacheRequirements:
        full = self.baseline == "exact"
        if self.num_draws == 1:
            return CacheRequirements(full_vocabulary=full)
        return CacheRequirements(num_draws=self.num_draws, law="policy", full_vocabulary=full)


@ESTIMATORS.add
class DenseReverseKLConfig(FullVocabulary):
    """Exact reverse KL over the full vocabulary; for small vocabularies. The reference for every other estimator."""

    name: Literal["dense_reverse_kl"] = "dense_reverse_kl"


@ESTIMATORS.add
class DenseForwardKLConfig(FullVocabulary):
    """Exact forward KL over the full vocabulary; for small vocabularies."""

    name: Literal["dense_forward_kl"] = "dense_forward_kl"


@ESTIMATORS.add
class ForwardKLConfig(TeacherTopKWithTail, OnPolicySettings):
    """Forward KL on the teacher's top-k."""

    name: Literal["forward_kl"] = "forward_kl"


@ESTIMATORS.add
class ForwardKLDrawsConfig(OnPolicySettings):
    """Forward KL from ids drawn by the teacher: unbiased at any staleness."""

    name: Literal["forward_kl_draws"] = "forward_kl_draws"
    num_teacher_draws: int = Field(16, ge=1)
    """Draws per token; the variance falls as its inverse. 16 costs as much storage as a top-k of 16."""

    def requirements(self) -> CacheRequirements:
        return CacheRequirements(num_teacher_draws=self.num_teacher_draws)


@ESTIMATORS.add
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
        is_teacher = self.support == "teacher"
        return CacheRequirements(top_k=self.top_k) if is_teacher else CacheRequirements(head=self.top_k)


@ESTIMATORS.add
class GeneralisedJSDConfig(TeacherTopK, OnPolicySettings):
    """Generalised Jensen–Shannon divergence on the teacher's top-k plus a tail bucket."""

    name: Literal["generalised_jsd"] = "generalised_jsd"
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture: towards 0 forward KL, towards 1 reverse KL. ½ is symmetric."""


@ESTIMATORS.add
class SkewKLConfig(TeacherTopK, OnPolicySettings):
    """DistiLLM's skew KL on the teacher's top-k plus a tail bucket."""

    name: Literal["skew_kl"] = "skew_kl"
    direction: Literal["forward", "reverse"] = "forward"
    """KL(q ‖ αq + (1−α)p) or KL(p ‖ αp + (1−α)q)."""
    alpha: float = Field(0.1, gt=0, lt=1)
    """Weight of the first argument in the mixture. 0.1 is DistiLLM's."""


@ESTIMATORS.add
class NPDConfig(TeacherTopKWithTail):
    """NPD (reconstructed): (1−λ)·CE + λ·KL on the teacher's top-k."""

    name: Literal["npd"] = "npd"
    kl_weight: float = Field(0.9, gt=0, le=1)
    """λ. 0.9 is the near-policy method's; 0 would be cross_entropy."""
    top_k: int = Field(10, ge=1)
    """Teacher ids per token. 10 is the near-policy method's."""


@ESTIMATORS.add
class CrossEntropyConfig(LossSettings):
    """Supervised fine-tuning on the cached responses; no teacher."""

    name: Literal["cross_entropy"] = "cross_entropy"


LossConfig = Annotated[LossSettings, ESTIMATORS]
"""One section, one estimator, chosen by `name`."""


def _check_renormalised(name: str, top_k: int, tail: TailName) -> None:
    if top_k == 1 and tail == "renormalise":
        raise ValueError(
            f"{name} with top_k 1 and tail 'renormalise': one renormalised outcome has probability 1 on both sides, "
            "the loss is 0 whatever the student does. Set tail: bucket, or a larger top_k."
        )
