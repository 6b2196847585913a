"""What the learner leaves behind besides weights: steps, checkpoints and rewinds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from asyncopd.errors import StorageError
from asyncopd.types import PolicyVersion, TrainStep
from storage.layout import RunLayout, new_attempt, parse_version
from storage.lineage import Lineage, possible_rewinds, surviving
from storage.manifests import publish, read_manifest, read_objects
from storage.objects import ObjectStore
from storage.records import Rewind, from_json, step_from_json, step_to_json

logger = logging.getLogger(__name__)


class LearnerLog:
    """Steps, checkpoints and rewinds of one run."""

    store: ObjectStore
    layout: RunLayout
    lineage: Lineage

    def publish_step(self, step: TrainStep) -> None:
        """Record a step. Publishing the same record again is harmless.

        Raises StorageError when another record of this step and rewind exists: two learners are writing one run.
        """
        key, body = self.layout.step(step.step, step.rewind), step_to_json(step)
        if not self.store.put_if_absent(key, body) and _fields(self.store.get(key), key) != _fields(body, key):
            raise StorageError(
                f"{key} exists with another content. A step is trained once per rewind: stop the second learner, or "
                "let it record a rewind before it trains."
            )

    def find_step(self, number: int) -> TrainStep | None:
        """Step `number` of the surviving lineage."""
        # Step s made state s + 1, and counts exactly when that state does.
        for rewind in possible_rewinds(number + 1, self.lineage.rewinds()):
            key = self.layout.step(number, rewind)
            body = self.store.find(key)
            if body is not None:
                return from_json(body, key, step_from_json)
        return None

    def steps(self) -> list[TrainStep]:
        """All steps of the surviving lineage, in order; reads every one of them."""
        keys = self.store.folder(self.layout.steps).keys
        found = [version for key in keys if (version := parse_version(key)) is not None]
        states = surviving((PolicyVersion(step.number + 1, step.rewind) for step in found), self.lineage.rewinds())
        read = []
        for state in states:
            key = self.layout.step(state.number - 1, state.rewind)
            read.append(from_json(self.store.get(key), key, step_from_json))
        return read

    def publish_checkpoint(self, step: int, rewind: int, objects: Mapping[str, bytes], *, worker: str) -> None:
        """Make the state after `step` steps visible, as named bodies. A second one is discarded."""
        attempt = new_attempt()
        named = {self.layout.checkpoint_object(step, rewind, attempt, name): body for name, body in objects.items()}
        key = self.layout.checkpoint_manifest(step, rewind)
        if not publish(
            self.store, key, named, kind="checkpoint", worker=worker, facts={"step": step, "rewind": rewind}
        ):
            logger.info("%s exists already; the first one is kept", key)

    def latest_checkpoint(self) -> tuple[int, int] | None:
        """(step, rewind) of the newest complete checkpoint of the surviving lineage."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def checkpoints(self) -> list[tuple[int, int]]:
        """(step, rewind) of all complete checkpoints of the surviving lineage, oldest first."""
        keys = self.store.folder(self.layout.checkpoints).keys
        states = [version for key in keys if (version := parse_version(key)) is not None]
        return [(state.number, state.rewind) for state in surviving(states, self.lineage.rewinds())]

    def read_checkpoint(self, step: int, rewind: int) -> Mapping[str, bytes]:
        """The bodies of a checkpoint, by name.

        Raises:
            ObjectMissingError: there is no such checkpoint, or a body is gone.
            ShardCorruptError: a body is not the published one.
        """
        key = self.layout.checkpoint_manifest(step, rewind)
        bodies = read_objects(self.store, key, read_manifest(self.store, key))
        return {object_key.rsplit("/", 1)[1]: body for object_key, body in bodies.items()}

    def record_rewind(self, to_step: int, *, worker: str) -> int:
        """The learner went back to `to_step`: later steps and versions are superseded. Returns the rewind's number."""
        return self.lineage.record(to_step, worker)

    def current_rewind(self) -> int:
        """Number of the last recorded rewind, under which a learner publishes; 0 before the first."""
        return len(self.lineage.rewinds())

    def rewinds(self) -> list[Rewind]:
        """All rewinds, oldest first."""
        return self.lineage.rewinds()


def _fields(body: bytes, key: str) -> dict[str, Any]:
    """What a record says, whichever schema version says it."""
    return {name: value for name, value in from_json(body, key, dict).items() if name != "schema_version"}
