"""A small real run with every kind of object in it, and what the maintenance tests do with copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pipeline
from storage_builders import make_scores, make_trajectories, make_weights

from asyncopd.config import load_config
from asyncopd.errors import AsyncOPDError
from asyncopd.types import IndexRange, PolicyVersion, TrainStep
from flows.wiring import OpenRun, open_stored_run
from storage.manifests import find_manifest
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.runs import create_run, find_model, open_run, read_model
from storage.stores.base import ObjectStore

RUN_ID = "small-1"


async def finished_run(root: Path) -> OpenRun:
    """Trained to its end, with a rewind on the way and a failure on record."""
    run = pipeline.new_run(pipeline.small_config(root, staleness__max_staleness=2, evaluate__every=2))
    await pipeline.run_all(run)
    run.log.record_rewind(2, worker="learn-x")  # as if steps 2 and 3 had been lost
    await pipeline.train_steps(run)
    await pipeline.evaluate_versions(open_stored_run(str(root), RUN_ID))
    run.log.publish_failure("learn", "learn-x", "a reason")
    return run


def copy_of(run: OpenRun, root: Path) -> StoredRunLog:
    """The same run in another storage root, times included."""
    shutil.copytree(run.config.storage.root, root)
    return open_run(type(run.store)(str(root)), RUN_ID)


def new_log(store: ObjectStore, *, checkpoint_every: int = 2) -> StoredRunLog:
    """A run without models: steps of 4 indices in shards of 2."""
    sections = {
        "rollout": {"shard_size": 2},
        "learner": {"num_steps": 100, "batch_size": 4, "checkpoint_every": checkpoint_every},
        "evaluate": {"every": 0},
    }
    config = load_config(sections)
    log = create_run(store, "run", {"config": config.model_dump(mode="json"), "config_hash": config.digest()})
    log.publish_architecture({"config.json": b"{}"})
    log.publish_policy(make_weights(0), worker="w")
    return log


def train(log: StoredRunLog, first: int, last: int, *, rewind: int = 0, checkpoint_every: int = 2) -> None:
    """Everything the roles leave behind of steps `first` to `last` − 1."""
    for step in range(first, last):
        indices, num_tokens = IndexRange(4 * step, 4 * step + 4), 0
        for start in (indices.start, indices.start + 2):
            shard = IndexRange(start, start + 2)
            rows = make_trajectories(shard)
            num_tokens += sum(len(row.response_ids) for row in rows)
            if log.find_trajectories(shard) is None:
                log.publish_trajectories(shard, rows, worker="w")
                log.publish_scores("oracle", shard, [make_scores(row) for row in rows], worker="w")
        log.publish_policy(make_weights(step + 1, rewind), worker="w")
        version = PolicyVersion(step + 1, rewind)
        log.publish_step(TrainStep(step, rewind, indices, version, num_tokens, {}, {0: num_tokens}, 1000.0 + step))
        if (step + 1) % checkpoint_every == 0:
            log.publish_checkpoint(step + 1, rewind, {"model": b"m"}, worker="w")


def read_everything(log: StoredRunLog, model_digest: str) -> list[AsyncOPDError]:
    """Call every reader there is on every object; returns the errors of ours. Any other error is the test's."""
    errors: list[AsyncOPDError] = []

    def attempt(call: Callable[..., object], *arguments: object) -> object:
        try:
            return call(*arguments)
        except AsyncOPDError as error:
            errors.append(error)
            return None

    fresh = StoredRunLog(log.store, log.run_id)
    attempt(lambda: fresh.record)
    for shard in fresh.trajectory_shards():
        attempt(fresh.find_trajectories, shard)
        attempt(fresh.read_trajectories, shard)
        attempt(fresh.find_scores, "oracle", shard)
        attempt(fresh.read_scores, "oracle", shard)
    for rewinds in (fresh.rewinds, fresh.current_rewind, fresh.latest_policy, fresh.latest_checkpoint):
        attempt(rewinds)
    for version in attempt(fresh.policies) or ():
        attempt(fresh.read_policy, version)
        attempt(find_manifest, log.store, log.layout.key("policy", state=version))
        attempt(fresh.find_step, version.number)
    for checkpoint in attempt(fresh.checkpoints) or ():
        attempt(fresh.read_checkpoint, *checkpoint)
    for reader in (fresh.steps, fresh.evaluations, fresh.failures, fresh.heartbeats, fresh.teachers):
        attempt(reader)
    attempt(fresh.read_architecture)
    for kind in ("spans", "claim"):
        attempt(RunView(fresh).read, kind)
    attempt(find_model, log.store, model_digest)
    attempt(read_model, log.store, model_digest)
    return errors
