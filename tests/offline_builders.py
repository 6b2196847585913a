"""A small real run made once per module, and the offline commands called in this process."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pipeline
from rich.console import Console

from asyncopd.config.requests import Replay, ReplayRequest, replays_of
from flows.replay import open_replay, train_replay
from flows.wiring import OpenRun, open_stored_run

NUM_STEPS = 6
QUIET = Console(quiet=True)


def make_run(root: Path, run_id: str = "parent", **overrides: Any) -> OpenRun:
    """Six steps of 8 on the walk, τ = 2, a checkpoint after step 4; head 4 and four tail draws are recorded."""
    settings: dict[str, Any] = {
        "learner__num_steps": NUM_STEPS,
        "learner__checkpoint_every": 4,
        "learner__schedule": "cosine",
        "evaluate__every": 0,
        **overrides,
    }
    run = pipeline.new_run(pipeline.small_config(root, **settings), run_id)
    asyncio.run(pipeline.run_all(run))
    return open_stored_run(str(root), run_id)


def replayed(parent: OpenRun, *settings: str, first: int = 0, last: int = NUM_STEPS, **changes: Any) -> OpenRun:
    """The child of a replay, trained to its end."""
    child, replay = opened(parent, *settings, first=first, last=last, **changes)
    asyncio.run(train_replay(parent, child, replay, console=QUIET))
    return open_stored_run(parent.config.storage.root, child.log.run_id)


def opened(
    parent: OpenRun, *settings: str, first: int = 0, last: int = NUM_STEPS, **changes: Any
) -> tuple[OpenRun, Replay]:
    # Of as many steps as are asked for: what the parent has not trained is for others to refuse.
    asked = ReplayRequest.of({"steps": f"{first}:{last}", "overrides": settings, **changes})
    (replay,) = replays_of(asked, parent.log.run_id, num_steps=last)
    return open_replay(parent, replay)


def weights(run: OpenRun) -> dict[int, str]:
    """sha256 of every version's weights, by number."""
    return {
        version.number: hashlib.sha256(run.log.read_policy(version).safetensors).hexdigest()
        for version in run.log.policies()
    }


def objects(root: Path | str, below: str) -> dict[str, str]:
    """sha256 of every file below a folder of the storage root, heartbeats apart, which are overwritten."""
    folder = Path(root) / below
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "heartbeats" not in path.parts
    }
