"""What a run keeps. Nothing is removed before `asyncopd maintain collect` runs, and never what a resume needs."""

from __future__ import annotations

from pydantic import Field

from asyncopd.config.frozen import Frozen


class KeepCheckpoints(Frozen):
    keep_last: int | None = Field(3, ge=1)
    """Newest checkpoints of the surviving lineage. A resume needs one; two more are there should it be corrupt. null
    keeps all."""


class KeepPolicies(Frozen):
    keep_every: int = Field(1, ge=0)
    """Versions whose number this divides. 1 keeps all: weights are what a run is for, and small ones cost little. 0
    keeps none for their number."""
    keep_last: int = Field(10, ge=1)
    """Newest versions. Samplers and the evaluator may still be reading the last few."""


class KeepShards(Frozen):
    keep_last_steps: int | None = Field(None, ge=1)
    """Newest steps whose trajectories and scores stay, so that they can be trained again. null keeps all: a run that
    lost them cannot be replayed from its beginning."""


class Retention(Frozen):
    checkpoints: KeepCheckpoints = KeepCheckpoints()
    policies: KeepPolicies = KeepPolicies()
    shards: KeepShards = KeepShards()
    superseded: bool = False
    """Keep versions and checkpoints that the learner went back over. No resume and no replay reads them."""
    grace_s: float = Field(3600.0, ge=0)
    """Nothing younger is removed: it may belong to a reader or writer that is about to use it."""
    quarantine_s: float = Field(7 * 86400.0, ge=0)
    """How long data set aside by `maintain quarantine` can be looked at, or put back."""
