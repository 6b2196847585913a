"""Which index belongs to which step and shard, and when it may start: pure functions, the one scheduling rule.

    index a --(belongs to)--> step floor(a/B)        learner step s trains [s·B, (s+1)·B)
            --(may start)---> once a version >= floor(a/B) − τ is published

B is the batch size, τ the maximal staleness in versions. τ = 0 is synchronous, τ = n is n-step-off, larger is
asynchronous: one rule, no modes. A trajectory is consumed under version floor(a/B), so its staleness is at most τ.

While the drift that the learner measured exceeds `max_drift`, τ is 0: what the next version needs may start, the rest
waits for it. Order `arrival` has another belonging (asyncopd/arrivals.py) and therefore another rule, `may_arrive`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from asyncopd.errors import ConfigError
from asyncopd.types import IndexRange

LEARNER_PLACE = IndexRange(0, 1)
"""Under stage `learn` workers claim the one place of a learner, not indices."""
Order = Literal["index", "arrival"]
"""`index`: a step trains its own index range. `arrival`: it trains what was scored first."""
OnStale = Literal["drop", "hold", "train"]
"""What order `arrival` does with a trajectory older than τ when a step comes to it."""


def step_of(index: int, batch_size: int) -> int:
    """The learner step that trains `index`."""
    return index // batch_size


def required_version(index: int, *, batch_size: int, max_staleness: int) -> int:
    """The oldest policy version under which `index` may start; never below 0."""
    return max(0, step_of(index, batch_size) - max_staleness)


def may_start(index: int, version: int, *, batch_size: int, max_staleness: int) -> bool:
    """Admission: may trajectory `index` start while `version` is the newest published one?"""
    return version >= required_version(index, batch_size=batch_size, max_staleness=max_staleness)


def staleness_in_force(max_staleness: int, *, drift_nats: float, max_drift: float | None) -> int:
    """τ, or 0 while the drift that the learner's last step measured exceeds `max_drift`.

    Never a lower bound on versions beyond τ = 0's, so nothing that the next version needs ever waits for it.

    Args:
        drift_nats: KL(p_old‖p_θ) per token of the last step; 0 before the first.
        max_drift: nats per token; None admits any drift.
    """
    return 0 if max_drift is not None and drift_nats > max_drift else max_staleness


@dataclass(frozen=True)
class Seen:
    """What a sampler knows of the run when it asks whether a shard may start."""

    version: int
    """The policy version it samples from."""
    drift_nats: float = 0.0
    """Of the last learner step it knows."""
    num_arrivals: int = 0
    """Shards that the learner has come to; order `arrival` only, as is `num_taken`."""
    num_taken: int = 0
    """Trajectories of those that steps have trained or will train."""


@dataclass(frozen=True)
class Plan:
    """How a run divides its indices: `num_steps` steps of `batch_size`, handed out in shards of `shard_size`."""

    num_steps: int
    batch_size: int
    shard_size: int
    max_staleness: int
    order: Order = "index"
    on_stale: OnStale = "train"
    """Of order `arrival` only, as is `max_ahead`: in index order nothing is ever too stale."""
    max_ahead: int = 2
    """Steps' worth of shards that may be started beyond those the learner has come to."""
    max_drift: float | None = None
    """Nats per token; None admits any drift."""

    def __post_init__(self) -> None:
        if self.batch_size % self.shard_size:
            # A shard that straddled two steps would wait for a version that waits for the shard.
            raise ConfigError(
                f"rollout.shard_size {self.shard_size} must divide learner.batch_size {self.batch_size}. "
                f"Choose one of {[d for d in range(1, self.batch_size + 1) if self.batch_size % d == 0]}."
            )

    @property
    def num_indices(self) -> int:
        """Trajectories to train. In arrival order more may be generated: what is dropped or held is made up for."""
        return self.num_steps * self.batch_size

    @property
    def num_shards(self) -> int:
        return self.num_indices // self.shard_size

    @property
    def shards_per_step(self) -> int:
        return self.batch_size // self.shard_size

    @property
    def window(self) -> int:
        """Most shards that are started and not yet consumed at any moment: nothing is to be looked for beyond."""
        return (self.max_ahead if self.order == "arrival" else self.max_staleness + 2) * self.shards_per_step

    def shard(self, number: int) -> IndexRange:
        """The `number`-th shard of the run."""
        return IndexRange(number * self.shard_size, (number + 1) * self.shard_size)

    def shards(self, first_step: int = 0) -> Iterator[IndexRange]:
        """All shards in index order, from the first of `first_step` on; endless in arrival order."""
        first = first_step * self.shards_per_step
        numbers = itertools.count(first) if self.order == "arrival" else range(first, self.num_shards)
        return (self.shard(number) for number in numbers)

    def step(self, number: int) -> IndexRange:
        """The indices learner step `number` trains."""
        return IndexRange(number * self.batch_size, (number + 1) * self.batch_size)

    def shards_of_step(self, number: int) -> list[IndexRange]:
        """The shards whose indices learner step `number` trains."""
        return [self.shard(number * self.shards_per_step + offset) for offset in range(self.shards_per_step)]

    def required_version(self, shard: IndexRange) -> int:
        """The oldest version under which the indices of `shard` may start: one number, since a shard is in one step."""
        return required_version(shard.start, batch_size=self.batch_size, max_staleness=self.max_staleness)

    def may_start(self, shard: IndexRange, version: int) -> bool:
        """Admission of a whole shard in index order, whatever the drift."""
        return may_start(shard.start, version, batch_size=self.batch_size, max_staleness=self.max_staleness)

    # -- admission ------------------------------------------------------------------------------------------------
    def is_complete(self, seen: Seen) -> bool:
        """Does every step have its trajectories, so that more would be waste? Never in index order: shards run out."""
        return self.order == "arrival" and seen.num_taken >= self.num_indices

    def admits(self, shard: IndexRange, seen: Seen) -> bool:
        """May `shard` start now? When it may not, no later shard may."""
        return self.waits_for(shard, seen) is None

    def waits_for(self, shard: IndexRange, seen: Seen) -> str | None:
        """What `shard` waits for, in words; None when it may start."""
        bound = staleness_in_force(self.max_staleness, drift_nats=seen.drift_nats, max_drift=self.max_drift)
        why = f", and the drift is {seen.drift_nats:.4g} nats" if bound < self.max_staleness else ""
        if self.order == "index":
            version = required_version(shard.start, batch_size=self.batch_size, max_staleness=bound)
            return None if seen.version >= version else f"version {version} (step {version - 1} to be trained{why})"
        return self._waits_for_arrivals(shard, seen, why)

    def _waits_for_arrivals(self, shard: IndexRange, seen: Seen, why: str) -> str | None:
        frontier = seen.num_taken // self.batch_size
        if self.on_stale != "train" and frontier - seen.version > self.max_staleness:
            # All versions up to the frontier have what they need, so this one comes without our help.
            return f"version {frontier - self.max_staleness} (what starts before it would be too stale)"
        ahead = min(self.window, -(-(self.num_indices - seen.num_taken) // self.shard_size))
        if why:
            # Only what the version after the sampler's own still lacks.
            lacking = (seen.version + 1) * self.batch_size - seen.num_taken
            ahead = min(ahead, max(0, -(-lacking // self.shard_size)))
        if shard.start < (seen.num_arrivals + ahead) * self.shard_size:
            return None
        if ahead == 0:
            return f"version {seen.version + 1} (step {seen.version} to be trained{why})"
        return f"arrivals (the learner to come to one of {ahead} shards that are ahead of it{why})"
