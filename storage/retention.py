"""What of a run must stay: a pure function of its policy and its history.

newest checkpoint, and the one before     a resume, also when the newest turns out corrupt
their versions, and the newest one        what samplers load while the learner goes on
checkpoint at or before the first kept    where a replay of the kept steps starts; without one, version 0
all shards from there on                  what that replay, or a resume, trains
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from asyncopd.config.retention import Retention
from asyncopd.types import PolicyVersion


@dataclass(frozen=True)
class Kept:
    """What stays."""

    checkpoints: frozenset[PolicyVersion]
    policies: frozenset[PolicyVersion]
    first_step: int
    """Shards stay unless every index of theirs was decided about by a step before this one."""


def what_to_keep(
    retention: Retention,
    *,
    checkpoints: Sequence[PolicyVersion],
    policies: Sequence[PolicyVersion],
    num_steps: int,
    first_stored: int = 0,
    wanted: Collection[int] = (),
    bases: Callable[[PolicyVersion], Iterable[PolicyVersion]] = lambda version: (),
) -> Kept:
    """
    Args:
        checkpoints: of the surviving lineage, oldest first.
        policies: of the surviving lineage, oldest first.
        num_steps: steps trained in the surviving lineage.
        first_stored: steps before this one lost their shards to an earlier policy, which may have kept less.
        wanted: version numbers somebody will still ask for, such as evaluations that are due.
        bases: the versions that the weights of a version are stored as a difference to.
    """
    count = retention.checkpoints.keep_last
    kept_checkpoints = set(checkpoints if count is None else checkpoints[-count:])
    resumable = list(checkpoints[-min(2, count or 2) :])
    last_steps = retention.shards.keep_last_steps
    first_kept = max(first_stored, 0 if last_steps is None else num_steps - last_steps)
    first_step = 0
    if first_kept > 0 and resumable:
        starts = [c for c in checkpoints if first_stored <= c.number <= first_kept]
        if starts:
            kept_checkpoints.add(starts[-1])
            first_step = min(starts[-1].number, resumable[0].number)
    numbers = {0, *wanted, *(checkpoint.number for checkpoint in kept_checkpoints)}
    every = retention.policies.keep_every
    kept_policies = {v for v in policies if v.number in numbers or (every and v.number % every == 0)}
    kept_policies |= set(policies[-retention.policies.keep_last :])
    return Kept(frozenset(kept_checkpoints), frozenset(_with_bases(kept_policies, bases)), first_step)


def _with_bases(
    versions: Iterable[PolicyVersion], bases: Callable[[PolicyVersion], Iterable[PolicyVersion]]
) -> set[PolicyVersion]:
    """`versions` and whatever their weights are differences to, all the way back."""
    found: set[PolicyVersion] = set()
    open_versions = list(versions)
    while open_versions:
        version = open_versions.pop()
        if version not in found:
            found.add(version)
            open_versions += bases(version)
    return found
