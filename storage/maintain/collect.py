"""Removes what nobody needs: garbage of killed writers, and what retention lets go.

    snapshot --> garbage --> manifests that appeared meanwhile? --> removal record --> manifests --> data

The record comes before the first deletion, and a manifest goes before its data: a crash in between leaves unreferenced
objects, which the next collection removes.

What must stay (`what_to_keep`) is a pure function of the policy and the history of a run:

newest checkpoint, and the one before     a resume, also when the newest turns out corrupt
their versions, and the newest one        what samplers load while the learner goes on
checkpoint at or before the first kept    where a replay of the kept steps starts; without one, version 0
all shards from there on                  what that replay, or a resume, trains
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from asyncopd.config import RunConfig
from asyncopd.config.schema import Retention
from asyncopd.errors import StorageError
from asyncopd.records import Manifest, Removal, Removed
from asyncopd.types import PolicyVersion
from storage.events import survives
from storage.layout import parse
from storage.manifests import find_manifest, read_objects
from storage.records import to_json
from storage.run_view import MANIFESTS, RunView
from storage.stores.base import ObjectStore

_MUST_READ = (*MANIFESTS, "run", "rewind", "step")
"""Kinds of record without which it is unknown what is referenced and what counts."""


@dataclass(frozen=True)
class Kept:
    """What stays."""

    checkpoints: frozenset[PolicyVersion]
    policies: frozenset[PolicyVersion]
    first_step: int
    """Shards stay unless every index of theirs was decided about by a step before this one."""


@dataclass(frozen=True)
class Garbage:
    """One object that can go."""

    key: str
    size_bytes: int
    reason: str
    """`orphan`, `temporary`, `quarantine`, `retention` or `superseded`."""


@dataclass(frozen=True)
class CollectReport:
    """What a collection removed, or would remove."""

    run_id: str
    dry_run: bool
    removed: tuple[Garbage, ...]
    num_shards_emptied: int
    """Shards that keep their manifest without data, so that nobody makes them again."""

    @property
    def num_bytes(self) -> int:
        return sum(garbage.size_bytes for garbage in self.removed)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"num_bytes": self.num_bytes, **asdict(self)}

    def to_text(self) -> str:
        """For people."""
        verb = "would remove" if self.dry_run else "removed"
        lines = [f"{g.reason:10}  {g.size_bytes:>12,} bytes  {g.key}" for g in self.removed]
        shards = f"; {self.num_shards_emptied} shards keep their manifest only" if self.num_shards_emptied else ""
        return "\n".join([*lines, f"{verb} {len(self.removed)} objects, {self.num_bytes:,} bytes{shards}"])


def collect_run(
    store: ObjectStore,
    run_id: str,
    *,
    retention: Retention | None = None,
    grace_s: float | None = None,
    dry_run: bool = False,
    now: float | None = None,
) -> CollectReport:
    """Remove the garbage of a run and what its retention policy lets go.

    Never removes what a manifest that stays names, or anything younger than the grace.

    Args:
        retention: instead of the run's own.
        grace_s: instead of the policy's.
        now: Unix time, seconds; for tests.
    Raises:
        StorageError: a record cannot be read, so that it is unknown what is needed; or the newest checkpoint is
            corrupt, so that older ones are.
    """
    now = time.time() if now is None else now
    view = RunView.everything(store, run_id)
    for key, error in view.broken.items():
        if parse(key).kind in _MUST_READ:
            raise StorageError(
                f"nothing was collected: without {key} it is unknown what is still needed. See `asyncopd maintain "
                f"audit {run_id}`. ({error})"
            )
    config = view.find_config()
    policy = retention or (config.retention if config else Retention())
    oldest = now - (policy.grace_s if grace_s is None else grace_s)
    kept = _kept(view, config, policy)
    manifests = dict(_removable_manifests(view, policy, kept, oldest))
    emptied = _removable_shards(view, kept, oldest)
    newest = view.latest_checkpoint()
    if newest is not None and (manifests or emptied):
        # Prove that it can be read before anything a resume without it would need goes.
        key = view.layout.checkpoint_manifest(newest.number, newest.rewind)
        read_objects(store, key, view.manifests[key])
    data = [*_unreferenced(view, policy, oldest, now), *_freed(view, {**manifests, **emptied})]
    named_meanwhile = _named_since(view)
    entries = view.entries
    garbage = [Garbage(key, entries[key].size_bytes, reason) for key, reason in manifests.items()]
    garbage += [Garbage(key, entries[key].size_bytes, why) for key, why in data if key not in named_meanwhile]
    # By the clock of the file system, which `now` need not be.
    temporary_s = time.time() - oldest
    temporary = [Garbage(e.key, e.size_bytes, "temporary") for e in store.temporary(temporary_s)]
    if not dry_run and (garbage or emptied or temporary):
        _remove(view, garbage, emptied, now)
        store.discard_temporary(temporary_s)
    return CollectReport(run_id, dry_run, tuple(garbage + temporary), len(emptied))


def empty_shard(store: ObjectStore, key: str, manifest: Manifest, *, reason: str, advice: str, now: float) -> None:
    """Replace a shard's manifest by one without data: its counts stay, reading it raises, and nobody makes it again."""
    facts = replace(manifest.facts, removed=Removed(reason, now, advice))
    store.put(key, to_json(replace(manifest, objects={}, facts=facts)))


# -- what can go --------------------------------------------------------------------------------------------------
def _kept(view: RunView, config: RunConfig | None, policy: Retention) -> Kept:
    due: set[int] = set()
    if config is not None and config.evaluate.every:
        evaluated = {version.number for version in view.states("evaluation")}
        due = {*range(0, config.learner.num_steps, config.evaluate.every), config.learner.num_steps} - evaluated
    removed = [(shard, manifest.facts.removed) for shard, manifest in view.trajectories().items()]
    emptied = {index for shard, why in removed if why and why.reason == "retention" for index in shard.indices}
    steps = view.steps()
    return what_to_keep(
        policy,
        checkpoints=view.states("checkpoint"),
        policies=view.states("policy"),
        num_steps=max((step.step + 1 for step in steps), default=0),
        first_stored=max((s.step + 1 for s in steps if not emptied.isdisjoint(s.indices.indices)), default=0),
        wanted=due,
        base_of=lambda version: _base(view.records["policy"].get(view.layout.key("policy", state=version))),
    )


def _base(manifest: Manifest | None) -> PolicyVersion | None:
    """The version that a version's weights are a difference to; None where they are stored whole."""
    chain = manifest.facts.chain if manifest else None
    if chain is None or chain.base is None or chain.full:
        return None
    return PolicyVersion(chain.base.number, chain.base.rewind)


def _removable_manifests(view: RunView, policy: Retention, kept: Kept, oldest: float) -> Iterator[tuple[str, str]]:
    """(manifest key, reason) of checkpoints and versions that can go, earlier rewinds first."""
    for kind, stays in (("checkpoint", kept.checkpoints), ("policy", kept.policies)):
        versions: dict[PolicyVersion, str] = {parse(key).fields["state"]: key for key in view.records[kind]}
        # Earlier rewinds first: a removed state must not uncover an older one of the same number.
        for version, key in sorted(versions.items(), key=lambda item: (item[0].rewind, item[0].number)):
            if version in stays or view.entries[key].modified > oldest:
                continue
            # One that a later rewind published again counts as soon as that is gone.
            if survives(version.number, version.rewind, view.rewinds):
                yield key, "retention"
            elif not policy.superseded:
                yield key, "superseded"


def _removable_shards(view: RunView, kept: Kept, oldest: float) -> dict[str, str]:
    """Manifest key -> reason, of shards all of whose indices were decided about before the first kept step."""
    decided = {i for step in view.steps() if step.step < kept.first_step for i in step.indices.indices}
    return {
        key: "retention"
        for kind in ("trajectories", "scores")
        for key, manifest in view.records[kind].items()
        if manifest.facts.removed is None
        and view.entries[key].modified <= oldest
        and decided.issuperset(parse(key).fields["shard"].indices)
    }


def _unreferenced(view: RunView, policy: Retention, oldest: float, now: float) -> Iterator[tuple[str, str]]:
    """(data key, reason) of data that no manifest of the run names."""
    for key, entry in view.entries.items():
        if parse(key).kind != "data" or key in view.references:
            continue
        if key in view.set_aside:
            if view.entries[view.set_aside[key]].modified <= now - policy.quarantine_s:
                yield key, "quarantine"
        elif entry.modified <= oldest:
            yield key, "orphan"


def _freed(view: RunView, going: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(data key, reason) of data all of whose manifests go."""
    for key, manifest_keys in view.references.items():
        if key in view.entries and set(manifest_keys) <= going.keys():
            yield key, going[manifest_keys[0]]


def _named_since(view: RunView) -> set[str]:
    """Data keys of manifests that were published or replaced after the snapshot was taken."""
    named: set[str] = set()
    for entry in view.store.entries(view.layout.root):
        known = view.entries.get(entry.key)
        if parse(entry.key).kind in MANIFESTS and (known is None or known.modified != entry.modified):
            manifest = find_manifest(view.store, entry.key)
            named |= set(manifest.objects if manifest else ())
    return named


# -- removing -----------------------------------------------------------------------------------------------------
def _remove(view: RunView, garbage: list[Garbage], emptied: Mapping[str, str], now: float) -> None:
    store, layout = view.store, view.layout
    for reason in sorted({item.reason for item in garbage}):
        keys = {item.key: item.size_bytes for item in garbage if item.reason == reason}
        store.put(layout.key("removal", unix_ms=int(now * 1000)), to_json(Removal(reason, keys, now)))
    for key in emptied:
        advice = "retention.shards.keep_last_steps decides how many steps keep theirs."
        empty_shard(store, key, view.manifests[key], reason="retention", advice=advice, now=now)
    # `garbage` names manifests before data.
    for item in garbage:
        store.delete(item.key)


def what_to_keep(
    retention: Retention,
    *,
    checkpoints: Sequence[PolicyVersion],
    policies: Sequence[PolicyVersion],
    num_steps: int,
    first_stored: int = 0,
    wanted: Collection[int] = (),
    base_of: Callable[[PolicyVersion], PolicyVersion | None] = lambda version: None,
) -> Kept:
    """
    Args:
        checkpoints: of the surviving lineage, oldest first.
        policies: of the surviving lineage, oldest first.
        num_steps: steps trained in the surviving lineage.
        first_stored: steps before this one lost their shards to an earlier policy, which may have kept less.
        wanted: version numbers somebody will still ask for, such as evaluations that are due.
        base_of: the version that the weights of a version are stored as a difference to; None where they are whole.
    """
    count = retention.checkpoints.keep_last
    kept_checkpoints = set(checkpoints if count is None else checkpoints[-count:])
    resumable = list(checkpoints[-min(2, count or 2) :])
    last_steps = retention.shards.keep_last_steps
    first_kept = max(first_stored, 0 if last_steps is None else num_steps - last_steps)
    first_step = 0
    if first_kept > 0 and resumable:
        starts = [c for c in checkpoints if first_stored <= c.number <= first_kept]
        if starts:
            kept_checkpoints.add(starts[-1])
            first_step = min(starts[-1].number, resumable[0].number)
    numbers = {0, *wanted, *(checkpoint.number for checkpoint in kept_checkpoints)}
    every = retention.policies.keep_every
    kept_policies = {v for v in policies if v.number in numbers or (every and v.number % every == 0)}
    kept_policies |= set(policies[-retention.policies.keep_last :])
    for version in list(kept_policies):
        # All the way back, or to one whose way is kept already.
        while (base := base_of(version)) is not None and base not in kept_policies:
            kept_policies.add(version := base)
    return Kept(frozenset(kept_checkpoints), frozenset(kept_policies), first_step)
