"""How long tests wait: seconds of a machine of one's own, stretched while others keep this one busy."""

from __future__ import annotations

import os


def stretched(seconds: float) -> float:
    """`seconds`, times how many runnable processes there are for each core, and half as many again."""
    return seconds * max(1.0, 1.5 * os.getloadavg()[0] / (os.cpu_count() or 1))
