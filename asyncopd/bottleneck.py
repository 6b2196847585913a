"""Which role holds the others up now, from how busy each says it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SATURATED = 0.75
"""A role busy for less of the time waits itself, so no single one holds the others up. The workers' shares are of the
last ten seconds (asyncopd/busy.py)."""
_STAGES = ("rollout", "score", "learn")


def bottleneck(shares: Mapping[str, Sequence[float]]) -> str | None:
    """The bottleneck of a run in one sentence; None while fewer than two of rollout, score and learn are known.

    Args:
        shares: role -> busy share of each of its workers, 0 to 1.
    """
    busy = {role: sum(shares[role]) / len(shares[role]) for role in _STAGES if shares.get(role)}
    if len(busy) < 2:
        return None
    first, *others = sorted(busy, key=lambda role: busy[role], reverse=True)
    if busy[first] < SATURATED:
        told = ", ".join(f"{role} is busy {busy[role]:.0%}" for role in (first, *others))
        return f"no role is the bottleneck, they wait for each other: {told} of the last seconds"
    waiting = [role for role in others if busy[role] < SATURATED]
    if not waiting:
        return f"{first} and {' and '.join(others)} are busy all the time: nothing waits, the machine is the bottleneck"
    shown = ", ".join(f"{role} {busy[role]:.0%}" for role in others)
    verb = "waits" if len(waiting) == 1 else "wait"
    told = f"(busy: {first} {busy[first]:.0%}, {shown})"
    return f"{first} is the bottleneck: {' and '.join(waiting)} {verb} for it {told}"
