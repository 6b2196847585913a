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
from storage import manifests
from storage.events import survives, surviving
from storage.layout import MODELS, parse, parse_version, quarantined, run_of
from storage.maintain.checks import Mend
from storage.maintain.collect import empty_shard
from storage.records import to_json
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.stores.base import ObjectStore

_WORKER = "maintain"
_OBSERVATIONS = {
    "architecture": "the learner stores the architecture again when the run is resumed.",
    "evaluation": "the version is evaluated again when an evaluator is started.",
    "claim": "the shard can be claimed again.",
    "candidates": "back-fill them again; scores of them stay.",
    "state": "the run is in the state before it until its flow records the next.",
}
"""Kind -> what follows, where nothing else has to be done."""


@dataclass
class Quarantine:
    """What one call did."""

    key: str
    moved: dict[str, str] = field(default_factory=dict)
    """Key -> where it lies now."""
    consequences: list[str] = field(default_factory=list)
    """What follows, for people, in order."""

    def move(self, store: ObjectStore, key: str) -> None:
        """Set `key` aside; where it is lost already, what follows is the same."""
        if store.exists(key):
            self.moved[key] = manifests.quarantine(store, key)


def set_aside(store: ObjectStore, key: str) -> Quarantine:
    """Take the object under `key`, or what its data object belongs to, out of its run.

    A key that does not exist but should, such as a lost manifest's, is dealt with in the same way.

    Raises:
        ObjectMissingError: nothing is known of `key`.
        StorageError: the object cannot be done without, or a worker that would be misled by it is alive.
    """
    done = Quarantine(key)
    run_id = run_of(key)
    if run_id is None:
        if not (key.startswith(f"{MODELS}/") and key.endswith(".json")):
            raise StorageError(
                f"{key} is not part of a run or a shared model; see docs/storage.md for the keys there are."
            )
        done.moved[key] = manifests.quarantine(store, key)
        done.consequences.append("the next run that needs the model makes it again.")
        return done
    view = RunView.everything(store, run_id)
    is_data = parse(key).kind == "data"
    if not is_data:
        _one(view, key, done)
    elif key not in view.references:
        raise ObjectMissingError(
            f"{key}: no manifest names it. If it exists it is garbage: {Mend(store.url, run_id).collect()}"
        )
    else:
        for manifest_key in view.references[key]:
            _one(view, manifest_key, done)
            view = RunView.everything(store, run_id)
    gone = {old: len(store.get(new)) for old, new in done.moved.items() if not store.exists(old)}
    if not is_data and not store.exists(key):
        gone.setdefault(key, 0)
    if gone:
        now = time.time()
        store.put(view.layout.key("removal", unix_ms=int(now * 1000)), to_json(Removal("quarantine", gone, now)))
    return done


def _one(view: RunView, key: str, done: Quarantine) -> None:
    match kind := parse(key).kind:
        case "run" | "arrival" | "change":
            # Arrivals and changes are numbered: without one, those after it count for nothing either.
            raise StorageError(f"{key}: nothing can make this record again. Restore it from a copy.")
        case "unknown" | "quarantined":
            raise StorageError(f"{key} is not part of a run; see docs/storage.md for the keys there are.")
        case "trajectories":
            _trajectories(view, key, done)
        case "scores":
            _scores(view, key, done)
        case "checkpoint":
            _checkpoint(view, key, done)
        case "policy":
            _policy(view, key, done)
        case "step":
            _step(view, key, done)
        case "rewind":
            _rewind(view, key, done)
        case _:
            done.move(view.store, key)
            done.consequences.append(_OBSERVATIONS.get(kind, "an observation is lost; nothing depends on it."))


# -- shards -------------------------------------------------------------------------------------------------------
def _trajectories(view: RunView, key: str, done: Quarantine) -> None:
    shard: IndexRange = parse(key).fields["shard"]
    # Whatever teachers there are: their scores speak of tokens that will not come back.
    dependent = {
        other: parsed.kind
        for other in view.entries
        if (parsed := parse(other)).kind in ("scores", "candidates")
        and parsed.fields["shard"].start < shard.stop
        and shard.start < parsed.fields["shard"].stop
    }
    trained = {index: s.step for s in view.steps() for index in s.indices.indices if index not in s.dropped}
    steps = {trained[index] for index in shard.indices if index in trained}
    checkpoint = view.latest_checkpoint() or PolicyVersion(0)
    if steps and max(steps) >= checkpoint.number:
        _go_back(view, checkpoint.number, done)
        steps = {step for step in steps if step < checkpoint.number}
    if steps and all(index in trained for index in shard.indices):
        scores = [other for other, kind in dependent.items() if kind == "scores"]
        _keep_without_data(view, [key, *scores], f"step {min(steps)}", done)
        return
    for other in [*dependent, key]:
        done.move(view.store, other)
    _free_claims(view, shard, "", done)
    mend = Mend(view.store.url, view.run_id)
    done.consequences.append(
        f"indices {shard.name} are generated and scored again when the run is resumed ({mend.resume()}), or at once by "
        f"one more worker of each kind: {mend.deployment('rollout')} ; {mend.deployment('score')}"
    )


def _scores(view: RunView, key: str, done: Quarantine) -> None:
    shard, teacher = parse(key).fields["shard"], view.teacher_of(key)
    rolled_out = view.trajectories().get(shard)
    if rolled_out is not None and rolled_out.facts.removed:
        _keep_without_data(view, [key], "a step before the newest checkpoint", done)
        return
    done.move(view.store, key)
    _free_claims(view, shard, f"score-{teacher}", done)
    done.consequences.append(
        f"indices {shard.name} are scored again by {teacher} when the run is resumed, or at once by one more scorer: "
        f"{Mend(view.store.url, view.run_id).deployment('score')}. What was trained stays trained."
    )


def _keep_without_data(view: RunView, keys: list[str], trained_in: str, done: Quarantine) -> None:
    """Leave manifests that name no data: what was trained is not made, and not trained, again."""
    for key in keys:
        manifest = view.manifests.get(key)
        if manifest is None:
            # Its own is gone or cannot be read.
            kind, shard = parse(key).kind, parse(key).fields["shard"]
            facts = Facts(index_range=(shard.start, shard.stop), num_rows=0)
            manifest = Manifest(kind, {}, time.time(), _WORKER, facts)
        body = view.store.find(key)
        if body is not None:
            view.store.put(moved := quarantined(key), body)
            done.moved[key] = moved
        advice = "Restore the manifest and its data from a copy to have it back."
        empty_shard(view.store, key, manifest, reason="quarantine", advice=advice, now=time.time())
    done.consequences.append(
        f"its indices were trained in {trained_in}, which a checkpoint covers: they stay trained and are not made "
        "again. The step's record stays; the step itself cannot be replayed."
    )


def _free_claims(view: RunView, shard: IndexRange, stage: str, done: Quarantine) -> None:
    """Set the shard's claims aside: a holder that is alive would keep everybody else from it."""
    for key in view.entries:
        claim = parse(key)
        if claim.kind == "claim" and claim.fields["shard"] == shard and stage in ("", claim.fields["stage"]):
            done.move(view.store, key)


# -- learner ------------------------------------------------------------------------------------------------------
def _checkpoint(view: RunView, key: str, done: Quarantine) -> None:
    done.move(view.store, key)
    number = max((state.number for state in view.states("checkpoint") if state != parse_version(key)), default=0)
    done.consequences.append(
        f"a resume starts after step {number - 1} now." if number else "a resume starts at step 0."
    )
    needed = min((min(s.indices.indices) for s in view.steps() if s.step >= number), default=float("inf"))
    if any(shard.stop > needed for shard, manifest in view.trajectories().items() if manifest.facts.removed):
        done.consequences.append("but trajectories after it were removed: restore the checkpoint, or start a new run.")


def _policy(view: RunView, key: str, done: Quarantine) -> None:
    version: PolicyVersion = parse(key).fields["state"]
    log = StoredRunLog(view.store, view.run_id)
    # Read before anything is moved: a checkpoint holds exactly the weights its version published.
    weights = None
    if version in view.states("checkpoint"):
        weights = log.read_checkpoint(version.number, version.rewind).get("model.safetensors")
    done.move(view.store, key)
    newest = view.latest_checkpoint()
    start = newest.number if newest else 0
    if weights is not None:
        manifest = view.records["policy"].get(key)
        facts = replace(manifest.facts if manifest else Facts(step=version.number), chain=None)
        log.publish_policy(PolicyWeights(version, weights), worker=_WORKER, facts=facts)
        what = f"version {version.number} was published again from the checkpoint of the same state."
    elif not survives(version.number, version.rewind, view.rewinds):
        what = "the version was superseded; no worker needs it."
    elif newest is None or start < version.number:
        what = f"a resume trains from state {start} on and publishes version {version.number} again."
    else:
        what = (
            f"version {version.number} is lost: no checkpoint holds its weights. A resume starts at version {start} "
            "and does not need it."
        )
    done.consequences.append(what)


def _step(view: RunView, key: str, done: Quarantine) -> None:
    version: PolicyVersion = parse(key).fields["state"]
    if survives(version.number + 1, version.rewind, view.rewinds):
        before = [state.number for state in view.states("checkpoint") if state.number <= version.number]
        _go_back(view, max(before, default=0), done)
    done.move(view.store, key)


def _go_back(view: RunView, to_step: int, done: Quarantine) -> None:
    """Record a rewind, so that the steps from `to_step` on no longer count and a resume trains them again."""
    learners = view.possibly_alive("learn")
    if learners:
        raise StorageError(
            f"{done.key} was trained, and mending it takes steps back, but the learner {learners[0]} is alive and "
            "would go on from where it is. Nothing was changed. Stop the run, then run this command again."
        )
    number = StoredRunLog(view.store, view.run_id).record_rewind(to_step, worker=_WORKER)
    done.consequences.append(
        f"rewind {number} takes the run back to the state after {to_step} steps; the steps after it are superseded, "
        f"and trained again by: {Mend(view.store.url, view.run_id).resume()}"
    )


def _rewind(view: RunView, key: str, done: Quarantine) -> None:
    number: int = parse(key).fields["number"]
    if key in view.records["rewind"]:
        raise StorageError(f"{key} can be read, and nothing would count as it should without it. It stays.")
    # A learner that went back trains the step after the state it went back to first.
    published = [parsed.fields["state"] for other in view.entries if (parsed := parse(other)).kind == "step"]
    steps = [version.number for version in published if version.rewind == number]
    if steps:
        to_step = min(steps)
    else:
        older = [rewind for rewind in view.rewinds if rewind.number < number]
        checkpoints = [parse(other).fields["state"] for other in view.records["checkpoint"]]
        to_step = max((state.number for state in surviving(checkpoints, older)), default=0)
    done.move(view.store, key)
    view.store.put(key, to_json(Rewind(number, to_step, _WORKER, time.time())))
    done.consequences.append(f"rewind {number} was written again: back to the state after {to_step} steps.")
