"""Policy versions of one run: published by the learner, fetched by number, polled cheaply."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncopd.errors import StorageError
from asyncopd.types import PolicyVersion, PolicyWeights
from storage.layout import RunLayout, parse_version
from storage.lineage import Lineage, possible_rewinds, surviving
from storage.manifests import find_manifest, publish, read_manifest, sha256
from storage.objects import ObjectStore
from storage.policy_chain import PolicyReader, StoredPolicy, chain_facts
from storage.records import to_json
from storage.weight_delta import encode_delta

logger = logging.getLogger(__name__)

RELIST_S = 5.0
"""How often a poll lists all versions. Between listings it probes for the next number only, which a gap would stop."""


@dataclass(frozen=True)
class Published:
    """What this log published last: the base of the next delta."""

    weights: PolicyWeights
    sha256: str


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
        self._reader = PolicyReader(self.store, self.layout)
        self._full_every: int | None = None
        self._published: Published | None = None

    def publish_deltas(self, *, full_every: int) -> None:
        """From here on, publish what changed since the version before, and full weights every `full_every` versions.

        The first version published afterwards is full. The log keeps the last published weights in memory.
        """
        self._full_every = full_every

    def publish_policy(self, weights: PolicyWeights, *, worker: str, facts: Mapping[str, Any]) -> None:
        """Make a version visible. Publishing it again keeps the first; other bytes under one version are refused.

        Raises StorageError when the version exists with other weights: two learners are writing one run.
        """
        key, digest = self.layout.policy_manifest(weights.version), sha256(weights.safetensors)
        objects, chain = self._objects(weights, digest)
        if not publish(self.store, key, objects, kind="policy", worker=worker, facts={**facts, **chain}):
            published = StoredPolicy.of(weights.version, key, read_manifest(self.store, key))
            if published.sha256 != digest:
                raise StorageError(
                    f"{key} was published by {published.manifest.worker} with sha256 {published.sha256[:12]}, now "
                    f"{worker} brings {digest[:12]}. Weights never change once published: stop the second learner, or "
                    "let it record a rewind before it trains."
                )
        if self._full_every is not None:
            self._published = Published(weights, digest)

    def _objects(self, weights: PolicyWeights, digest: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        """What to store of a version, by key, and the facts that describe it: full weights, a delta, or both."""
        version, body = weights.version, weights.safetensors
        if self._full_every is None:
            return {self.layout.policy_object(version): body}, {}
        base = self._published
        if base is not None and base.weights.version.number >= version.number:
            base = None
        made = encode_delta(base.weights.safetensors, body) if base is not None else None
        # Where nearly everything changed a lot, a delta only adds to what must be read.
        delta = made if made is not None and len(made.body) < len(body) else None
        objects: dict[str, bytes] = {}
        delta_key = full_key = None
        if delta is not None:
            objects[delta_key := self.layout.policy_delta(version)] = delta.body
        if delta is None or version.number % self._full_every == 0:
            # Beside the delta, not instead of it: who is up to date reads the delta of every version.
            objects[full_key := self.layout.policy_object(version)] = body
        return objects, chain_facts(
            weights_sha256=digest,
            full=full_key,
            delta=delta_key,
            base=(base.weights.version, base.sha256) if base is not None and delta is not None else None,
            num_changed=made.num_changed if made is not None else None,
        )

    def want_full_policy(self, version: PolicyVersion, *, worker: str) -> bool:
        """Ask the learner for a full copy of a version that cannot be read. False when no learner would answer."""
        published = self._reader.find(version)
        if published is None or not published.is_chained:
            return False
        body = to_json({"worker": worker, "wanted": time.time()})
        self.store.put_if_absent(self.layout.policy_wanted(version), body, durable=False)
        return True

    def answer_wanted_policy(self, *, worker: str) -> None:
        """Publish the full copy that a reader asked for, if it is of the last published version. Polled by the learner.

        Without it, samplers whose chain broke would wait for a version that the learner cannot make without them.
        """
        last = self._published
        if last is None:
            return
        version = last.weights.version
        if not self.store.exists(self.layout.policy_wanted(version)):
            return
        objects = {self.layout.policy_object(version): last.weights.safetensors}
        if publish(self.store, self.layout.policy_full_copy(version), objects, kind="policy", worker=worker, facts={}):
            logger.warning("version %d: a full copy was asked for and is published", version.number)

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
        """The weights of any published version, also a superseded one, however they were published.

        Of a run that publishes deltas the last read weights are kept in memory, and the next ones read from there when
        that is less to read. A missing or corrupt object is gone around, with a warning, where there is another way.

        Raises:
            ObjectMissingError: the version was never published, or its weights are gone.
            ShardCorruptError: the weights are not the published ones.
        """
        return self._reader.read(version)

    def policies(self) -> list[PolicyVersion]:
        """All versions of the surviving lineage, oldest first."""
        return surviving(self.published_policies(), self.lineage.rewinds())

    def published_policies(self) -> list[PolicyVersion]:
        """All versions that are stored, superseded ones too, by number and rewind."""
        keys = self.store.folder(self.layout.policies).keys
        return sorted({version for key in keys if (version := parse_version(key)) is not None})

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
