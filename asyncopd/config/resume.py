"""Which settings may change when a run goes on: the one list, and what is refused because it would make another run.

A run is its record and the changes recorded since (`storage/events.py`). What decides prompts, tokens, scores,
losses or their order never changes; what only decides who does the work, when, and how often it is saved or looked at,
may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncopd.config.schema import RunConfig
from asyncopd.errors import ConfigError

SAFE_CHANGES: Mapping[str, str] = {
    "limits": "patience and pace, not results",
    "rollout.workers": "who samples an index does not decide its tokens",
    "rollout.shards_per_task": "how work is grouped into Prefect tasks",
    "score.workers": "who scores an index does not decide its scores",
    "score.shards_per_task": "how work is grouped into Prefect tasks",
    "evaluate.every": "looks at versions, does not change them",
    "learner.checkpoint_every": "how much a crash makes the learner train again",
    "learner.num_steps": "upwards, with a constant schedule: steps already trained keep their learning rate",
    "storage.root": "the run was copied; keys are relative to it",
    "storage.min_free_bytes": "a check at the start",
}
"""Setting, or section, and why changing it leaves the run what it is."""

Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> (old value, new value)."""


def differences(old: RunConfig, new: RunConfig) -> Changes:
    """Every setting in which the two differ, by dotted key; None where one of them has no such setting."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def safe_changes(old: RunConfig, new: RunConfig, *, run_id: str) -> Changes:
    """What differs, if all of it may change when a run goes on. Empty when nothing differs.

    Raises:
        ConfigError: some of it may not; names every such setting and what may change instead.
    """
    changes = differences(old, new)
    refused = [f"{key}: {was!r} -> {now!r}" for key, (was, now) in changes.items() if not _is_safe(key, old, new)]
    if refused:
        raise ConfigError(
            f"run {run_id} exists and only goes on with the configuration it was started with. Different, and part of "
            f"what the run is: {'; '.join(refused)}. Leave them out to resume it, or leave the run id out to start a "
            f"new run. These may change: {', '.join(SAFE_CHANGES)} (num_steps upwards, with a constant schedule)."
        )
    return changes


def _is_safe(key: str, old: RunConfig, new: RunConfig) -> bool:
    if key == "learner.num_steps":
        grows = new.learner.num_steps > old.learner.num_steps
        return grows and old.learner.schedule == new.learner.schedule == "constant"
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE_CHANGES)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
