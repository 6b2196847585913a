"""Is everything a run has stored what it should be? Reads all of it and changes nothing.

    listing --> records (parsed, checksums) --> data objects (size, sha256, rows, indices)
                                            --> lineage (versions, steps, checkpoints, rewinds)
                                            --> conservation (every index in one state)     --> findings

A running run may be audited: what is young is not garbage yet, and what a second look does not find again was only in
progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from typing import Any

from storage.layout import parse, shared_key
from storage.maintain.checks import DataChecks, check_conservation, check_lineage
from storage.maintain.findings import AuditReport, Finding, Mend
from storage.run_view import MANIFESTS, RunView
from storage.stores.base import ObjectStore

GRACE_S = 3600.0
"""Unreferenced objects younger than this may belong to a writer that has not come to its manifest yet."""
RECENT_S = 60.0
"""A run that wrote something this recently is looked at twice."""
Progress = Callable[[int, int, str], None]
"""Called with (data objects verified, of how many, key)."""
_SAID: Mapping[str, Callable[[Any], object]] = {
    "step": lambda step: (step.step, step.rewind),
    "evaluation": lambda evaluation: astuple(evaluation.version),
    "checkpoint": lambda manifest: (manifest.facts.step, manifest.facts.rewind),
    "trajectories": lambda manifest: manifest.facts.index_range,
    "scores": lambda manifest: manifest.facts.index_range,
    "rewind": lambda rewind: rewind.number,
}
"""Kind -> what a record itself says it is about, in the words of its key."""


def audit_run(
    store: ObjectStore,
    run_id: str,
    *,
    grace_s: float = GRACE_S,
    recheck_s: float = 3.0,
    on_progress: Progress = lambda done, total, key: None,
) -> AuditReport:
    """Verify every object of a run and what they say together.

    Args:
        grace_s: age, seconds, from which unreferenced objects and temporary files count as garbage.
        recheck_s: pause, seconds, before the second look at a run that goes on.
    Raises:
        StorageError: the store does not answer.
    """
    started = time.time()
    checks = DataChecks(store, Mend(store.url, run_id), on_progress)
    view, findings = _look(store, run_id, grace_s, checks)
    newest = max((entry.modified for entry in view.entries.values()), default=0.0)
    if findings and started - newest < RECENT_S:
        time.sleep(recheck_s)
        view, again = _look(store, run_id, grace_s, checks)
        seen = {(finding.problem, finding.key) for finding in findings}
        findings = [finding for finding in again if (finding.problem, finding.key) in seen]
    return AuditReport(
        run_id=run_id,
        root=store.url,
        num_objects=len(view.entries),
        num_bytes=sum(entry.size_bytes for entry in view.entries.values()),
        num_verified=len(checks.verified),
        seconds=time.time() - started,
        findings=tuple(findings),
        notes=tuple(_notes(view)),
    )


def _look(store: ObjectStore, run_id: str, grace_s: float, checks: DataChecks) -> tuple[RunView, list[Finding]]:
    view = RunView.everything(store, run_id)
    mend = Mend(store.url, run_id)
    config = view.find_config()
    findings = [*_check_records(view, mend), *checks.check(view), *check_lineage(view, config, mend)]
    findings += [*check_conservation(view, config, mend), *_check_garbage(view, mend, grace_s)]
    if config is not None and view.records["policy"]:
        for model in config.models().values():
            # Shared by all runs; without one, a learner that has no checkpoint cannot start again.
            findings += checks.check_manifest(shared_key("model", digest=config.model_digest(model)))
    return view, findings


def _check_records(view: RunView, mend: Mend) -> Iterator[Finding]:
    """Records that cannot be read, or that lie under a key that is not theirs."""
    from_a_copy = "restore it from a copy; nothing else can make it again"
    if view.layout.key("run") not in view.entries:
        yield Finding("missing", view.layout.key("run"), "the record of a run", "no such object", from_a_copy)
    for key, error in view.broken.items():
        what_to_do = from_a_copy if key == view.layout.key("run") else mend.quarantine(key)
        yield Finding("corrupt", key, "a record that can be read", str(error), what_to_do)
    for kind, said_by in _SAID.items():
        for key, value in view.records[kind].items():
            fields, said = parse(key).fields, said_by(value)
            named = fields["number"] if kind == "rewind" else astuple(fields["shard" if "shard" in fields else "state"])
            if named != said:
                yield mend.finding("mismatch", key, f"a record of {named}", f"a record of {said}")
    for kind in ("trajectories", "scores", "policy", "checkpoint", "architecture"):
        for key, manifest in view.records[kind].items():
            if manifest.kind != kind:
                yield mend.finding("mismatch", key, f"a manifest of kind {kind}", f"a manifest of kind {manifest.kind}")


def _check_garbage(view: RunView, mend: Mend, grace_s: float) -> Iterator[Finding]:
    """Data that no manifest names, and files that killed writers left half-written."""
    oldest = time.time() - grace_s
    # What a manifest that cannot be read names is unknown, so nothing is an orphan for certain.
    is_certain = not any(parse(key).kind in MANIFESTS for key in view.broken)
    for key, entry in view.entries.items() if is_certain else ():
        known = key in view.references or key in view.set_aside
        if parse(key).kind == "data" and not known and entry.modified <= oldest:
            found = f"{entry.size_bytes} bytes that no manifest names"
            yield Finding("orphan", key, "a manifest that promises it", found, mend.collect())
    for entry in view.store.temporary(grace_s):
        found = f"{entry.size_bytes} bytes, half-written by a process that is gone"
        yield Finding("temporary", entry.key, f"no temporary file older than {grace_s:.0f} s", found, mend.collect())


def _notes(view: RunView) -> Iterator[str]:
    for kind in ("trajectories", "scores"):
        reasons = [m.facts.removed.reason for m in view.records[kind].values() if m.facts.removed]
        for reason in sorted(set(reasons)):
            yield (
                f"{reasons.count(reason)} shards of {kind} keep their manifest only ({reason}); their steps cannot be "
                "replayed"
            )
    if view.set_aside:
        yield f"{len(view.set_aside)} data objects belong to manifests in {view.layout.root}/quarantine/"
    if view.unknown:
        yield f"{len(view.unknown)} keys are none of the layout's, for example {view.unknown[0]}"
