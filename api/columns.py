"""The numbers of a run's steps as columns that grow, and their means over stretches of steps."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asyncopd.types import TrainStep

STEP, FINISHED, NUM_TOKENS = "step", "finished", "num_tokens"
"""Columns that every step has. Metrics have a slash in their names, so that these cannot be one."""


class Columns:
    """Values of the first `num` steps of a lineage. Appended in place: an older value of this class is a prefix."""

    def __init__(self, columns: dict[str, array[float]] | None = None, num: int = 0) -> None:
        self._columns = {} if columns is None else columns
        self.num = num

    def extended(self, steps: Sequence[TrainStep], num_kept: int) -> Columns:
        """The columns of `steps`, of which the first `num_kept` are in these. One caller at a time."""
        # What a rewind took away may still be read by somebody: that needs columns of its own.
        columns = self._columns if num_kept == self.num else {n: c[:num_kept] for n, c in self._columns.items()}
        for place, step in enumerate(steps[num_kept:], start=num_kept):
            own = {STEP: step.step, FINISHED: step.finished, NUM_TOKENS: step.num_tokens}
            for name, value in {**own, **step.metrics}.items():
                column = columns.setdefault(name, array("d"))
                del column[place:]  # left by a look that failed halfway
                column.extend([math.nan] * (place - len(column)))
                column.append(value)
        return Columns(columns, len(steps))

    def metrics(self) -> list[str]:
        """Names of the metrics, sorted."""
        return sorted(name for name in list(self._columns) if name not in (STEP, FINISHED, NUM_TOKENS))

    def values(self, name: str) -> NDArray[np.float64]:
        """One value a step, NaN where a step has none; a copy."""
        found = np.full(self.num, np.nan)
        stored = self._columns[name][: self.num] if name in self._columns else array("d")
        found[: len(stored)] = stored
        return found


def stretches(num: int, max_points: int) -> NDArray[np.int64]:
    """Where each of at most `max_points` stretches of `num` steps begins."""
    return np.arange(0, num, max(1, -(-num // max_points)))


def means(values: NDArray[np.float64], starts: NDArray[np.int64]) -> list[float | None]:
    """Mean of the finite values of each stretch; None where there is none."""
    if not len(values):
        return []
    finite = np.isfinite(values)
    nums = np.add.reduceat(finite, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    return [total / num if num else None for total, num in zip(sums.tolist(), nums.tolist(), strict=True)]
