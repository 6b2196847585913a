"""The same log trained again without interruption, and an undisturbed twin: what a disturbed run is compared with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from asyncopd.errors import RoleFailedError
from storage.layout import MODELS, RunLayout
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores import open_store
from storage.stores.base import ObjectStore

FINISH_S = 900.0


def replayed_weights(root: str, run_id: str, scratch: str) -> bytes:
    """Final weights of a fresh learner that trains the stored trajectories and scores of a run from step 0.

    Args:
        scratch: an empty storage root; models, trajectories and scores are copied there, the run is not touched.
    Raises:
        RoleFailedError: the learner failed.
    """
    log = StoredRunLog(open_store(root), run_id)
    copy = copied_run(log, scratch, overrides={"limits": {**log.config()["limits"], "poll_s": 0.01}})
    for folder in (log.layout.trajectories, log.layout.folder("scores")):
        _copy(log.store, copy.store, folder)
    run_role("learn", copy)
    latest = copy.latest_policy()
    assert latest is not None
    return copy.read_policy(latest).safetensors


def copied_run(log: StoredRunLog, root: str, *, overrides: Mapping[str, Any]) -> StoredRunLog:
    """A new run in `root` with the configuration and the models of another, and none of its work.

    Args:
        overrides: sections that replace those of the configuration.
    """
    store = open_store(root)
    _copy(log.store, store, MODELS)
    config = {**log.config(), **overrides}
    return create_run(store, RunLayout(log.run_id).run_id, {**log.record, "config": config, "created": time.time()})


def run_role(role: str, log: StoredRunLog) -> None:
    """One role process to its end."""
    command = [sys.executable, "-m", "flows.roles", role, "--run-id", log.run_id, "--root", log.store.url]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=FINISH_S)
    if result.returncode:
        raise RoleFailedError(
            f"{role} of {log.store.url} ended with status {result.returncode}: {result.stderr[-1500:]}"
        )


def _copy(source: ObjectStore, target: ObjectStore, folder: str) -> None:
    """Copy every object of a folder; manifests after data is not needed, nobody reads the copy meanwhile."""
    for key in source.list(folder):
        target.put(key, source.get(key), durable=False)
