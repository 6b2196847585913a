"""What happens to a run: steps, checkpoints and rewinds, and what counts after those; states, arrivals, failures, ...

    number n of rewind r survives  iff  no later rewind r' > r went back to a state before n  (to_step < n)

`n` counts learner steps behind a state: a policy version, a checkpoint, or step s as the state s + 1 it made.
No rewind supersedes an arrival, what the learner decided about a shard in order `arrival`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from asyncopd.errors import StorageError
from asyncopd.records import Facts, Failure, Rewind, RunChange, RunState, RunStateName
from asyncopd.schedule import Arrival
from asyncopd.types import Evaluation, PolicyVersion, Span, TrainStep
from storage.layout import RunLayout, new_nonce, parse_version
from storage.manifests import publish, read_named
from storage.records import NumberedRecords, from_json, to_json
from storage.stores.base import ObjectStore

logger = logging.getLogger(__name__)


class EventLog:
    """What happened to one run besides its shards and weights; and what it is."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        self.layout = layout = RunLayout(run_id)
        self._states = NumberedRecords(store, layout, "state", RunState)
        self._changes = NumberedRecords(store, layout, "change", RunChange)
        self._arrivals = NumberedRecords(store, layout, "arrival", Arrival, first=0)
        self._rewinds = NumberedRecords(store, layout, "rewind", Rewind)

    # -- states and settings --------------------------------------------------------------------------------------
    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What `create_run` stored: config, config_hash, code_version, created, parent. Read once, then remembered."""
        key = self.layout.key("run")
        return from_json(self.store.get(key), key, dict)

    def run_state(self) -> RunState | None:
        """The latest state; None while nobody recorded one. One request when nothing changed, so it can be polled."""
        return next(reversed(self._states.read()), None)

    def record_state(self, state: RunStateName, *, by: str, reason: str = "") -> int:
        """Append a state. `by` names the flow run, so that a flow ends only what it began itself."""
        return self._states.append(lambda number: RunState(number, state, reason, by, time.time()))

    def config(self) -> dict[str, Any]:
        """The configuration in force: the recorded one, with every change since, in the root it is read from."""
        return config_in_force(self.record["config"], self.changes(), root=self.store.url)

    def changes(self) -> list[RunChange]:
        """Every change of settings, oldest first."""
        return self._changes.read()

    def record_change(self, settings: Mapping[str, tuple[Any, Any]]) -> int:
        """Append a change: dotted key -> (old value, new value). In force for every process started afterwards."""
        return self._changes.append(lambda _: RunChange(settings, time.time()))

    # -- the learner's ---------------------------------------------------------------------------------------------
    def publish_step(self, step: TrainStep) -> None:
        """Record a step. Publishing the same record again is harmless.

        Raises StorageError when another record of this step and rewind exists: two learners are writing one run.
        """
        key, body = self.layout.step(step.step, step.rewind), to_json(step)
        if self.store.put_if_absent(key, body):
            return
        if from_json(self.store.get(key), key, dict) != from_json(body, key, dict):
            raise StorageError(
                f"{key} exists with another content. A step is trained once per rewind: stop the second learner, or "
                "let it record a rewind before it trains."
            )

    def find_step(self, number: int) -> TrainStep | None:
        """Step `number` of the surviving lineage."""
        # Step s made state s + 1, and counts exactly when that state does.
        keys = (self.layout.step(number, rewind) for rewind in possible_rewinds(number + 1, self.rewinds()))
        found = ((key, self.store.find(key)) for key in keys)
        return next((from_json(body, key, TrainStep) for key, body in found if body is not None), None)

    def steps(self) -> list[TrainStep]:
        """All steps of the surviving lineage, in order; reads every one of them."""
        made = [PolicyVersion(step.number + 1, step.rewind) for step in self._stored("step")]
        states = surviving(made, self.rewinds())
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
        return next(reversed(self.checkpoints()), None)

    def checkpoints(self) -> list[tuple[int, int]]:
        """(step, rewind) of all complete checkpoints of the surviving lineage, oldest first."""
        return [(state.number, state.rewind) for state in self.surviving_states("checkpoint")]

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
        return self._rewinds.append(lambda number: Rewind(number, to_step, worker, time.time()))

    def current_rewind(self) -> int:
        """Number of the last recorded rewind, under which a learner publishes; 0 before the first."""
        return len(self.rewinds())

    def rewinds(self) -> list[Rewind]:
        """All rewinds, oldest first. One request when there is no new one."""
        return self._rewinds.read()

    def surviving_states(self, kind: str) -> list[PolicyVersion]:
        """The states with a policy, checkpoint or evaluation that count, oldest first."""
        return surviving(self._stored(kind), self.rewinds())

    def _stored(self, kind: str) -> list[PolicyVersion]:
        """The states of all policies, checkpoints, steps or evaluations, superseded ones too."""
        keys = self.store.folder(self.layout.folder(kind)).keys
        return [state for key in keys if (state := parse_version(key)) is not None]

    # -- observations ---------------------------------------------------------------------------------------------
    def publish_evaluation(self, evaluation: Evaluation) -> None:
        """Record the quality of one version; the first evaluation of a version is kept."""
        self.store.put_if_absent(self.layout.key("evaluation", state=evaluation.version), to_json(evaluation))

    def evaluations(self) -> list[Evaluation]:
        """Evaluations of the surviving lineage, by version. Raises ShardCorruptError."""
        keys = [self.layout.key("evaluation", state=version) for version in self.surviving_states("evaluation")]
        return [from_json(self.store.get(key), key, Evaluation) for key in keys]

    def publish_spans(self, worker: str, sequence: int, spans: Sequence[Span]) -> None:
        """Write the `sequence`-th batch of a worker's spans; writing it again replaces it."""
        self.store.put(self.layout.key("spans", worker=worker, sequence=sequence), to_json(list(spans)))

    def publish_failure(self, role: str, worker: str, reason: str) -> None:
        """Record why a role failed; every call adds a record."""
        now = time.time()
        key = self.layout.key("failure", unix_ms=int(now * 1000), role=role, worker=worker)
        self.store.put(key, to_json(Failure(role, worker, reason, now)))

    def failures(self) -> list[Failure]:
        """All failures, oldest first. Raises ShardCorruptError."""
        keys = self.store.list(self.layout.folder("failure"))
        return [from_json(self.store.get(key), key, Failure) for key in keys]

    # -- arrivals -------------------------------------------------------------------------------------------------
    def arrivals(self) -> list[Arrival]:
        """All arrivals, in order. They are numbered without gaps, so one request tells that there is no new one."""
        return self._arrivals.read()

    def record_arrival(self, arrival: Arrival) -> bool:
        """False when this number was recorded before, by another learner or before a crash; that record counts."""
        return self._arrivals.write(arrival.number, arrival)


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


def config_in_force(recorded: Mapping[str, Any], changes: Iterable[RunChange], *, root: str) -> dict[str, Any]:
    """The configuration after `changes`, oldest first, in the storage root that it is read from."""
    config: dict[str, Any] = copy.deepcopy(dict(recorded))
    for dotted, (_, new) in (item for change in changes for item in change.settings.items()):
        *sections, name = dotted.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = new
    # A run that was copied elsewhere goes on there.
    config.setdefault("storage", {})["root"] = root
    return config
