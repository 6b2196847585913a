"""Which index belongs to which step and shard, and when it may start: pure functions, the one scheduling rule.

    index a --(belongs to)--> step floor(a/B)        learner step s trains [s·B, (s+1)·B)
            --(may start)---> once its sampler has a version >= floor(a/B) − τ

B is the batch size, τ the maximal staleness in versions. τ = 0 is synchronous, τ = n is n-step-off, larger is
asynchronous: one rule, no modes. A trajectory is consumed under version floor(a/B), so its staleness is at most τ.

While the drift that the learner measured exceeds `max_drift`, τ is 0: what the next version needs may start, the rest
waits for it. In order `arrival` a step takes what was scored first:

    score manifests --first scored, first taken--> Arrival 0, 1, 2, ...  (storage: written once, before anything trains)
    rows of the arrivals, one after the other:   dropped    by an earlier stage, or too stale and on_stale is drop
                                                 held       too stale and on_stale is hold
                                                 taken      position p = 0, 1, 2, ...; step floor(p/B) trains it

The arrivals give every trained trajectory a position, and positions are to this order what indices are to index order:
step s trains positions [s·B, (s+1)·B). So whatever crashes, a step has its trajectories for good as soon as they are
recorded, and a learner that went back trains the same ones again. What a step takes does not depend on rewinds.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from asyncopd.errors import ConfigError
from asyncopd.types import IndexRange

LEARNER_PLACE = IndexRange(0, 1)
"""Under stage `learn` workers claim the one place of a learner, not indices."""
Order = Literal["index", "arrival"]
"""`index`: a step trains its own index range. `arrival`: it trains what was scored first."""
OnStale = Literal["drop", "hold", "train"]
"""What order `arrival` does with a trajectory staler than τ when a step comes to it."""


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


STALE = "stale"
"""The reason of what is dropped or held because it is staler than τ."""


@dataclass(frozen=True)
class Arrival:
    """The `number`-th shard that the learner came to, and what it decided about its indices."""

    number: int
    """0, 1, 2, ... without gaps."""
    shard: IndexRange
    num_taken_before: int
    """Position of the first trajectory it takes."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Index -> reason: dropped by an earlier stage, or too stale."""
    held: Mapping[int, str] = field(default_factory=dict)
    """Index -> reason."""

    @property
    def taken(self) -> tuple[int, ...]:
        """The indices it takes, in index order: positions `num_taken_before`, `num_taken_before` + 1, ..."""
        return tuple(i for i in self.shard.indices if i not in self.dropped and i not in self.held)

    @property
    def num_taken(self) -> int:
        """Trajectories taken by this and all earlier arrivals."""
        return self.num_taken_before + len(self.shard) - len(self.dropped) - len(self.held)

    def taken_by(self, step: int, batch_size: int) -> tuple[int, ...]:
        """Those of the indices it takes that `step` trains."""
        first = step * batch_size - self.num_taken_before
        return self.taken[max(0, first) : max(0, first + batch_size)]

    def steps(self, batch_size: int) -> Iterator[tuple[int, int]]:
        """(index, step that decided about it) of the whole shard, in index order."""
        position = self.num_taken_before
        for index in self.shard.indices:
            yield index, position // batch_size
            position += index not in self.dropped and index not in self.held


def num_taken(arrivals: Sequence[Arrival]) -> int:
    """Trajectories that all arrivals so far take."""
    return arrivals[-1].num_taken if arrivals else 0


def judge(
    plan: Plan,
    shard: IndexRange,
    *,
    earlier: Sequence[Arrival],
    oldest_version: Mapping[int, int],
    dropped: Mapping[int, str],
) -> Arrival:
    """Decide about every index of a shard that the learner comes to.

    A trajectory's staleness is that of its oldest token under the step that would train it. It is judged once: what is
    taken stays taken.

    Args:
        earlier: all arrivals so far.
        oldest_version: index -> lowest version among its tokens, for every index that was not dropped before.
        dropped: index -> reason, for the others.
    """
    gone, held = dict(dropped), dict[int, str]()
    before = position = num_taken(earlier)
    for index in shard.indices:
        if index in gone:
            continue
        too_stale = position // plan.batch_size - oldest_version[index] > plan.max_staleness
        if too_stale and plan.on_stale != "train":
            (gone if plan.on_stale == "drop" else held)[index] = STALE
        else:
            position += 1
    return Arrival(len(earlier), shard, before, gone, held)


def arrivals_of_step(arrivals: Sequence[Arrival], step: int, batch_size: int) -> Sequence[Arrival]:
    """The arrivals with an index that `step` decided about."""
    start, stop = step * batch_size, (step + 1) * batch_size
    first = bisect.bisect_left(arrivals, start, key=lambda arrival: arrival.num_taken_before)
    if first and arrivals[first - 1].num_taken > start:
        first -= 1
    return arrivals[first : bisect.bisect_left(arrivals, stop, key=lambda arrival: arrival.num_taken_before)]


class OpenShards:
    """Neither done by anybody, as far as this worker saw, nor claimed by this worker."""

    def __init__(self, plan: Plan) -> None:
        self._rest = plan.shards()
        self._known: list[IndexRange] = []

    def __iter__(self) -> Iterator[IndexRange]:
        """In index order; `remove` may be called on the way."""
        yield from list(self._known)
        for shard in self._rest:
            self._known.append(shard)
            yield shard

    @property
    def first(self) -> IndexRange | None:
        """The lowest one; None when there is none left."""
        return next(iter(self), None)

    def window(self, count: int) -> list[IndexRange]:
        """The lowest `count`."""
        return list(itertools.islice(self, count))

    def remove(self, shard: IndexRange) -> None:
        """Raises StopIteration when it is no shard of the plan, or was removed before."""
        while shard not in self._known:
            self._known.append(next(self._rest))
        self._known.remove(shard)
