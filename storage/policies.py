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
from storage.events import EventLog, possible_rewinds
from storage.manifests import find_manifest, publish, read_manifest, read_object, sha256
from storage.stores.base import ObjectStore
from storage.weight_delta import apply_delta, encode_delta

logger = logging.getLogger(__name__)

RELIST_S = 5.0
"""How often a poll lists all versions. Between listings it probes for the next number only, which a gap would stop."""


class PolicyLog(EventLog):
    """The published weights of one run, beside what happened to it."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        super().__init__(store, run_id)
        self._policy_lock = threading.Lock()
        self._latest: PolicyVersion | None = None
        self._num_rewinds = 0
        self._listed_s = float("-inf")
        self._full_every: int | None = None
        self._published: tuple[PolicyWeights, str] | None = None
        """What this log published last, with its sha256: the base of the next delta."""
        self._held: _Held | None = None
        """The last chained weights that were read. Always replaced as a whole: threads that read at once need no lock.
        """

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
            if (found := published.chain.weights_sha256) != digest:
                raise StorageError(
                    f"{key} was published by {published.manifest.worker} with sha256 {found[:12]}, now {worker} brings "
                    f"{digest[:12]}. Weights never change once published: stop the second learner, or let it record a "
                    "rewind before it trains."
                )
        if self._full_every is not None:
            self._published = weights, digest

    def _objects(self, weights: PolicyWeights, digest: str) -> tuple[dict[str, bytes], WeightChain | None]:
        """What to store of a version, by key, and how that is: full weights, a delta, or both."""
        version, body = weights.version, weights.safetensors
        if self._full_every is None:
            return {self._data_key(version, "safetensors"): body}, None
        made = against = None
        if self._published is not None and self._published[0].version.number < version.number:
            base, base_digest = self._published
            made = encode_delta(base.safetensors, body)
            against = ChainBase(base.version.number, base.version.rewind, base_digest)
        objects: dict[str, bytes] = {}
        delta_key = full_key = None
        # Where nearly everything changed a lot, a delta only adds to what must be read.
        if made is not None and len(made.body) < len(body):
            objects[delta_key := self._data_key(version, "delta")] = made.body
        if delta_key is None or version.number % self._full_every == 0:
            # Beside the delta, not instead of it: who is up to date reads the delta of every version.
            objects[full_key := self._data_key(version, "safetensors")] = body
        num_changed = made.num_changed if made is not None else None
        return objects, WeightChain(digest, full_key, delta_key, against if delta_key else None, num_changed)

    def _data_key(self, version: PolicyVersion, coding: str) -> str:
        return self.layout.key("policy.data", number=version.number, rewind=version.rewind, coding=coding)

    def latest_policy(self) -> PolicyVersion | None:
        """The newest version of the surviving lineage. Two requests when nothing changed, so it can be polled."""
        rewinds = self.rewinds()
        with self._policy_lock:
            now_s = time.monotonic()
            if len(rewinds) != self._num_rewinds or now_s - self._listed_s >= RELIST_S:
                self._latest = next(reversed(self.policies()), None)
                self._num_rewinds, self._listed_s = len(rewinds), now_s
            else:
                self._advance()
            return self._latest

    def find_policy(self, number: int) -> PolicyVersion | None:
        """Version `number` of the surviving lineage."""
        versions = (PolicyVersion(number, rewind) for rewind in possible_rewinds(number, self.rewinds()))
        return next((v for v in versions if self.store.exists(self.layout.key("policy", state=v))), None)

    def read_policy(self, version: PolicyVersion) -> PolicyWeights:
        """The weights of any published version, also a superseded one, however they were published.

        Of a run that publishes deltas the last read weights are kept in memory, and the next ones read from there when
        that is less to read. A missing or corrupt object is gone around, with a warning, where there is another way.

        Raises:
            ObjectMissingError: the version was never published, or its weights are gone.
            ShardCorruptError: the weights are not the published ones.
        """
        key = self.layout.key("policy", state=version)
        target = StoredPolicy.of(version, key, read_manifest(self.store, key))
        held = self._held
        broken: dict[str, StorageError] = {}
        while True:
            route = self._route(target, held, broken)
            if route is None:
                first = next(iter(broken.values()))
                if not target.is_chained:
                    raise first
                raise type(first)(
                    f"version {version.number} cannot be read, whatever the way. {first} "
                    "The next full version can be read again (learner.publish.full_every)."
                )
            if (body := self._follow(route, target, broken)) is not None:
                break
        if broken:
            logger.warning("version %d: read another way, %d bytes", version.number, route.size_bytes)
        if target.is_chained:
            self._held = (version, target.chain.weights_sha256), body
        return PolicyWeights(version=version, safetensors=body)

    def policies(self) -> list[PolicyVersion]:
        """All versions of the surviving lineage, oldest first."""
        return self.surviving_states("policy")

    def _advance(self) -> None:
        """Follow the numbers from the last known version on, under the newest rewind."""
        number = -1 if self._latest is None else self._latest.number
        while True:
            version = PolicyVersion(number + 1, self._num_rewinds)
            if not self.store.exists(self.layout.key("policy", state=version)):
                return
            self._latest, number = version, version.number

    # -- routes ---------------------------------------------------------------------------------------------------
    def _route(self, target: StoredPolicy, held: _Held | None, broken: dict[str, StorageError]) -> _Route | None:
        """The way to `target` with the fewest bytes that uses no key of `broken`; adds to `broken` what it finds."""
        best: _Route | None = None
        deltas: list[StoredPolicy] = []
        size = 0
        at = target
        while best is None or size < best.size_bytes:
            if held is not None and held[0] == (at.version, at.chain.weights_sha256):
                return _Route(at, held[1], deltas, size)
            if at.chain.full is not None and at.chain.full not in broken:
                found = _Route(at, None, deltas, size + at.size_bytes(at.chain.full))
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
        found = "does not exist"
        version = PolicyVersion(against.number, against.rewind)
        key = self.layout.key("policy", state=version)
        if version.number < at.version.number and (manifest := find_manifest(self.store, key)) is not None:
            base = StoredPolicy.of(version, key, manifest)
            if base.chain.weights_sha256 == against.weights_sha256:
                return base
            found = f"has weights {base.chain.weights_sha256[:12]}"
        broken[delta] = ShardCorruptError(
            f"{delta} is against version {against.number} of rewind {against.rewind} with weights "
            f"{against.weights_sha256[:12]}, which {found}; a delta fits its own base only."
        )
        return None

    def _follow(self, route: _Route, target: StoredPolicy, broken: dict[str, StorageError]) -> bytes | None:
        """The weights at the end of `route`; None when something on the way is not as promised, now in `broken`."""
        reading, body = "", route.held
        try:
            if body is None:
                reading = route.start.chain.full or ""
                body = read_object(self.store, route.start.manifest_key, route.start.manifest, reading)
            if not route.deltas:
                return body
            changed = bytearray(body)
            for step in route.deltas:
                reading = step.chain.delta or ""
                apply_delta(changed, read_object(self.store, step.manifest_key, step.manifest, reading))
        except (ObjectMissingError, ShardCorruptError) as error:
            if target.is_chained:
                logger.warning("%s", error)
            broken[reading] = error
            return None
        body = bytes(changed)
        if (found := sha256(body)) == target.chain.weights_sha256:
            return body
        # Every delta has its promised bytes, so they cannot be told apart: none of this chain is used again.
        wrong = ShardCorruptError(
            f"version {target.version.number}: the chain of {len(route.deltas)} deltas ends in weights {found[:12]}, "
            f"the manifest expects {target.chain.weights_sha256[:12]}."
        )
        logger.warning("%s Looking for another way.", wrong)
        broken |= {step.chain.delta: wrong for step in route.deltas if step.chain.delta is not None}
        return None


@dataclass(frozen=True)
class StoredPolicy:
    """What the manifest of one version says about its weights."""

    version: PolicyVersion
    manifest_key: str
    manifest: Manifest
    chain: WeightChain
    """Of a version whose learner publishes no deltas: its full weights alone."""

    @classmethod
    def of(cls, version: PolicyVersion, manifest_key: str, manifest: Manifest) -> StoredPolicy:
        chain = manifest.facts.chain
        if chain is None:
            ((key, promise),) = manifest.objects.items()
            chain = WeightChain(promise["sha256"], key, None, None, None)
        return cls(version, manifest_key, manifest, chain)

    @property
    def is_chained(self) -> bool:
        """Was it published by a learner that publishes deltas?"""
        return self.manifest.facts.chain is not None

    def size_bytes(self, key: str) -> int:
        return int(self.manifest.objects[key]["size_bytes"])


@dataclass(frozen=True)
class _Route:
    """One way to a version: full weights, from storage or held, then deltas in order."""

    start: StoredPolicy
    held: bytes | None
    """The weights of `start`; None: its full weights are read from storage."""
    deltas: Sequence[StoredPolicy]
    size_bytes: int


_Held = tuple[tuple[PolicyVersion, str], bytes]
"""(version, sha256) and the weights themselves."""
