"""Data objects against the manifests that promise them: presence, size, sha256, rows, indices, tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from asyncopd.errors import AsyncOPDError, StorageError
from asyncopd.types import Manifest
from storage.bodies import REMOVED, ROW_GROUP
from storage.findings import Finding, Mend
from storage.layout import parse_shard
from storage.manifests import find_manifest, sha256
from storage.objects import ObjectStore
from storage.run_log import check_rows
from storage.shards import decode_scores, decode_trajectories
from storage.snapshot import Snapshot

if TYPE_CHECKING:
    from storage.audit import Progress

_READERS = 4
"""Objects read and hashed at once; hashlib lets go of the interpreter lock."""


class DataChecks:
    """Verifies data objects, each once however often the run is looked at."""

    def __init__(self, store: ObjectStore, mend: Mend, on_progress: Progress) -> None:
        self._store, self._mend, self._on_progress = store, mend, on_progress
        self._verified: dict[tuple[Any, ...], list[Finding]] = {}

    @property
    def num_verified(self) -> int:
        return len(self._verified)

    def check(self, snapshot: Snapshot) -> list[Finding]:
        """Everything that a manifest of the run promises."""
        findings = [
            finding
            for key, manifest in snapshot.manifests.items()
            for finding in _check_promises(self._mend, key, manifest)
        ]
        promised = sorted(snapshot.references.items())
        with ThreadPoolExecutor(_READERS) as readers:
            results = readers.map(lambda item: self._check_data(snapshot, *item), promised)
            for done, ((key, _), found) in enumerate(zip(promised, results, strict=True), start=1):
                self._on_progress(done, len(promised), key)
                findings += found
        return findings

    def check_manifest(self, manifest_key: str) -> list[Finding]:
        """What one manifest outside the run promises, if there is such a manifest."""
        try:
            manifest = find_manifest(self._store, manifest_key)
        except StorageError as error:
            mend = self._mend.quarantine(manifest_key)
            return [Finding("corrupt", manifest_key, "a manifest that can be read", str(error), mend)]
        findings: list[Finding] = []
        for key, promise in manifest.objects.items() if manifest else ():
            findings += self._check_body(key, self._store.find(key), manifest_key, promise)
        return findings

    def _check_data(self, snapshot: Snapshot, key: str, manifest_keys: list[str]) -> list[Finding]:
        manifests = {name: m for name in manifest_keys if (m := snapshot.manifests.get(name)) is not None}
        entry = snapshot.entries.get(key)
        promises = tuple((name, m.objects[key]["sha256"]) for name, m in manifests.items())
        seen = (key, entry, promises)
        if entry is None or seen not in self._verified:
            body = self._store.find(key)
            findings = []
            for manifest_key, manifest in manifests.items():
                bad = self._check_body(key, body, manifest_key, manifest.objects[key])
                findings += bad
                if body is not None and not bad and manifest.kind in ("trajectories", "scores"):
                    findings += self._check_rows(key, body, manifest_key, manifest)
            if entry is None:
                return findings  # came after the listing, or is gone: nothing to remember
            self._verified[seen] = findings
        return self._verified[seen]

    def _check_body(self, key: str, body: bytes | None, manifest_key: str, promise: Mapping[str, Any]) -> list[Finding]:
        mend = self._mend.quarantine(manifest_key)
        expected = f"{promise['size_bytes']} bytes with sha256 {promise['sha256'][:12]} (promised by {manifest_key})"
        if body is None:
            return [Finding("missing", key, expected, "no such object", mend)]
        found = f"{len(body)} bytes with sha256 {(digest := sha256(body))[:12]}"
        if len(body) != promise["size_bytes"] or digest != promise["sha256"]:
            return [Finding("corrupt", key, expected, found, mend)]
        return []

    def _check_rows(self, key: str, body: bytes, manifest_key: str, manifest: Manifest) -> Iterator[Finding]:
        """Rows, indices and tokens of a shard whose bytes are the promised ones."""
        shard = parse_shard(manifest_key)
        assert shard is not None
        decode = decode_trajectories if manifest.kind == "trajectories" else decode_scores
        try:
            rows: list[Any] = list(decode(body, key, manifest.facts.get(ROW_GROUP)))
            check_rows(manifest_key, manifest, shard, [row.index for row in rows])
        except AsyncOPDError as error:
            yield Finding(
                "corrupt", manifest_key, f"the rows of {shard.name}", str(error), self._mend.quarantine(manifest_key)
            )
            return
        lengths = [len(row.response_ids if manifest.kind == "trajectories" else row.sampled_logprobs_T) for row in rows]
        promised = manifest.facts.get("num_tokens")
        if promised is not None and sum(lengths) != promised:
            mend = self._mend.quarantine(manifest_key)
            yield Finding("mismatch", manifest_key, f"{promised} response tokens", f"{sum(lengths)}", mend)


def _check_promises(mend: Mend, key: str, manifest: Manifest) -> Iterator[Finding]:
    """Does the manifest name as many objects as its kind has?"""
    if manifest.kind in ("trajectories", "scores"):
        expected = 0 if REMOVED in manifest.facts else 1
        if len(manifest.objects) != expected:
            found = f"{len(manifest.objects)} data objects"
            yield Finding("mismatch", key, f"{expected} data objects", found, mend.quarantine(key))
    elif not manifest.objects:
        yield Finding("mismatch", key, "at least one data object", "none", mend.quarantine(key))
