"""Builders for tests that run real stages on a small run, without Prefect and in one event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from asyncopd.config import RunConfig, load_config
from flows.roles import evaluate_versions, pretrain_models, roll_out, score_shards, train_steps
from flows.wiring import OpenRun, open_stored_run
from storage.runs import create_run, new_record
from storage.stores import open_store

SMALL: dict[str, Any] = {
    "name": "small",
    "student": {"kind": "tiny", "num_layers": 1, "hidden_size": 16, "num_heads": 2, "pretrain": {"num_steps": 30}},
    "rollout": {"slots": 8, "shard_size": 4, "shards_per_task": 2, "max_new_tokens": 32},
    "learner": {"num_steps": 4, "batch_size": 8, "checkpoint_every": 2},
    "evaluate": {"every": 4, "num_prompts": 20},
    "limits": {"deadline_s": 30, "poll_s": 0.002, "lease_s": 2, "heartbeat_s": 0.2},
}


def small_config(root: Path | str, **overrides: Any) -> RunConfig:
    """The small walk run in `root`; overrides are dotted keys with `__` for the dot."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(SMALL, {"storage.root": str(root), **dotted})


def new_run(config: RunConfig, run_id: str = "small-1") -> OpenRun:
    """Create a run in storage with its models made, ready for every stage."""
    create_run(open_store(config.storage.root), run_id, new_record(config))
    run = open_stored_run(config.storage.root, run_id)
    # In a thread, because tests that have an event loop call this too.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, pretrain_models(run)).result()
    return run


async def run_all(run: OpenRun) -> None:
    """Every role of a run at once, each with its own view of storage."""
    root, run_id = run.config.storage.root, run.log.run_id
    async with asyncio.TaskGroup() as roles:
        for role in (roll_out, score_shards, train_steps, evaluate_versions):
            roles.create_task(role(open_stored_run(root, run_id)))
