"""Policy versions of one run: published by the learner in full or as deltas, fetched by number, polled cheaply.

    version 12 --delta--> 13 --delta--> 14 --delta--> 15
    full                                              full        a full version every k, beside its delta

A reader goes from the version it holds along the deltas, or starts at a full version on the way, whichever is fewer
bytes. A delta names its base by number, rewind and sha256. What is missing or corrupt is left out and the next best
chain is tried; the weights a chain ends in must have the sha256 that the manifest of their version promises.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from asyncopd.errors import ObjectMissingError, ShardCorruptError, StorageError
from asyncopd.records import NO_FACTS, ChainBase, Facts, Manifest, WeightChain
from asyncopd.types import PolicyVersion, PolicyWeights
from storage.layout import RunLayout
from storage.learner_log import Lineage, possible_rewinds
from storage.manifests import find_manifest, publish, read_manifest, read_object, sha256
from storage.stores.base import ObjectStore
from storage.weight_delta import apply_delta, encode_delta

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

    def publish_policy(self, weights: PolicyWeights, *, worker: str, facts: Facts = NO_FACTS) -> None:
        """Make a version visible. Publishing it again keeps the first; other bytes under one version are refused.

        Raises StorageError when the version exists with other weights: two learners are writing one run.
        """
        key, digest = self.layout.key("policy", state=weights.version), sha256(weights.safetensors)
        objects, chain = self._objects(weights, digest)
        if not publish(self.store, key, objects, kind="policy", worker=worker, facts=replace(facts, chain=chain)):
            published = StoredPolicy.of(weights.version, key, read_manifest(self.store, key))
            if published.sha256 != digest:
                raise StorageError(
                    f"{key} was published by {published.manifest.worker} with sha256 {published.sha256[:12]}, now "
                    f"{worker} brings {digest[:12]}. Weights never change once published: stop the second learner, or "
                    "let it record a rewind before it trains."
                )
        if self._full_every is not None:
            self._published = Published(weights, digest)

    def _objects(self, weights: PolicyWeights, digest: str) -> tuple[dict[str, bytes], WeightChain | None]:
        """What to store of a version, by key, and how that is: full weights, a delta, or both."""
        version, body = weights.version, weights.safetensors
        if self._full_every is None:
            return {self._data_key(version, "safetensors"): body}, None
        base = self._published
        if base is not None and base.weights.version.number >= version.number:
            base = None
        made = encode_delta(base.weights.safetensors, body) if base is not None else None
        # Where nearly everything changed a lot, a delta only adds to what must be read.
        delta = made if made is not None and len(made.body) < len(body) else None
        objects: dict[str, bytes] = {}
        delta_key = full_key = None
        if delta is not None:
            objects[delta_key := self._data_key(version, "delta")] = delta.body
        if delta is None or version.number % self._full_every == 0:
            # Beside the delta, not instead of it: who is up to date reads the delta of every version.
            objects[full_key := self._data_key(version, "safetensors")] = body
        against = None
        if base is not None and delta is not None:
            against = ChainBase(base.weights.version.number, base.weights.version.rewind, base.sha256)
        num_changed = made.num_changed if made is not None else None
        return objects, WeightChain(digest, full_key, delta_key, against, num_changed)

    def _data_key(self, version: PolicyVersion, coding: str) -> str:
        return self.layout.key("policy.data", number=version.number, rewind=version.rewind, coding=coding)

    def latest_policy(self) -> PolicyVersion | None:
        """The newest version of the surviving lineage. Two requests when nothing changed, so it can be polled."""
        rewinds = self.lineage.read()
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
        for rewind in possible_rewinds(number, self.lineage.read()):
            version = PolicyVersion(number, rewind)
            if self.store.exists(self.layout.key("policy", state=version)):
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
        return self.lineage.surviving("policy")

    def policy_facts(self, version: PolicyVersion) -> Facts:
        """What its publisher wrote beside a version. Empty when the version does not exist."""
        manifest = find_manifest(self.store, self.layout.key("policy", state=version))
        return manifest.facts if manifest else Facts()

    def _advance(self) -> None:
        """Follow the numbers from the last known version on, under the newest rewind."""
        number = -1 if self._latest is None else self._latest.number
        while True:
            version = PolicyVersion(number + 1, self._num_rewinds)
            if not self.store.exists(self.layout.key("policy", state=version)):
                return
            self._latest, number = version, version.number


@dataclass(frozen=True)
class StoredPolicy:
    """What the manifest of one version says about its weights."""

    version: PolicyVersion
    manifest_key: str
    manifest: Manifest
    chain: WeightChain
    is_chained: bool
    """Was it published by a learner that publishes deltas?"""

    @classmethod
    def of(cls, version: PolicyVersion, manifest_key: str, manifest: Manifest) -> StoredPolicy:
        chain = manifest.facts.chain
        if chain is not None:
            return cls(version, manifest_key, manifest, chain, True)
        ((key, promise),) = manifest.objects.items()
        return cls(version, manifest_key, manifest, WeightChain(promise["sha256"], key, None, None, None), False)

    @property
    def sha256(self) -> str:
        """Of the full weights, however they were published."""
        return self.chain.weights_sha256

    def size_bytes(self, key: str) -> int:
        return int(self.manifest.objects[key]["size_bytes"])


@dataclass(frozen=True)
class _Route:
    """One way to a version: full weights, from storage or held, then deltas in order."""

    full: StoredPolicy | None
    """None: start from the held weights."""
    deltas: Sequence[StoredPolicy]
    size_bytes: int


class PolicyReader:
    """Reads the versions of one run and holds the last chained one, so that the next costs one delta."""

    def __init__(self, store: ObjectStore, layout: RunLayout) -> None:
        self._store, self._layout = store, layout
        self._lock = threading.Lock()
        self._held: tuple[StoredPolicy, bytes] | None = None

    def find(self, version: PolicyVersion) -> StoredPolicy | None:
        """What was published as `version`; None when nothing was."""
        key = self._layout.key("policy", state=version)
        manifest = find_manifest(self._store, key)
        return None if manifest is None else StoredPolicy.of(version, key, manifest)

    def read(self, version: PolicyVersion) -> PolicyWeights:
        """The weights of a version; see `PolicyLog.read_policy`."""
        key = self._layout.key("policy", state=version)
        target = StoredPolicy.of(version, key, read_manifest(self._store, key))
        with self._lock:
            held = self._held
        broken: dict[str, StorageError] = {}
        while True:
            route = self._route(target, held, broken)
            if route is None:
                raise _unreadable(target, broken)
            body = self._follow(route, target, held, broken)
            if body is not None:
                break
        if broken:
            logger.warning("version %d: read another way, %d bytes", version.number, route.size_bytes)
        if target.is_chained:
            with self._lock:
                self._held = target, body
        return PolicyWeights(version=version, safetensors=body)

    # -- routes ---------------------------------------------------------------------------------------------------
    def _route(
        self, target: StoredPolicy, held: tuple[StoredPolicy, bytes] | None, broken: dict[str, StorageError]
    ) -> _Route | None:
        """The way to `target` with the fewest bytes that uses no key of `broken`; adds to `broken` what it finds."""
        best: _Route | None = None
        deltas: list[StoredPolicy] = []
        size = 0
        at = target
        while best is None or size < best.size_bytes:
            if held is not None and (held[0].version, held[0].sha256) == (at.version, at.sha256):
                return _Route(None, deltas, size)
            if at.chain.full is not None and at.chain.full not in broken:
                found = _Route(at, deltas, size + at.size_bytes(at.chain.full))
                best = found if best is None or found.size_bytes < best.size_bytes else best
            base = self._base(at, broken)
            if base is None or at.chain.delta is None:
                break
            deltas = [at, *deltas]
            size += at.size_bytes(at.chain.delta)
            at = base
        return best

    def _base(self, at: StoredPolicy, broken: dict[str, StorageError]) -> StoredPolicy | None:
        """The version before `at` in its chain; None when there is none, or none that fits."""
        delta, against = at.chain.delta, at.chain.base
        if delta is None or against is None or delta in broken:
            return None
        base = self.find(PolicyVersion(against.number, against.rewind)) if against.number < at.version.number else None
        if base is not None and base.sha256 == against.weights_sha256:
            return base
        found = "does not exist" if base is None else f"has weights {base.sha256[:12]}"
        broken[delta] = ShardCorruptError(
            f"{delta} is against version {against.number} of rewind {against.rewind} with weights "
            f"{against.weights_sha256[:12]}, which {found}; a delta fits its own base only."
        )
        return None

    def _follow(
        self,
        route: _Route,
        target: StoredPolicy,
        held: tuple[StoredPolicy, bytes] | None,
        broken: dict[str, StorageError],
    ) -> bytes | None:
        """The weights at the end of `route`; None when something on the way is not as promised, now in `broken`."""
        reading = ""
        try:
            if route.full is not None:
                reading = route.full.chain.full or ""
                body = read_object(self._store, route.full.manifest_key, route.full.manifest, reading)
            else:
                assert held is not None
                body = held[1]
            if not route.deltas:
                return body
            changed = bytearray(body)
            for step in route.deltas:
                reading = step.chain.delta or ""
                apply_delta(changed, read_object(self._store, step.manifest_key, step.manifest, reading))
        except (ObjectMissingError, ShardCorruptError) as error:
            if target.is_chained:
                logger.warning("%s", error)
            broken[reading] = error
            return None
        body = bytes(changed)
        if (found := sha256(body)) == target.sha256:
            return body
        # Every delta has its promised bytes, so they cannot be told apart: none of this chain is used again.
        wrong = ShardCorruptError(
            f"version {target.version.number}: the chain of {len(route.deltas)} deltas ends in weights {found[:12]}, "
            f"the manifest expects {target.sha256[:12]}."
        )
        logger.warning("%s Looking for another way.", wrong)
        broken |= {step.chain.delta: wrong for step in route.deltas if step.chain.delta is not None}
        return None


def _unreadable(target: StoredPolicy, broken: dict[str, StorageError]) -> StorageError:
    first = next(iter(broken.values()))
    if not target.is_chained:
        return first
    advice = "The next full version can be read again (learner.publish.full_every)."
    return type(first)(f"version {target.version.number} cannot be read, whatever the way. {first} {advice}")
