"""What the learner leaves behind besides weights: steps, checkpoints and rewinds, and what counts after a rewind.

    number n of rewind r survives  iff  no later rewind r' > r went back to a state before n  (to_step < n)

`n` counts learner steps behind a state: a policy version, a checkpoint, or step s as the state s + 1 it made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from asyncopd.errors import StorageError
from asyncopd.records import Facts, Rewind
from asyncopd.types import PolicyVersion, TrainStep
from storage.layout import RunLayout, new_nonce, parse_version
from storage.manifests import publish, read_named
from storage.records import NumberedRecords, from_json, to_json
from storage.stores.base import ObjectStore

logger = logging.getLogger(__name__)


class Lineage(NumberedRecords[Rewind]):
    """The rewinds of one run, cached."""

    def __init__(self, store: ObjectStore, layout: RunLayout) -> None:
        super().__init__(store, layout, "rewind", Rewind)

    def stored(self, kind: str) -> list[PolicyVersion]:
        """The states of all policies, checkpoints, steps or evaluations that are stored, superseded ones too."""
        keys = self._store.folder(self._layout.folder(kind)).keys
        return sorted({state for key in keys if (state := parse_version(key)) is not None})

    def surviving(self, kind: str) -> list[PolicyVersion]:
        """Those of `stored` that count, oldest first."""
        return surviving(self.stored(kind), self.read())


def survives(number: int, rewind: int, rewinds: Iterable[Rewind]) -> bool:
    """Does the state after `number` steps, published under `rewind`, count in the surviving lineage?"""
    return all(later.to_step >= number for later in rewinds if later.number > rewind)


def surviving(versions: Iterable[PolicyVersion], rewinds: list[Rewind]) -> list[PolicyVersion]:
    """The versions that count, oldest first; of a number published under several rewinds, the latest rewind's."""
    newest = {
        version.number: version for version in sorted(versions) if survives(version.number, version.rewind, rewinds)
    }
    return list(newest.values())


def possible_rewinds(number: int, rewinds: list[Rewind]) -> Iterator[int]:
    """The rewinds under which state `number` may have been published and count, latest first."""
    for rewind in range(len(rewinds), -1, -1):
        yield rewind
        if rewind and rewinds[rewind - 1].to_step < number:
            return


class LearnerLog:
    """Steps, checkpoints and rewinds of one run."""

    store: ObjectStore
    layout: RunLayout
    lineage: Lineage

    def publish_step(self, step: TrainStep) -> None:
        """Record a step. Publishing the same record again is harmless.

        Raises StorageError when another record of this step and rewind exists: two learners are writing one run.
        """
        key, body = self.layout.step(step.step, step.rewind), to_json(step)
        if not self.store.put_if_absent(key, body) and _fields(self.store.get(key), key) != _fields(body, key):
            raise StorageError(
                f"{key} exists with another content. A step is trained once per rewind: stop the second learner, or "
                "let it record a rewind before it trains."
            )

    def find_step(self, number: int) -> TrainStep | None:
        """Step `number` of the surviving lineage."""
        # Step s made state s + 1, and counts exactly when that state does.
        for rewind in possible_rewinds(number + 1, self.lineage.read()):
            key = self.layout.step(number, rewind)
            body = self.store.find(key)
            if body is not None:
                return from_json(body, key, TrainStep)
        return None

    def steps(self) -> list[TrainStep]:
        """All steps of the surviving lineage, in order; reads every one of them."""
        made = [PolicyVersion(step.number + 1, step.rewind) for step in self.lineage.stored("step")]
        states = surviving(made, self.lineage.read())
        keys = [self.layout.step(state.number - 1, state.rewind) for state in states]
        return [from_json(self.store.get(key), key, TrainStep) for key in keys]

    def publish_checkpoint(self, step: int, rewind: int, objects: Mapping[str, bytes], *, worker: str) -> None:
        """Make the state after `step` steps visible, as named bodies. A second one is discarded."""
        fields = {"state": PolicyVersion(step, rewind), "nonce": new_nonce()}
        named = {self.layout.key("checkpoint.data", **fields, object=name): body for name, body in objects.items()}
        key = self.layout.checkpoint_manifest(step, rewind)
        if not publish(self.store, key, named, kind="checkpoint", worker=worker, facts=Facts(step=step, rewind=rewind)):
            logger.info("%s exists already; the first one is kept", key)

    def latest_checkpoint(self) -> tuple[int, int] | None:
        """(step, rewind) of the newest complete checkpoint of the surviving lineage."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def checkpoints(self) -> list[tuple[int, int]]:
        """(step, rewind) of all complete checkpoints of the surviving lineage, oldest first."""
        return [(state.number, state.rewind) for state in self.lineage.surviving("checkpoint")]

    def read_checkpoint(self, step: int, rewind: int) -> Mapping[str, bytes]:
        """The bodies of a checkpoint, by name.

        Raises:
            ObjectMissingError: there is no such checkpoint, or a body is gone.
            ShardCorruptError: a body is not the published one.
        """
        return read_named(self.store, self.layout.checkpoint_manifest(step, rewind))

    def record_rewind(self, to_step: int, *, worker: str) -> int:
        """The learner went back to `to_step`: later steps and versions are superseded. Returns the rewind's number.

        Several writers get different numbers. Raises StorageError when `to_step` is negative.
        """
        if to_step < 0:
            raise StorageError(f"cannot rewind {self.layout.run_id} to step {to_step}; expected 0 or more.")
        return self.lineage.append(lambda number: Rewind(number, to_step, worker, time.time()))

    def current_rewind(self) -> int:
        """Number of the last recorded rewind, under which a learner publishes; 0 before the first."""
        return len(self.lineage.read())

    def rewinds(self) -> list[Rewind]:
        """All rewinds, oldest first."""
        return self.lineage.read()


def _fields(body: bytes, key: str) -> dict[str, Any]:
    """What a record says, whichever schema version says it."""
    return {name: value for name, value in from_json(body, key, dict).items() if name != "schema_version"}
