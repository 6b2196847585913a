"""As-of queries: which objects had been published at a time, or when a policy version was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from asyncopd.errors import StorageError
from asyncopd.types import PolicyVersion
from storage.records import Rewind


@dataclass(frozen=True)
class AsOf:
    """A moment of a run's life; give one of the two."""

    version: int | None = None
    """The moment this policy version was published, in every run that has it."""
    time: float | None = None
    """Unix time, seconds."""

    def __post_init__(self) -> None:
        if (self.version is None) == (self.time is None):
            raise StorageError(
                f"as of version {self.version} and time {self.time}: give exactly one of the two, a version number or "
                "a time."
            )


@dataclass(frozen=True)
class Cut:
    """The same moment for one run. Versions, steps and evaluations are cut by number where a version was asked for:
    a step is recorded just after the version it made, and belongs to it."""

    time: float = math.inf
    """What was written later is not seen."""
    version: PolicyVersion | None = None
    """Higher versions, and versions of later rewinds, are not seen."""

    def has_version(self, version: PolicyVersion, written: float) -> bool:
        """Is something about `version`, written at `written`, part of the picture?"""
        if self.version is None:
            return written <= self.time
        return version.number <= self.version.number and version.rewind <= self.version.rewind

    def rewinds(self, rewinds: Iterable[Rewind]) -> list[Rewind]:
        """Those the learner had made by then."""
        return [rewind for rewind in rewinds if rewind.recorded <= self.time]
