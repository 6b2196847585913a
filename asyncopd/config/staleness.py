"""How old a trajectory may be when it is trained, and what happens to one that is older (docs/staleness.md)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from asyncopd.config.frozen import Frozen
from asyncopd.schedule import OnStale, Order

DEFAULT_MAX_AHEAD = 2


class Staleness(Frozen):
    max_staleness: int = Field(2, ge=0)
    """Oldest admissible weights, in policy versions. 0 is synchronous. 2 already hides the long responses behind the
    next steps' (docs/performance.md); larger buys mostly staleness."""
    order: Order = "index"
    """`index`: a step trains its own index range, whatever finished first: no bias against long responses, no waste.
    `arrival`: it trains the first batch_size that are scored."""
    on_stale: OnStale | None = None
    """What order `arrival` does with a trajectory that is older than max_staleness when a step comes to it: `drop` it,
    `hold` it untrained for a replay, or `train` it all the same. No default: each gives up something else."""
    max_ahead: int = Field(DEFAULT_MAX_AHEAD, ge=1)
    """Order `arrival`: steps' worth of trajectories that may be started beyond those the learner has come to. With 2
    and on_stale train, mean staleness is that of index order at the default max_staleness, so that the two compare;
    3 drops a third of everything under on_stale drop (docs/performance.md)."""
    in_flight_updates: bool = True
    """Responses in progress go on under newer weights as soon as there are some. Otherwise they end under the weights
    they started with, and the sampler's batch runs empty once per version (docs/performance.md)."""
    max_drift: float | None = Field(None, gt=0)
    """While the learner's last step measured more drift KL(p_old‖p_θ) than this, nats per token, samplers start only
    what the next version needs. None, because the drift that an estimator bears is a matter of the estimator."""

    @model_validator(mode="after")
    def _settings_belong_together(self) -> Self:
        if self.order == "arrival" and self.on_stale is None:
            raise ValueError(
                "order arrival needs on_stale, what becomes of trajectories older than max_staleness when a step comes "
                "to them: drop, hold or train."
            )
        if self.order == "index" and self.on_stale is not None:
            raise ValueError(
                f"on_stale {self.on_stale} has nothing to decide in order index, where no trajectory starts under "
                "weights older than max_staleness. Leave it out, or set order: arrival."
            )
        if self.order == "index" and self.max_ahead != DEFAULT_MAX_AHEAD:
            raise ValueError(
                f"max_ahead {self.max_ahead} has no effect in order index, where max_staleness bounds how far ahead "
                "samplers run. Leave it out, or set order: arrival."
            )
        synchronous = self.order == "index" and self.max_staleness == 0
        if synchronous and not self.in_flight_updates:
            raise ValueError(
                "in_flight_updates false has no effect at max_staleness 0 in order index: nothing is in flight when a "
                "version appears. Leave it out, or raise max_staleness."
            )
        if self.max_staleness == 0 and self.max_drift is not None and self.order == "index":
            raise ValueError(
                "max_drift has no effect at max_staleness 0 in order index: nothing starts before the version it "
                "is trained under. Leave it out, or raise max_staleness."
            )
        return self
