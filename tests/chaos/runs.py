"""The run that chaos disturbs, small, paced and repeatable bit for bit at τ = 0; and what it is compared with.

The comparisons: the same log trained again without interruption, and an undisturbed twin.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from asyncopd.config import RunConfig, load_config
from asyncopd.errors import RoleFailedError
from storage.layout import MODELS, RunLayout
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores import open_store
from storage.stores.base import ObjectStore

RUN_ID = "chaos"
LEASE_S = 2.0
FINISH_S = 900.0
"""Patience with a role process that nobody disturbs."""


def chaos_config(root: str, *, num_steps: int, max_staleness: int, poll_s: float = 0.1) -> RunConfig:
    """A tiny student, the oracle teacher, two samplers, and limits short enough to be hit.

    One slot: a response is then decoded alone, so its log-probs do not depend on what is beside it. With more slots the
    tokens are the same, but the last bits of log-probs, and so of weights, follow the composition of the batch.

    Args:
        poll_s: the pace. A step waits for three looks at storage, which leaves room to be disturbed on any machine.
    """
    sections: dict[str, Any] = {
        "name": "chaos",
        "student": {"kind": "tiny", "num_layers": 1, "hidden_size": 16, "num_heads": 2, "pretrain": {"num_steps": 30}},
        "rollout": {"workers": 2, "slots": 1, "shard_size": 4, "shards_per_task": 2, "max_new_tokens": 32},
        "score": {"shards_per_task": 2},
        "staleness": {"max_staleness": max_staleness},
        "learner": {"num_steps": num_steps, "batch_size": 8, "checkpoint_every": 5},
        "evaluate": {"every": 0},
        "storage": {"root": root, "min_free_bytes": 1_000_000},
        "limits": {
            "lease_s": LEASE_S,
            "heartbeat_s": 0.2,
            "hang_s": 20,
            "deadline_s": 180,
            "max_restarts": 10_000,
            "poll_s": poll_s,
        },
    }
    return load_config(sections)


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
