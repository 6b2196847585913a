"""What is to be trained, and with what: how long responses are, what work costs on one GPU, and the fleet that does it.

Responses have one number of tokens per index, the same for every fleet and bound that is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import ConfigError

NORMAL = NormalDist()
Z99 = NORMAL.inv_cdf(0.99)


@dataclass(frozen=True)
class Lognormal:
    """Response lengths min(X, limit) with lognormal X; `mean` and `p99` are those of the limited lengths."""

    mean: float
    p99: float
    limit: int

    @classmethod
    def parse(cls, text: str) -> Lognormal:
        """From `lognormal:mean=3000,p99=16000,max=16384`. Raises ConfigError, also when no lognormal is like that."""
        try:
            fields = dict(part.split("=") for part in text.removeprefix("lognormal:").split(","))
            made = cls(float(fields.pop("mean")), float(fields.pop("p99")), int(fields.pop("max")))
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"lengths {text!r} cannot be read ({error}); expected for example "
                "lognormal:mean=3000,p99=16000,max=16384."
            ) from error
        if fields:
            raise ConfigError(f"lengths {text!r} has unknown {sorted(fields)}; expected mean, p99 and max.")
        made.parameters()
        return made

    def parameters(self) -> tuple[float, float]:
        """(μ, σ) of log X. Raises ConfigError where there are none."""
        if not 1 <= self.mean < self.p99 <= self.limit:
            raise ConfigError(
                f"lognormal lengths need 1 <= mean < p99 <= max; found mean {self.mean:g}, p99 {self.p99:g}, max "
                f"{self.limit}. Where more than 1 % reach the limit, give p99 = max."
            )
        low, high = 1e-6, Z99
        if self._mean(high) > self.mean:
            raise ConfigError(
                f"no lognormal with p99 {self.p99:g} has a mean as low as {self.mean:g}; the lowest is "
                f"{self._mean(high):.0f}. Raise mean or lower p99."
            )
        for _ in range(100):
            sigma = (low + high) / 2
            low, high = (sigma, high) if self._mean(sigma) > self.mean else (low, sigma)
        return self._mu(sigma), sigma

    def draw(self, count: int, seed: int) -> NDArray[np.int64]:
        """[count] tokens of the indices 0, 1, 2, …; at least 1."""
        mu, sigma = self.parameters()
        drawn = np.exp(mu + sigma * np.random.default_rng(seed).standard_normal(count))
        return np.clip(np.rint(drawn), 1, self.limit).astype(np.int64)

    def describe(self) -> str:
        mu, sigma = self.parameters()
        capped = 1 - NORMAL.cdf((math.log(self.limit) - mu) / sigma)
        return (
            f"lognormal, mean {self.mean:g}, p99 {self.p99:g}, at most {self.limit} tokens "
            f"(σ {sigma:.2f}, {capped:.1%} at the limit)"
        )

    def _mu(self, sigma: float) -> float:
        return math.log(self.p99) - Z99 * sigma

    def _mean(self, sigma: float) -> float:
        mu, top = self._mu(sigma), math.log(self.limit)
        below = math.exp(mu + sigma**2 / 2) * NORMAL.cdf((top - mu - sigma**2) / sigma)
        return below + self.limit * (1 - NORMAL.cdf((top - mu) / sigma))


@dataclass(frozen=True)
class Observed:
    """The lengths of a run, in index order, repeated as often as needed."""

    lengths: Sequence[int]
    source: str

    def draw(self, count: int, seed: int) -> NDArray[np.int64]:
        """[count] tokens. The order is the run's own, so `seed` changes nothing."""
        del seed
        return np.resize(np.asarray(self.lengths, np.int64), count)

    def describe(self) -> str:
        return (
            f"the {len(self.lengths)} responses of {self.source}: mean {np.mean(self.lengths):.1f}, p99 "
            f"{np.percentile(self.lengths, 99):.0f}, longest {max(self.lengths)} tokens"
        )


Lengths = Lognormal | Observed


@dataclass(frozen=True)
class Workload:
    """What is to be trained."""

    lengths: Lengths
    batch_size: int
    shard_size: int
    num_steps: int
    num_slots: int
    """Responses that one engine generates at once."""
    seed: int = 0


@dataclass(frozen=True)
class DecodeCurve:
    """Seconds of one decode step of an engine against its active slots; straight lines between measured points."""

    active: tuple[int, ...]
    """Ascending, from 1."""
    step_s: tuple[float, ...]

    def __post_init__(self) -> None:
        rates = [a / s for a, s in zip(self.active, self.step_s, strict=True) if s > 0]
        if not self.active or len(rates) < len(self.active) or list(self.active) != sorted(set(self.active)):
            raise ConfigError(
                f"a decode curve needs ascending slots with positive seconds, found {self.active} and {self.step_s}; "
                "for example 1:0.006,64:0.008,512:0.02."
            )

    @classmethod
    def parse(cls, text: str) -> DecodeCurve:
        """From `1:0.006,512:0.02`: active slots and seconds of a step. Raises ConfigError."""
        try:
            points = [part.split(":") for part in text.split(",")]
            return cls(tuple(int(active) for active, _ in points), tuple(float(seconds) for _, seconds in points))
        except ValueError as error:
            raise ConfigError(f"decode curve {text!r} cannot be read; expected like 1:0.006,512:0.02.") from error

    def scaled(self, factor: float) -> DecodeCurve:
        return replace(self, step_s=tuple(seconds * factor for seconds in self.step_s))

    def table(self, num_slots: int) -> list[float]:
        """Seconds of a step with 0, 1, … num_slots active; beyond the last point it goes on along the last line."""
        counts = np.arange(num_slots + 1)
        seconds = np.interp(counts, self.active, self.step_s)
        if len(self.active) > 1:
            slope = (self.step_s[-1] - self.step_s[-2]) / (self.active[-1] - self.active[-2])
            seconds = np.where(counts > self.active[-1], self.step_s[-1] + slope * (counts - self.active[-1]), seconds)
        return [float(value) for value in seconds]


@dataclass(frozen=True)
class Costs:
    """Seconds of work on one GPU. What is not known is 0, and the forecast says so."""

    decode: DecodeCurve
    score_tokens_per_s: float
    """Of one teacher GPU; shards are spread over them."""
    train_tokens_per_s: float
    """Of one learner GPU; a step is spread over all of them."""
    train_step_s: float = 0.0
    """Of a step whatever its tokens and GPUs: optimizer, all-reduce, launch."""
    score_shard_s: float = 0.0
    """Of a shard whatever its tokens: reading and writing Parquet."""
    publish_s: float = 0.0
    """The learner's, from the end of a step until its version can be read; the next step starts afterwards."""
    fetch_s: float = 0.0
    """From then until an engine has read the weights; decoding goes on meanwhile."""
    refresh_s: float = 0.0
    """An engine stands still while it loads them."""
    prefill_token_s: float = 0.0
    """For each token in flight at a refresh, whose KV cache an engine rebuilds."""
    shard_s: float = 0.0
    """Of the sampler's process for each finished shard: encoding and publishing, during which it does not decode."""
    handover_s: float = 0.0
    """From then until a teacher sees the shard and from the scores until the learner has read them: pure delay."""
    switch_s: float = 0.0
    """Of time-shared GPUs at every change between sampling and training."""
    speeds: tuple[float, ...] = (1.0,)
    """Speed of each process when 1, 2, … are busy at once; the last value goes on. (1.0,) is a machine for each."""

    def __post_init__(self) -> None:
        if min(self.score_tokens_per_s, self.train_tokens_per_s, *self.speeds) <= 0:
            raise ConfigError(f"rates and speeds must be above 0, found {self}.")


@dataclass(frozen=True)
class Fleet:
    """How many GPUs do what."""

    rollout: int
    teacher: int
    learner: int
    time_shared: bool = False
    """Rollout and learner are the same GPUs and take turns: `rollout` of them sample, then as many train."""

    def __post_init__(self) -> None:
        if min(self.rollout, self.teacher, self.learner) < 1:
            raise ConfigError(f"every role needs a GPU, found {self.describe()}.")
        if self.time_shared and self.rollout != self.learner:
            raise ConfigError(f"time-shared GPUs all sample and all train, found {self.describe()}.")

    @property
    def num_gpus(self) -> int:
        return self.teacher + (self.rollout if self.time_shared else self.rollout + self.learner)

    def describe(self) -> str:
        if self.time_shared:
            return f"{self.rollout} time-shared + {self.teacher} teacher"
        return f"{self.rollout} rollout + {self.teacher} teacher + {self.learner} learner"


def splits(num_gpus: int) -> list[Fleet]:
    """Every way to give each role at least one of `num_gpus` GPUs."""
    if num_gpus < 3:
        raise ConfigError(f"{num_gpus} GPUs cannot be split: rollout, teacher and learner need one each.")
    return [
        Fleet(rollout, teacher, num_gpus - rollout - teacher)
        for teacher in range(1, num_gpus - 1)
        for rollout in range(1, num_gpus - teacher)
    ]
