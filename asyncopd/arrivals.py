"""Order `arrival`: which trajectories a step takes when it takes what was scored first. Pure values and functions.

    score manifests --first scored, first taken--> Arrival 0, 1, 2, ...  (storage: written once, before anything trains)
    rows of the arrivals, one after the other:   dropped    filtered earlier, or too stale and on_stale is drop
                                                 held       too stale and on_stale is hold
                                                 taken      position p = 0, 1, 2, ...; step floor(p/B) trains it

The arrivals give every trained trajectory a position, and positions are to this order what indices are to index order:
step s trains positions [s·B, (s+1)·B). So whatever crashes, a step has its trajectories for good as soon as they are
recorded, and a learner that went back trains the same ones again. What a step takes does not depend on rewinds.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from asyncopd.schedule import Plan
from asyncopd.types import IndexRange

STALE = "stale"
"""The reason of what is dropped or held because it is older than τ."""


@dataclass(frozen=True)
class Arrival:
    """The `number`-th shard that the learner came to, and what it decided about its indices."""

    number: int
    """0, 1, 2, ... without gaps."""
    shard: IndexRange
    num_taken_before: int
    """Position of the first trajectory it takes."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Index -> reason; filtered earlier, or too stale."""
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
