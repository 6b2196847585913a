"""Sets a corrupt object aside with everything that follows from it, and says what that is.

trajectories   scores of the shard go too, and its claims, so that running or resumed workers make it again;
               trained since the newest checkpoint: a rewind takes its steps back first, and a resume trains them again;
               trained before it: the manifest stays without data, so that no index is trained twice
scores         made again from the trajectories; the same teacher gives the same numbers
checkpoint     an older one is used; later steps are trained again from the log
policy         published again from the checkpoint of the same state, or noted as lost
step           a rewind to the newest checkpoint before it; a resume trains it again
rewind         written again, from what was published under it
anything else  set aside; an observation is lost
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from asyncopd.errors import ObjectMissingError, StorageError
from asyncopd.records import Facts, Manifest, Removal, Rewind
from asyncopd.types import IndexRange, PolicyVersion, PolicyWeights
from storage.layout import MODELS, parse, parse_shard, parse_version, quarantined, run_of
from storage.learner_log import survives, surviving
from storage.maintain.collect import empty_shard
from storage.maintain.findings import Mend
from storage.records import to_json
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.stores.base import ObjectStore

_WORKER = "maintain"


@dataclass
class Quarantine:
    """What one call did."""

    key: str
    moved: dict[str, str] = field(default_factory=dict)
    """Key -> where it lies now."""
    consequences: list[str] = field(default_factory=list)
    """What follows, for people, in order."""


def set_aside(store: ObjectStore, key: str) -> Quarantine:
    """Take the object under `key`, or what its data object belongs to, out of its run.

    A key that does not exist but should, such as a lost manifest's, is dealt with in the same way.

    Raises:
        ObjectMissingError: nothing is known of `key`.
        StorageError: the object cannot be done without, or a worker that would be misled by it is alive.
    """
    run_id = run_of(key)
    if run_id is None:
        return _shared_model(store, key)
    snapshot = RunView.everything(store, run_id)
    kind = parse(key).kind
    done = Quarantine(key)
    if kind == "data":
        for manifest_key in _manifests_of(snapshot, key):
            _one(snapshot, parse(manifest_key).kind, manifest_key, done)
            snapshot = RunView.everything(store, run_id)
    else:
        _one(snapshot, kind, key, done)
    gone = {old: store.size(new) for old, new in done.moved.items() if not store.exists(old)}
    if kind != "data" and not store.exists(key):
        gone.setdefault(key, 0)
    if gone:
        now = time.time()
        store.put(snapshot.layout.key("removal", unix_ms=int(now * 1000)), to_json(Removal("quarantine", gone, now)))
    return done


def _one(snapshot: RunView, kind: str, key: str, done: Quarantine) -> None:
    match kind:
        case "run" | "arrival" | "change":
            # Arrivals and changes are numbered: without one, those after it count for nothing either.
            raise StorageError(f"{key}: nothing can make this record again. Restore it from a copy.")
        case "trajectories":
            _trajectories(snapshot, key, done)
        case "scores":
            _scores(snapshot, key, done)
        case "checkpoint":
            _checkpoint(snapshot, key, done)
        case "policy":
            _policy(snapshot, key, done)
        case "step":
            _step(snapshot, key, done)
        case "rewind":
            _rewind(snapshot, key, done)
        case "unknown" | "quarantined":
            raise StorageError(f"{key} is not part of a run; see docs/storage.md for the keys there are.")
        case _:
            _move(snapshot, key, done)
            done.consequences.append(_OBSERVATIONS.get(kind, "an observation is lost; nothing depends on it."))


_OBSERVATIONS = {
    "architecture": "the learner stores the architecture again when the run is resumed.",
    "evaluation": "the version is evaluated again when an evaluator is started.",
    "claim": "the shard can be claimed again.",
    "candidates": "back-fill them again; scores of them stay.",
    "state": "the run is in the state before it until its flow records the next.",
}


def _manifests_of(snapshot: RunView, key: str) -> list[str]:
    if key not in snapshot.references:
        raise ObjectMissingError(
            f"{key}: no manifest names it. If it exists it is garbage: "
            f"{Mend(snapshot.store.url, snapshot.layout.run_id).collect()}"
        )
    return snapshot.references[key]


# -- shards -------------------------------------------------------------------------------------------------------
def _trajectories(snapshot: RunView, key: str, done: Quarantine) -> None:
    shard, layout = _shard_of(key), snapshot.layout
    # Whatever teachers there are: their scores speak of tokens that will not come back.
    dependent = {k: parse(k).kind for k in snapshot.entries}
    dependent = {k: kind for k, kind in dependent.items() if kind in ("scores", "candidates") and _overlaps(k, shard)}
    trained = {index: s.step for s in snapshot.steps() for index in s.indices.indices if index not in s.dropped}
    steps = {trained[index] for index in shard.indices if index in trained}
    checkpoint = snapshot.latest_checkpoint() or PolicyVersion(0)
    if steps and max(steps) >= checkpoint.number:
        _go_back(snapshot, checkpoint.number, done)
        steps = {step for step in steps if step < checkpoint.number}
    if steps and all(index in trained for index in shard.indices):
        scores = [dependent_key for dependent_key, kind in dependent.items() if kind == "scores"]
        _keep_without_data(snapshot, [key, *scores], f"step {min(steps)}", done)
        return
    for dependent_key in dependent:
        _move(snapshot, dependent_key, done)
    _move(snapshot, key, done)
    _free_claims(snapshot, shard, "", done)
    mend = Mend(snapshot.store.url, layout.run_id)
    done.consequences.append(
        f"indices {shard.name} are generated and scored again when the run is resumed ({mend.resume()}), or at once by "
        f"one more worker of each kind: {mend.deployment('rollout')} ; {mend.deployment('score')}"
    )


def _scores(snapshot: RunView, key: str, done: Quarantine) -> None:
    shard = _shard_of(key)
    teacher = parse(key).fields["teacher"]
    rolled_out = snapshot.records["trajectories"].get(
        snapshot.layout.shard_manifest(snapshot.layout.trajectories, shard)
    )
    if rolled_out is not None and rolled_out.facts.removed:
        _keep_without_data(snapshot, [key], "a step before the newest checkpoint", done)
        return
    _move(snapshot, key, done)
    _free_claims(snapshot, shard, f"score-{teacher}", done)
    mend = Mend(snapshot.store.url, snapshot.layout.run_id)
    done.consequences.append(
        f"indices {shard.name} are scored again by {teacher} when the run is resumed, or at once by one more scorer: "
        f"{mend.deployment('score')}. What was trained stays trained."
    )


def _keep_without_data(snapshot: RunView, keys: list[str], trained_in: str, done: Quarantine) -> None:
    """Leave manifests that name no data: what was trained is not made, and not trained, again."""
    for key in keys:
        manifest = snapshot.manifests.get(key) or _rebuilt(snapshot, key)
        body = snapshot.store.find(key)
        if body is not None:
            snapshot.store.put(moved := quarantined(key), body)
            done.moved[key] = moved
        advice = "Restore the manifest and its data from a copy to have it back."
        empty_shard(snapshot.store, key, manifest, reason="quarantine", advice=advice, now=time.time())
    done.consequences.append(
        f"its indices were trained in {trained_in}, which a checkpoint covers: they stay trained and are not made "
        "again. The step's record stays; the step itself cannot be replayed."
    )


def _rebuilt(snapshot: RunView, key: str) -> Manifest:
    """A manifest for a shard whose own is gone or cannot be read."""
    shard, kind = _shard_of(key), parse(key).kind
    return Manifest(kind, {}, time.time(), _WORKER, Facts(index_range=(shard.start, shard.stop), num_rows=0))


def _free_claims(snapshot: RunView, shard: IndexRange, stage: str, done: Quarantine) -> None:
    """Set the shard's claims aside: a holder that is alive would keep everybody else from it."""
    for key in [key for key in snapshot.entries if parse(key).kind == "claim"]:
        claim = parse(key).fields
        if claim["shard"] == shard and stage in ("", claim["stage"]):
            _move(snapshot, key, done)


# -- learner ------------------------------------------------------------------------------------------------------
def _checkpoint(snapshot: RunView, key: str, done: Quarantine) -> None:
    _move(snapshot, key, done)
    rest = [state for state in snapshot.states("checkpoint") if state != parse_version(key)]
    number = rest[-1].number if rest else 0
    done.consequences.append(
        f"a resume starts after step {number - 1} now." if number else "a resume starts at step 0."
    )
    emptied = [m for m in snapshot.records["trajectories"].values() if m.facts.removed]
    if any((m.facts.index_range or (0, 0))[1] > _first_index(snapshot, number) for m in emptied):
        done.consequences.append("but trajectories after it were removed: restore the checkpoint, or start a new run.")


def _first_index(snapshot: RunView, step: int) -> float:
    return min((min(s.indices.indices) for s in snapshot.steps() if s.step >= step), default=float("inf"))


def _policy(snapshot: RunView, key: str, done: Quarantine) -> None:
    version = parse_version(key)
    assert version is not None
    log = StoredRunLog(snapshot.store, snapshot.layout.run_id)
    # Read before anything is moved: a checkpoint holds exactly the weights its version published.
    weights = None
    if version in snapshot.states("checkpoint"):
        weights = log.read_checkpoint(version.number, version.rewind).get("model.safetensors")
    _move(snapshot, key, done)
    if weights is not None:
        manifest = snapshot.records["policy"].get(key)
        facts = replace(manifest.facts if manifest else Facts(step=version.number), chain=None)
        log.publish_policy(PolicyWeights(version, weights), worker=_WORKER, facts=facts)
        done.consequences.append(f"version {version.number} was published again from the checkpoint of the same state.")
        return
    newest = snapshot.latest_checkpoint()
    if not survives(version.number, version.rewind, snapshot.rewinds):
        done.consequences.append("the version was superseded; no worker needs it.")
    elif newest is None or newest.number < version.number:
        start = newest.number if newest else 0
        done.consequences.append(f"a resume trains from state {start} on and publishes version {version.number} again.")
    else:
        done.consequences.append(
            f"version {version.number} is lost: no checkpoint holds its weights. A resume starts at version "
            f"{newest.number} and does not need it."
        )


def _step(snapshot: RunView, key: str, done: Quarantine) -> None:
    version = parse_version(key)
    assert version is not None
    before = [state.number for state in snapshot.states("checkpoint") if state.number <= version.number]
    if survives(version.number + 1, version.rewind, snapshot.rewinds):
        _go_back(snapshot, max(before, default=0), done)
    _move(snapshot, key, done)


def _go_back(snapshot: RunView, to_step: int, done: Quarantine) -> None:
    """Record a rewind, so that the steps from `to_step` on no longer count and a resume trains them again."""
    learners = snapshot.alive_workers("learn")
    if learners:
        raise StorageError(
            f"{done.key} was trained, and mending it takes steps back, but the learner {learners[0]} is alive and "
            "would go on from where it is. Nothing was changed. Stop the run, then run this command again."
        )
    log = StoredRunLog(snapshot.store, snapshot.layout.run_id)
    number = log.record_rewind(to_step, worker=_WORKER)
    mend = Mend(snapshot.store.url, snapshot.layout.run_id)
    done.consequences.append(
        f"rewind {number} takes the run back to the state after {to_step} steps; the steps after it are superseded, "
        f"and trained again by: {mend.resume()}"
    )


def _rewind(snapshot: RunView, key: str, done: Quarantine) -> None:
    number = int(key.rsplit("/", 1)[1].removesuffix(".json"))
    if snapshot.records["rewind"].get(key) is not None:
        raise StorageError(f"{key} can be read, and nothing would count as it should without it. It stays.")
    # A learner that went back trains the step after the state it went back to first.
    published = [parse_version(k) for k in snapshot.entries if parse(k).kind == "step"]
    steps = [version.number for version in published if version is not None and version.rewind == number]
    if steps:
        to_step = min(steps)
    else:
        older = [rewind for rewind in snapshot.rewinds if rewind.number < number]
        checkpoints = [v for k in snapshot.records["checkpoint"] if (v := parse_version(k)) is not None]
        to_step = max((state.number for state in surviving(checkpoints, older)), default=0)
    if key in snapshot.entries:
        _move(snapshot, key, done)
    snapshot.store.put(key, to_json(Rewind(number, to_step, _WORKER, time.time())))
    done.consequences.append(f"rewind {number} was written again: back to the state after {to_step} steps.")


# -- both ---------------------------------------------------------------------------------------------------------
def _move(snapshot: RunView, key: str, done: Quarantine) -> None:
    body = snapshot.store.find(key)
    if body is None:
        return  # lost already: what follows is the same
    snapshot.store.put(moved := quarantined(key), body)
    snapshot.store.delete(key)
    done.moved[key] = moved


def _shared_model(store: ObjectStore, key: str) -> Quarantine:
    if not (key.startswith(f"{MODELS}/") and key.endswith(".json")):
        raise StorageError(f"{key} is not part of a run or a shared model; see docs/storage.md for the keys there are.")
    body = store.get(key)
    store.put(moved := quarantined(key), body)
    store.delete(key)
    return Quarantine(key, {key: moved}, ["the next run that needs the model makes it again."])


def _shard_of(key: str) -> IndexRange:
    shard = parse_shard(key)
    assert shard is not None  # by its kind
    return shard


def _overlaps(key: str, shard: IndexRange) -> bool:
    other = _shard_of(key)
    return other.start < shard.stop and shard.start < other.stop
