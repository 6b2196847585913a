"""Which index belongs to which step and shard, and when it may start: pure functions, the one scheduling rule.

    index a --(belongs to)--> step floor(a/B)        learner step s trains [s·B, (s+1)·B)
            --(may start)---> once a version >= floor(a/B) − τ is published

B is the batch size, τ the maximal staleness in versions. τ = 0 is synchronous, τ = n is n-step-off, larger is
asynchronous: one rule, no modes. A trajectory is consumed under version floor(a/B), so its staleness is at most τ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from asyncopd.errors import ConfigError
from asyncopd.types import IndexRange

LEARNER_PLACE = IndexRange(0, 1)
"""Under stage `learn` workers claim the one place of a learner, not indices."""


def step_of(index: int, batch_size: int) -> int:
    """The learner step that trains `index`."""
    return index // batch_size


def required_version(index: int, *, batch_size: int, max_staleness: int) -> int:
    """The oldest policy version under which `index` may start; never below 0."""
    return max(0, step_of(index, batch_size) - max_staleness)


def may_start(index: int, version: int, *, batch_size: int, max_staleness: int) -> bool:
    """Admission: may trajectory `index` start while `version` is the newest published one?"""
    return version >= required_version(index, batch_size=batch_size, max_staleness=max_staleness)


@dataclass(frozen=True)
class Plan:
    """How a run divides its indices: `num_steps` steps of `batch_size`, handed out in shards of `shard_size`."""

    num_steps: int
    batch_size: int
    shard_size: int
    max_staleness: int

    def __post_init__(self) -> None:
        if self.batch_size % self.shard_size:
            # A shard that straddled two steps would wait for a version that waits for the shard.
            raise ConfigError(
                f"rollout.shard_size {self.shard_size} must divide learner.batch_size {self.batch_size}. "
                f"Choose one of {[d for d in range(1, self.batch_size + 1) if self.batch_size % d == 0]}."
            )

    @property
    def num_indices(self) -> int:
        return self.num_steps * self.batch_size

    @property
    def num_shards(self) -> int:
        return self.num_indices // self.shard_size

    def shard(self, number: int) -> IndexRange:
        """The `number`-th shard of the run."""
        return IndexRange(number * self.shard_size, (number + 1) * self.shard_size)

    def shards(self, first_step: int = 0) -> Iterator[IndexRange]:
        """All shards in index order, from the first of `first_step` on."""
        per_step = self.batch_size // self.shard_size
        return (self.shard(number) for number in range(first_step * per_step, self.num_shards))

    def step(self, number: int) -> IndexRange:
        """The indices learner step `number` trains."""
        return IndexRange(number * self.batch_size, (number + 1) * self.batch_size)

    def shards_of_step(self, number: int) -> list[IndexRange]:
        """The shards whose indices learner step `number` trains."""
        per_step = self.batch_size // self.shard_size
        return [self.shard(number * per_step + offset) for offset in range(per_step)]

    def required_version(self, shard: IndexRange) -> int:
        """The oldest version under which the indices of `shard` may start: one number, since a shard is in one step."""
        return required_version(shard.start, batch_size=self.batch_size, max_staleness=self.max_staleness)

    def may_start(self, shard: IndexRange, version: int) -> bool:
        """Admission of a whole shard."""
        return may_start(shard.start, version, batch_size=self.batch_size, max_staleness=self.max_staleness)
