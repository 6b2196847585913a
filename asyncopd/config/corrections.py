"""Settings of the importance-ratio corrections, and the base of every section under `loss`. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from asyncopd.config.base import Frozen


class LossSettings(Frozen):
    """Base of every estimator's section: immutable, unknown options refused with the nearest valid one named."""

    @model_validator(mode="before")
    @classmethod
    def _options_exist(cls, values: Any) -> Any:
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, Mapping) else []
        for key in unknown:
            options = [option for option in cls.model_fields if option != "name"]
            near = difflib.get_close_matches(str(key), options, n=1, cutoff=0.0)
            raise ValueError(
                f"{cls.model_fields['name'].default} has no option {key!r}. "
                + (f"Nearest: {near[0]!r}; all: {', '.join(options)}." if near else "It has no options.")
            )
        return values


def name_checker(what: str, variants: Sequence[type[LossSettings]]) -> Callable[[Any], Any]:
    """A validator that runs before pydantic looks for the variant, to name the nearest when there is none."""
    names = [variant.model_fields["name"].default for variant in variants]

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "name" not in value:
            raise ValueError(f"{what}: `name` is missing. It may be {', '.join(names)}.")
        if value["name"] not in names:
            near = difflib.get_close_matches(str(value["name"]), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"no {what} is called {value['name']!r}. Nearest: {near!r}; all: {', '.join(names)}.")
        return value

    return check


class NoCorrection(LossSettings):
    """ρ·A as it is: unbiased."""

    name: Literal["none"] = "none"


class Clip(LossSettings):
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


class Decoupled(LossSettings):
    """AReaL's decoupled objective. With one optimizer step per learner step, which is what the learner does, the
    proximal snapshot is the student itself: only the cap acts."""

    name: Literal["decoupled"] = "decoupled"
    epsilon_low: float = Field(0.2, ge=0)
    """Clip around the proximal snapshot; PPO's."""
    epsilon_high: float = Field(0.2, ge=0)
    """Clip around the proximal snapshot; PPO's."""
    max_behaviour_weight: float = Field(5.0, gt=1)
    """Draws with p_prox/p_old above it are masked. 5 is AReaL's."""


class M2po(LossSettings):
    """Second-moment trust region over the harmful draws of the whole step."""

    name: Literal["m2po"] = "m2po"
    budget: float = Field(0.04, gt=0)
    """Largest mean δ² of the harmful draws, nats². 0.04 is M2PO's: a typical |log ρ| of 0.2, PPO's ε."""


class Truncate(LossSettings):
    """Truncated importance sampling: gradient weight min(ρ, c)."""

    name: Literal["truncate"] = "truncate"
    max_ratio: float = Field(2.0, ge=1)
    """c. 2 is the usual value."""


class Mask(LossSettings):
    """IcePop: draws with ρ outside [1/c, c] are dropped."""

    name: Literal["mask"] = "mask"
    max_ratio: float = Field(5.0, gt=1)
    """c. 5 lies well outside PPO's region: it drops accidents, not ordinary drift."""


CorrectionConfig = Annotated[
    NoCorrection | Clip | Decoupled | M2po | Truncate | Mask,
    Field(discriminator="name"),
    BeforeValidator(name_checker("correction", (NoCorrection, Clip, Decoupled, M2po, Truncate, Mask))),
]
"""One section, one correction, chosen by `name`."""
