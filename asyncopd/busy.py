"""How busy a process is: the share of the last seconds in which it had at least one piece of work in hand."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

WINDOW_S = 10.0
"""Long enough to cover several steps of a small run, short enough to follow a change."""


class BusyShare:
    """Counts overlapping pieces of work as one; used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._num_in_hand = 0
        self._since = 0.0
        self._stretches: deque[tuple[float, float]] = deque()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The body is a piece of work."""
        if self._num_in_hand == 0:
            self._since = self._clock()
        self._num_in_hand += 1
        try:
            yield
        finally:
            self._num_in_hand -= 1
            if self._num_in_hand == 0:
                self._stretches.append((self._since, self._clock()))

    def share(self) -> float:
        """Busy part of the last WINDOW_S, or of the time since construction when that is shorter; 0 to 1."""
        now = self._clock()
        start = max(self._began, now - WINDOW_S)
        while self._stretches and self._stretches[0][1] <= start:
            self._stretches.popleft()
        busy_s = sum(end - max(begin, start) for begin, end in self._stretches)
        if self._num_in_hand:
            busy_s += now - max(self._since, start)
        return busy_s / (now - start) if now > start else 0.0
