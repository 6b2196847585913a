"""What happens to a run besides its steps: decisions about it, arrivals, evaluations, spans, failures.

states/0001.json      running | stopped | failed | completed, written by the flow; workers elsewhere read it
changes/0001.json     settings that a resume changed; the configuration in force is run.json with these applied
arrivals/000017.json  order `arrival`: what the learner decided about a shard; no rewind supersedes it
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from asyncopd.records import Failure, RunChange, RunState, RunStateName
from asyncopd.schedule import Arrival
from asyncopd.types import Evaluation, Span
from storage.layout import RunLayout
from storage.learner_log import Lineage
from storage.records import NumberedRecords, from_json, to_json
from storage.stores.base import ObjectStore


class EventLog:
    """What happened to one run besides its steps; and what it is."""

    store: ObjectStore
    layout: RunLayout
    lineage: Lineage

    def __init__(self) -> None:
        self._record: Mapping[str, Any] | None = None
        self._states = NumberedRecords(self.store, self.layout, "state", RunState)
        self._changes = NumberedRecords(self.store, self.layout, "change", RunChange)
        self._arrivals = NumberedRecords(self.store, self.layout, "arrival", Arrival, first=0)

    # -- states and settings --------------------------------------------------------------------------------------
    @property
    def record(self) -> Mapping[str, Any]:
        """What `create_run` stored: config, config_hash, code_version, created, parent. Read once, then remembered."""
        if self._record is None:
            key = self.layout.key("run")
            self._record = from_json(self.store.get(key), key, dict)
        return self._record

    def run_state(self) -> RunState | None:
        """The latest state; None while nobody recorded one. One request when nothing changed, so it can be polled."""
        states = self._states.read()
        return states[-1] if states else None

    def record_state(self, state: RunStateName, *, by: str, reason: str = "") -> int:
        """Append a state. `by` names the flow run, so that a flow ends only what it began itself."""
        return self._states.append(lambda number: RunState(number, state, reason, by, time.time()))

    def config(self) -> dict[str, Any]:
        """The configuration in force: the recorded one, with every change since, in the root it is read from."""
        config = with_changes(self.record["config"], (change.settings for change in self.changes()))
        # A run that was copied elsewhere goes on there.
        config.setdefault("storage", {})["root"] = self.store.url
        return config

    def changes(self) -> list[RunChange]:
        """Every change of settings, oldest first."""
        return self._changes.read()

    def record_change(self, settings: Mapping[str, tuple[Any, Any]]) -> int:
        """Append a change: dotted key -> (old value, new value). In force for every process started afterwards."""
        return self._changes.append(lambda _: RunChange(settings, time.time()))

    # -- observations ---------------------------------------------------------------------------------------------
    def publish_evaluation(self, evaluation: Evaluation) -> None:
        """Record the quality of one version; the first evaluation of a version is kept."""
        self.store.put_if_absent(self.layout.key("evaluation", state=evaluation.version), to_json(evaluation))

    def evaluations(self) -> list[Evaluation]:
        """Evaluations of the surviving lineage, by version. Raises ShardCorruptError."""
        keys = [self.layout.key("evaluation", state=version) for version in self.lineage.surviving("evaluation")]
        return [from_json(self.store.get(key), key, Evaluation) for key in keys]

    def publish_spans(self, worker: str, sequence: int, spans: Sequence[Span]) -> None:
        """Write the `sequence`-th batch of a worker's spans; writing it again replaces it."""
        self.store.put(self.layout.key("spans", worker=worker, sequence=sequence), to_json(list(spans)))

    def spans(self) -> list[Span]:
        """All spans of all workers, by start. Raises ShardCorruptError."""
        keys = self.store.list(self.layout.folder("spans"))
        spans = [span for key in keys for span in from_json(self.store.get(key), key, list[Span])]
        return sorted(spans, key=lambda span: span.start)

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


def with_changes(config: Mapping[str, Any], changes: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
    """`config` after `changes`, oldest first, each dotted key -> (old value, new value)."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for settings in changes:
        for dotted, (_, new) in settings.items():
            *sections, name = dotted.split(".")
            section = changed
            for part in sections:
                section = section[part]
            section[name] = new
    return changed
