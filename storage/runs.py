"""Runs and shared models of a storage root: create, open, list; and what the service was asked for of a run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from asyncopd import __version__
from asyncopd.config import RunConfig
from asyncopd.errors import RunMissingError, StorageError
from asyncopd.records import NO_FACTS, Facts, Manifest
from storage.layout import RUNS, RunLayout, new_nonce, parse, shared_key
from storage.manifests import find_manifest, publish, read_named
from storage.parquet import TopkPrecision
from storage.records import from_json, to_json
from storage.replay import ReplayLog
from storage.run_log import StoredRunLog
from storage.stores.base import ObjectStore

RequestedState = Literal["running", "paused", "cancelled"]


def new_record(config: RunConfig, parent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """run.json of a new run, made now by this code; `parent` says of a replay what is replayed."""
    return {
        "config": config.model_dump(mode="json"),
        "config_hash": config.digest(),
        "code_version": __version__,
        "seed": config.seed,
        "created": time.time(),
        "parent": parent,
    }


def create_run(
    store: ObjectStore, run_id: str, record: Mapping[str, Any], *, topk_precision: TopkPrecision = "float32"
) -> StoredRunLog:
    """Store `record`, as `new_record` makes it, as a new run and open it.

    A run that exists with an equal `config_hash` is opened as it is: a restarted flow finds its own run again.

    Raises:
        StorageError: the run exists with another `config_hash`, or `run_id` cannot be part of a key.
    """
    key = RunLayout(run_id).key("run")
    if not store.put_if_absent(key, to_json(record)):
        found = from_json(store.get(key), key, dict)
        if found.get("config_hash") != record.get("config_hash"):
            raise StorageError(
                f"run {run_id} exists in {store.url} with config hash {found.get('config_hash')}, not "
                f"{record.get('config_hash')}. Choose another run id, or start it with the config it was made with."
            )
    return StoredRunLog(store, run_id, topk_precision=topk_precision)


def open_run(store: ObjectStore, run_id: str, *, topk_precision: TopkPrecision = "float32") -> StoredRunLog:
    """The run's log. Raises StorageError (RunMissingError) when there is no such run.

    A replay's log reads the shards of the run that was sampled, however many replays lie between.
    """
    log = StoredRunLog(store, run_id, topk_precision=topk_precision)
    if not store.exists(log.layout.key("run")):
        raise missing_run(store, run_id)
    source = log
    while source.record.get("parent"):
        source = StoredRunLog(store, source.record["parent"]["run_id"], topk_precision=topk_precision)
    return log if source is log else ReplayLog(store, run_id, source=source, topk_precision=topk_precision)


def missing_run(store: ObjectStore, run_id: str) -> RunMissingError:
    """The error that says there is no such run, for the caller to raise: one message wherever a run is named."""
    known = list_runs(store)
    newest = ", ".join(known[-5:]) or "none"
    return RunMissingError(
        f"there is no run {run_id} in {store.url}. Existing runs: {newest}. Name another storage root with --root."
    )


def find_run(store: ObjectStore, run_id: str) -> str:
    """`run_id` itself. Raises RunMissingError when the root has no object of such a run."""
    if not store.list(RunLayout(run_id).root):
        raise missing_run(store, run_id)
    return run_id


def list_runs(store: ObjectStore) -> list[str]:
    """The ids of all runs, sorted."""
    return [run_id for run_id in store.folder(RUNS).folders if store.exists(RunLayout(run_id).key("run"))]


def publish_model(
    store: ObjectStore, digest: str, objects: Mapping[str, bytes], facts: Facts = NO_FACTS, *, worker: str = ""
) -> bool:
    """Store a pretrained model for all runs under the digest of how it was made. False when it was there before."""
    nonce = new_nonce()
    named = {shared_key("model.data", digest=digest, nonce=nonce, object=name): body for name, body in objects.items()}
    return publish(store, shared_key("model", digest=digest), named, kind="model", worker=worker, facts=facts)


def find_model(store: ObjectStore, digest: str) -> Manifest | None:
    """The manifest of a stored model; None when nobody made it yet."""
    return find_manifest(store, shared_key("model", digest=digest))


def read_model(store: ObjectStore, digest: str) -> Mapping[str, bytes]:
    """The bodies of a stored model, by name. Raises ObjectMissingError or ShardCorruptError."""
    return read_named(store, shared_key("model", digest=digest))


# -- the service's own records ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StateRequest:
    """What a user last asked of a run."""

    state: RequestedState
    recorded: float
    """Unix time, seconds."""


class LaunchLog:
    """The service's own records in a storage root; any number of service processes share them."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def record_launch(self, run_id: str, fields: Mapping[str, Any]) -> bool:
        """Remember what a run was asked to be. False when a launch of that id exists."""
        key = shared_key("launch", run_id=run_id)
        return self._store.put_if_absent(key, to_json({**fields, "recorded": time.time()}))

    def find_launch(self, run_id: str) -> dict[str, Any] | None:
        """What `record_launch` stored, with `recorded`."""
        return self._find("launch", run_id)

    def launches(self) -> list[str]:
        """Run ids of all launches, sorted."""
        keys = self._store.folder(shared_key("launch", run_id="x").rpartition("/")[0]).keys
        return sorted(parsed.fields["run_id"] for key in keys if (parsed := parse(key)).kind == "launch")

    def record_flow_run(self, run_id: str, flow_run_id: str) -> None:
        """The flow run that now works on a run."""
        self._put("flow run", run_id, {"flow_run_id": flow_run_id})

    def find_flow_run(self, run_id: str) -> str | None:
        found = self._find("flow run", run_id)
        return None if found is None else str(found["flow_run_id"])

    def record_request(self, run_id: str, state: RequestedState) -> None:
        self._put("request", run_id, {"wish": state})

    def find_request(self, run_id: str) -> StateRequest | None:
        found = self._find("request", run_id)
        return None if found is None else StateRequest(found["wish"], found["recorded"])

    def claim_key(self, key: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What was first stored under an idempotency key: `fields`, or an earlier request's."""
        name = shared_key("idempotency", digest=hashlib.sha256(key.encode()).hexdigest())
        if self._store.put_if_absent(name, to_json(fields)):
            return dict(fields)
        return from_json(self._store.get(name), name, dict)

    def _put(self, kind: str, run_id: str, fields: Mapping[str, Any]) -> None:
        self._store.put(shared_key(kind, run_id=run_id), to_json({**fields, "recorded": time.time()}))

    def _find(self, kind: str, run_id: str) -> dict[str, Any] | None:
        key = shared_key(kind, run_id=run_id)
        body = self._store.find(key)
        return None if body is None else from_json(body, key, dict)
