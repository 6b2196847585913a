"""Is everything a run has stored what it should be? Reads all of it and changes nothing.

    listing --> records (parsed, checksums) --> data objects (size, sha256, rows, indices)
                                            --> lineage (versions, steps, checkpoints, rewinds)
                                            --> conservation (every index in one state)     --> findings

A running run may be audited: what is young is not garbage yet, and what a second look does not find again was only in
progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from storage.layout import parse, parse_shard, parse_version, shared_key
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
    snapshot, findings = _look(store, run_id, grace_s, checks)
    newest = max((entry.modified for entry in snapshot.entries.values()), default=0.0)
    if findings and started - newest < RECENT_S:
        time.sleep(recheck_s)
        snapshot, again = _look(store, run_id, grace_s, checks)
        seen = {(finding.problem, finding.key) for finding in findings}
        findings = [finding for finding in again if (finding.problem, finding.key) in seen]
    return AuditReport(
        run_id=run_id,
        root=store.url,
        num_objects=len(snapshot.entries),
        num_bytes=sum(entry.size_bytes for entry in snapshot.entries.values()),
        num_verified=checks.num_verified,
        seconds=time.time() - started,
        findings=tuple(findings),
        notes=tuple(_notes(snapshot)),
    )


def _look(store: ObjectStore, run_id: str, grace_s: float, checks: DataChecks) -> tuple[RunView, list[Finding]]:
    snapshot = RunView.everything(store, run_id)
    mend = Mend(store.url, run_id)
    config = snapshot.find_config()
    findings = [*_check_records(snapshot, mend), *checks.check(snapshot)]
    findings += check_lineage(snapshot, config, mend)
    findings += check_conservation(snapshot, config, mend)
    findings += _check_garbage(snapshot, mend, grace_s)
    if config is not None and snapshot.records["policy"]:
        for model in config.models().values():
            # Shared by all runs; without one, a learner that has no checkpoint cannot start again.
            findings += checks.check_manifest(shared_key("model", digest=config.model_digest(model)))
    return snapshot, findings


def _check_records(snapshot: RunView, mend: Mend) -> Iterator[Finding]:
    """Records that cannot be read, or that lie under a key that is not theirs."""
    layout = snapshot.layout
    from_a_copy = "restore it from a copy; nothing else can make it again"
    if layout.key("run") not in snapshot.entries:
        yield Finding("missing", layout.key("run"), "the record of a run", "no such object", from_a_copy)
    for key, error in snapshot.broken.items():
        what_to_do = from_a_copy if key == layout.key("run") else mend.quarantine(key)
        yield Finding("corrupt", key, "a record that can be read", str(error), what_to_do)
    for kind in ("step", "evaluation", "checkpoint", "trajectories", "scores", "rewind"):
        for key, value in snapshot.records[kind].items():
            named, said = _named(kind, key), _said(kind, value)
            if named != said:
                yield Finding("mismatch", key, f"a record of {named}", f"a record of {said}", mend.quarantine(key))
    for kind in ("trajectories", "scores", "policy", "checkpoint", "architecture"):
        for key, manifest in snapshot.records[kind].items():
            if manifest.kind != kind:
                found = f"a manifest of kind {manifest.kind}"
                yield Finding("mismatch", key, f"a manifest of kind {kind}", found, mend.quarantine(key))


def _named(kind: str, key: str) -> object:
    """What a key says its record is about."""
    if kind in ("trajectories", "scores"):
        shard = parse_shard(key)
        return [shard.start, shard.stop] if shard else None
    if kind == "rewind":
        return int(key.rsplit("/", 1)[1].removesuffix(".json"))
    version = parse_version(key)
    return (version.number, version.rewind) if version else None


def _said(kind: str, value: object) -> object:
    """What a record itself says it is about."""
    match kind:
        case "step":
            return (value.step, value.rewind)  # type: ignore[attr-defined]
        case "evaluation":
            return (value.version.number, value.version.rewind)  # type: ignore[attr-defined]
        case "checkpoint":
            return (value.facts.step, value.facts.rewind)  # type: ignore[attr-defined]
        case "rewind":
            return value.number  # type: ignore[attr-defined]
    return list(value.facts.index_range or ())  # type: ignore[attr-defined]


def _check_garbage(snapshot: RunView, mend: Mend, grace_s: float) -> Iterator[Finding]:
    """Data that no manifest names, and files that killed writers left half-written."""
    oldest = time.time() - grace_s
    # What a manifest that cannot be read names is unknown, so nothing is an orphan for certain.
    is_certain = not any(parse(key).kind in MANIFESTS for key in snapshot.broken)
    for key, entry in snapshot.entries.items() if is_certain else ():
        known = key in snapshot.references or key in snapshot.set_aside
        if parse(key).kind == "data" and not known and entry.modified <= oldest:
            found = f"{entry.size_bytes} bytes that no manifest names"
            yield Finding("orphan", key, "a manifest that promises it", found, mend.collect())
    for entry in snapshot.store.temporary(grace_s):
        found = f"{entry.size_bytes} bytes, half-written by a process that is gone"
        yield Finding("temporary", entry.key, f"no temporary file older than {grace_s:.0f} s", found, mend.collect())


def _notes(snapshot: RunView) -> Iterator[str]:
    for kind in ("trajectories", "scores"):
        reasons = [m.facts.removed.reason for m in snapshot.records[kind].values() if m.facts.removed]
        for reason in sorted(set(reasons)):
            yield (
                f"{reasons.count(reason)} shards of {kind} keep their manifest only ({reason}); their steps cannot be "
                "replayed"
            )
    if snapshot.set_aside:
        yield f"{len(snapshot.set_aside)} data objects belong to manifests in {snapshot.layout.root}/quarantine/"
    if snapshot.unknown:
        yield f"{len(snapshot.unknown)} keys are none of the layout's, for example {snapshot.unknown[0]}"
