"""How long responses are: one number of tokens per index, the same for every fleet and bound that is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
