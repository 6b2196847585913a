"""Everything a run has stored, at one moment: what audit, collect, compact and quarantine reason about.

A run that goes on while it is listed gives a snapshot that may lack the newest objects; nothing in it is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncopd.config import RunConfig
from asyncopd.errors import StorageError
from asyncopd.types import Evaluation, Heartbeat, Manifest, PolicyVersion, Removal, Rewind, TrainStep
from storage.events import with_changes
from storage.layout import RunLayout, parse_version
from storage.learner_log import surviving
from storage.records import (
    arrival_from_json,
    claim_from_json,
    evaluation_from_json,
    failure_from_json,
    from_json,
    heartbeat_from_json,
    manifest_from_json,
    removal_from_json,
    rewind_from_json,
    spans_from_json,
    step_from_json,
)
from storage.stores.base import Entry, ObjectStore

PARSERS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "run": dict,
    "architecture": manifest_from_json,
    "trajectories": manifest_from_json,
    "scores": manifest_from_json,
    "candidates": manifest_from_json,
    "policy": manifest_from_json,
    "policy_full": manifest_from_json,
    "wanted": dict,
    "checkpoint": manifest_from_json,
    "step": step_from_json,
    "evaluation": evaluation_from_json,
    "arrival": arrival_from_json,
    "state": dict,
    "change": dict,
    "rewind": rewind_from_json,
    "claim": claim_from_json,
    "heartbeat": heartbeat_from_json,
    "spans": spans_from_json,
    "failure": failure_from_json,
    "removal": removal_from_json,
}
MANIFESTS = ("architecture", "trajectories", "scores", "candidates", "policy", "policy_full", "checkpoint")
ALIVE_S = 10.0
"""A heartbeat younger than this means a live worker, unless it retired; the default lease."""


@dataclass
class Snapshot:
    """The objects of one run, parsed; filled by `take_snapshot`."""

    store: ObjectStore
    layout: RunLayout
    entries: dict[str, Entry] = field(default_factory=dict)
    """Every object below the run's folder, by key."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> key -> what the record says; kinds without objects are present and empty."""
    broken: dict[str, StorageError] = field(default_factory=dict)
    """Records that cannot be read."""
    unknown: list[str] = field(default_factory=list)
    """Keys that the layout does not know: nothing is concluded from them, but what they name is not garbage, and those
    that carry a checksum must match it."""
    references: dict[str, list[str]] = field(default_factory=dict)
    """Data key -> keys of the manifests that promise it, quarantined ones not included."""

    set_aside: dict[str, str] = field(default_factory=dict)
    """Data key -> key of the quarantined manifest that promises it."""

    @property
    def manifests(self) -> dict[str, Manifest]:
        """All readable manifests, by key."""
        return {key: manifest for kind in MANIFESTS for key, manifest in self.records[kind].items()}

    @property
    def config(self) -> RunConfig | None:
        """The run's configuration in force; None when its record is gone, broken, or has none."""
        record = self.records["run"].get(self.layout.record, {})
        changes = [change["settings"] for _, change in sorted(self.records["change"].items())]
        try:
            return RunConfig.model_validate(with_changes(record["config"], changes))
        except (KeyError, ValueError):
            return None

    @property
    def rewinds(self) -> list[Rewind]:
        """Those that count: numbered from 1 without a gap."""
        by_number = {rewind.number: rewind for rewind in self.records["rewind"].values()}
        return [by_number[n] for n in range(1, len(by_number) + 1) if all(m in by_number for m in range(1, n + 1))]

    @property
    def removed_keys(self) -> set[str]:
        """What maintenance took out of the run on purpose."""
        removals: list[Removal] = list(self.records["removal"].values())
        return {key for removal in removals for key in removal.keys}

    def states(self, kind: str) -> list[PolicyVersion]:
        """The surviving states of `policy`, `checkpoint` or `evaluation` records, oldest first."""
        parsed = (parse_version(key) for key in self.records[kind])
        return surviving((version for version in parsed if version is not None), self.rewinds)

    def steps(self) -> list[TrainStep]:
        """The steps of the surviving lineage, in order."""
        by_state = {PolicyVersion(s.step + 1, s.rewind): s for s in self.records["step"].values()}
        return [by_state[state] for state in surviving(by_state, self.rewinds)]

    def evaluations(self) -> list[Evaluation]:
        """All evaluations, superseded ones too."""
        return list(self.records["evaluation"].values())

    def latest_checkpoint(self) -> PolicyVersion | None:
        """The newest complete checkpoint of the surviving lineage."""
        states = self.states("checkpoint")
        return states[-1] if states else None

    def alive_workers(self, role: str = "", now: float | None = None) -> list[str]:
        """Workers, of one role or all, whose heartbeat is young and that did not retire."""
        oldest = (time.time() if now is None else now) - ALIVE_S
        beats: dict[str, Heartbeat] = self.records["heartbeat"]
        return [
            beat.worker
            for key, beat in sorted(beats.items())
            if not beat.retired
            and self.entries[key].modified > oldest
            and beat.status.get("role", beat.worker.partition("-")[0]).startswith(role)
        ]


def take_snapshot(store: ObjectStore, run_id: str) -> Snapshot:
    """List a run and read all its records. A run that does not exist gives an empty snapshot."""
    layout = RunLayout(run_id)
    snapshot = Snapshot(store, layout, {entry.key: entry for entry in store.entries(layout.root)})
    snapshot.records = {kind: {} for kind in PARSERS}
    for key in list(snapshot.entries):
        kind = layout.kind_of(key)
        if kind == "unknown":
            snapshot.unknown.append(key)
        if kind in PARSERS or (kind in ("unknown", "quarantined") and key.endswith(".json")):
            _read(snapshot, kind, key)
    return snapshot


def _read(snapshot: Snapshot, kind: str, key: str) -> None:
    body = snapshot.store.find(key)
    if body is None:
        del snapshot.entries[key]  # deleted since the listing
        return
    try:
        value = from_json(body, key, PARSERS.get(kind, manifest_from_json))
    except StorageError as error:
        if kind in PARSERS or (kind == "unknown" and _is_damaged(body, key)):
            snapshot.broken[key] = error
        return
    if kind in PARSERS:
        snapshot.records[kind][key] = value
    if kind == "quarantined":
        snapshot.set_aside.update(dict.fromkeys(value.objects, key))
    elif isinstance(value, Manifest):
        for promised in value.objects:
            snapshot.references.setdefault(promised, []).append(key)


def _is_damaged(body: bytes, key: str) -> bool:
    """Is this one of our records, of whatever kind, that was not written so? Foreign files are none."""
    try:
        from_json(body, key, dict)
    except StorageError:
        return b'"schema_version"' in body or b'"sha256"' in body
    return False
