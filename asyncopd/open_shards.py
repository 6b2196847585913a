"""The shards of a plan that one worker still has to look at, in index order; in arrival order there is no last one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from asyncopd.schedule import Plan
from asyncopd.types import IndexRange


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
