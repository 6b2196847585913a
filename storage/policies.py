"""Policy versions of one run: published by the learner, fetched by number, polled cheaply."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from asyncopd.errors import StorageError
from asyncopd.types import PolicyVersion, PolicyWeights
from storage.layout import RunLayout, parse_version
from storage.lineage import Lineage, possible_rewinds, surviving
from storage.manifests import find_manifest, publish, read_manifest, read_objects, sha256
from storage.objects import ObjectStore

RELIST_S = 5.0
"""How often a poll lists all versions. Between listings it probes for the next number only, which a gap would stop."""


class PolicyLog:
    """The published weights of one run."""

    store: ObjectStore
    layout: RunLayout
    lineage: Lineage

    def __init__(self) -> None:
        self._policy_lock = threading.Lock()
        self._latest: PolicyVersion | None = None
        self._num_rewinds = 0
        self._listed_s = float("-inf")

    def publish_policy(self, weights: PolicyWeights, *, worker: str, facts: Mapping[str, Any]) -> None:
        """Make a version visible. Publishing it again keeps the first; other bytes under one version are refused.

        Raises StorageError when the version exists with other weights: two learners are writing one run.
        """
        version, body = weights.version, weights.safetensors
        key = self.layout.policy_manifest(version)
        objects = {self.layout.policy_object(version): body}
        if publish(self.store, key, objects, kind="policy", worker=worker, facts=facts):
            return
        published = read_manifest(self.store, key)
        found = [promise["sha256"] for promise in published.objects.values()]
        if found != [sha256(body)]:
            raise StorageError(
                f"{key} was published by {published.worker} with sha256 {found[0][:12]}, now {worker} brings "
                f"{sha256(body)[:12]}. Weights never change once published: stop the second learner, or let it record "
                "a rewind before it trains."
            )

    def latest_policy(self) -> PolicyVersion | None:
        """The newest version of the surviving lineage. Two requests when nothing changed, so it can be polled."""
        rewinds = self.lineage.rewinds()
        with self._policy_lock:
            now_s = time.monotonic()
            if len(rewinds) != self._num_rewinds or now_s - self._listed_s >= RELIST_S:
                versions = self.policies()
                self._latest = versions[-1] if versions else None
                self._num_rewinds, self._listed_s = len(rewinds), now_s
            else:
                self._advance()
            return self._latest

    def find_policy(self, number: int) -> PolicyVersion | None:
        """Version `number` of the surviving lineage."""
        for rewind in possible_rewinds(number, self.lineage.rewinds()):
            version = PolicyVersion(number, rewind)
            if self.store.exists(self.layout.policy_manifest(version)):
                return version
        return None

    def read_policy(self, version: PolicyVersion) -> PolicyWeights:
        """The weights of any published version, also a superseded one.

        Raises:
            ObjectMissingError: the version was never published, or its weights are gone.
            ShardCorruptError: the weights are not the published ones.
        """
        key = self.layout.policy_manifest(version)
        (body,) = read_objects(self.store, key, read_manifest(self.store, key)).values()
        return PolicyWeights(version=version, safetensors=body)

    def policies(self) -> list[PolicyVersion]:
        """All versions of the surviving lineage, oldest first."""
        keys = self.store.folder(self.layout.policies).keys
        versions = [version for key in keys if (version := parse_version(key)) is not None]
        return surviving(versions, self.lineage.rewinds())

    def policy_facts(self, version: PolicyVersion) -> Mapping[str, Any]:
        """What its publisher wrote beside a version. Empty when the version does not exist."""
        manifest = find_manifest(self.store, self.layout.policy_manifest(version))
        return manifest.facts if manifest else {}

    def _advance(self) -> None:
        """Follow the numbers from the last known version on, under the newest rewind."""
        number = -1 if self._latest is None else self._latest.number
        while True:
            version = PolicyVersion(number + 1, self._num_rewinds)
            if not self.store.exists(self.layout.policy_manifest(version)):
                return
            self._latest, number = version, version.number
