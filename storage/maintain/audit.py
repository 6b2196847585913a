"""Is everything a run has stored what it should be? Reads all of it and changes nothing.

    listing --> records (parsed, checksums) --> data objects (size, sha256, rows, indices)
                                            --> lineage (versions, steps, checkpoints, rewinds)
                                            --> conservation (every index in one state)     --> findings

A running run may be audited: what is young is not garbage yet, and what a second look does not find again was only in
progress.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from typing import Any

from asyncopd.errors import AsyncOPDError, StorageError
from asyncopd.records import Manifest
from asyncopd.types import IndexRange
from storage.layout import parse, shared_key
from storage.maintain.checks import Finding, Mend, check_conservation, check_lineage
from storage.manifests import find_manifest, sha256
from storage.parquet import decode_scores, decode_trajectories
from storage.run_log import check_rows
from storage.run_view import MANIFESTS, RunView
from storage.stores.base import ObjectStore

GRACE_S = 3600.0
"""Unreferenced objects younger than this may belong to a writer that has not come to its manifest yet."""
RECENT_S = 60.0
"""A run that wrote something this recently is looked at twice."""
_READERS = 4
"""Objects read and hashed at once; hashlib lets go of the interpreter lock."""
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


@dataclass(frozen=True)
class AuditReport:
    """The result of auditing one run."""

    run_id: str
    root: str
    num_objects: int
    num_bytes: int
    """Of all objects of the run."""
    num_verified: int
    """Data objects whose sha256 was computed."""
    seconds: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    """What is not wrong but worth knowing: data removed on purpose, keys the layout does not know."""

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"clean": self.is_clean, **asdict(self)}

    def to_text(self) -> str:
        """For people: one paragraph a finding."""
        size = f"{self.num_objects} objects, {self.num_bytes / 1e6:.1f} MB, {self.num_verified} data objects verified"
        lines = [f"{self.run_id}: {size} in {self.seconds:.1f} s"]
        lines += [
            f"\n{finding.problem}: {finding.key}\n  expected  {finding.expected}\n  found     {finding.found}\n"
            f"  to mend   {finding.mend}"
            for finding in self.findings
        ]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        counts = Counter(finding.problem for finding in self.findings)
        counted = ", ".join(f"{count} {problem}" for problem, count in counts.items())
        lines.append(f"\n{len(self.findings)} findings: {counted}" if counts else "clean")
        return "\n".join(lines)


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
    checks = _DataChecks(store, Mend(store.url, run_id), on_progress)
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


def _look(store: ObjectStore, run_id: str, grace_s: float, checks: _DataChecks) -> tuple[RunView, list[Finding]]:
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


class _DataChecks:
    """Verifies data objects against the manifests that promise them: presence, size, sha256, rows, indices, tokens.
    Each once, however often the run is looked at."""

    def __init__(self, store: ObjectStore, mend: Mend, on_progress: Progress) -> None:
        self._store, self._mend, self._on_progress = store, mend, on_progress
        self.verified: dict[tuple[Any, ...], list[Finding]] = {}
        """(key, its entry, what promises it) -> what was found, of every data object that was read."""

    def check(self, view: RunView) -> list[Finding]:
        """Everything that a manifest of the run promises."""
        findings = [finding for key, m in view.manifests.items() for finding in self._check_promises(key, m)]
        promised = sorted(view.references.items())
        with ThreadPoolExecutor(_READERS) as readers:
            results = readers.map(lambda item: self._check_data(view, *item), promised)
            for done, ((key, _), found) in enumerate(zip(promised, results, strict=True), start=1):
                self._on_progress(done, len(promised), key)
                findings += found
        return findings

    def check_manifest(self, manifest_key: str) -> list[Finding]:
        """What one manifest outside the run promises, if there is such a manifest."""
        try:
            manifest = find_manifest(self._store, manifest_key)
        except StorageError as error:
            return [self._mend.finding("corrupt", manifest_key, "a manifest that can be read", str(error))]
        promises = manifest.objects if manifest else {}
        return [
            finding
            for key, promise in promises.items()
            for finding in self._check_body(key, self._store.find(key), manifest_key, promise)
        ]

    def _check_promises(self, key: str, manifest: Manifest) -> Iterator[Finding]:
        """Does the manifest name as many objects as its kind has?"""
        if manifest.kind in ("trajectories", "scores"):
            expected = 0 if manifest.facts.removed else 1
            if (found := len(manifest.objects)) != expected:
                yield self._mend.finding("mismatch", key, f"{expected} data objects", f"{found} data objects")
        elif not manifest.objects:
            yield self._mend.finding("mismatch", key, "at least one data object", "none")

    def _check_data(self, view: RunView, key: str, manifest_keys: list[str]) -> list[Finding]:
        manifests = {name: m for name in manifest_keys if (m := view.manifests.get(name)) is not None}
        entry = view.entries.get(key)
        seen = (key, entry, tuple((name, m.objects[key]["sha256"]) for name, m in manifests.items()))
        if seen in self.verified:
            return self.verified[seen]
        body = self._store.find(key)
        findings: list[Finding] = []
        for manifest_key, manifest in manifests.items():
            bad = self._check_body(key, body, manifest_key, manifest.objects[key])
            findings += bad
            if body is not None and not bad and manifest.kind in ("trajectories", "scores"):
                findings += self._check_rows(key, body, manifest_key, manifest)
        if entry is not None:  # else it came after the listing, or is gone: nothing to remember
            self.verified[seen] = findings
        return findings

    def _check_body(self, key: str, body: bytes | None, manifest_key: str, promise: Mapping[str, Any]) -> list[Finding]:
        mend = self._mend.quarantine(manifest_key)
        expected = f"{promise['size_bytes']} bytes with sha256 {promise['sha256'][:12]} (promised by {manifest_key})"
        if body is None:
            return [Finding("missing", key, expected, "no such object", mend)]
        digest = sha256(body)
        if len(body) == promise["size_bytes"] and digest == promise["sha256"]:
            return []
        return [Finding("corrupt", key, expected, f"{len(body)} bytes with sha256 {digest[:12]}", mend)]

    def _check_rows(self, key: str, body: bytes, manifest_key: str, manifest: Manifest) -> Iterator[Finding]:
        """Rows, indices and tokens of a shard whose bytes are the promised ones."""
        shard: IndexRange = parse(manifest_key).fields["shard"]
        decode = decode_trajectories if manifest.kind == "trajectories" else decode_scores
        try:
            rows: list[Any] = list(decode(body, key))
            check_rows(manifest_key, manifest, shard, [row.index for row in rows])
        except AsyncOPDError as error:
            yield self._mend.finding("corrupt", manifest_key, f"the rows of {shard.name}", str(error))
            return
        lengths = [len(row.response_ids if manifest.kind == "trajectories" else row.sampled_logprobs_T) for row in rows]
        promised = manifest.facts.num_tokens
        if promised is not None and sum(lengths) != promised:
            yield self._mend.finding("mismatch", manifest_key, f"{promised} response tokens", f"{sum(lengths)}")
