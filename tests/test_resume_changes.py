"""A run goes on with its own configuration, or with one that differs in what is listed as safe; nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pipeline
import pytest

from asyncopd.config import RunConfig
from asyncopd.config.load import SAFE_CHANGES, safe_changes
from asyncopd.errors import ConfigError
from flows.train import _open_or_create
from flows.wiring import open_stored_run


def changed(**overrides: Any) -> dict[str, tuple[Any, Any]]:
    return safe_changes(pipeline.small_config("r"), pipeline.small_config("r", **overrides), run_id="small-1")


def test_nothing_changed_is_nothing_to_record() -> None:
    assert changed() == {}


def test_what_is_listed_may_change() -> None:
    found = changed(limits__lease_s=5, rollout__workers=3, learner__num_steps=9, learner__checkpoint_every=7)
    assert found == {
        "limits.lease_s": (2.0, 5.0),
        "rollout.workers": (1, 3),
        "learner.num_steps": (4, 9),
        "learner.checkpoint_every": (2, 7),
    }


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"learner__lr": 1.0}, "learner.lr: 0.001 -> 1.0"),
        ({"learner__num_steps": 3}, "learner.num_steps: 4 -> 3"),
        ({"staleness__max_staleness": 3}, "staleness.max_staleness: 2 -> 3"),
        ({"rollout__shard_size": 2}, "rollout.shard_size: 4 -> 2"),
        ({"loss": {"name": "reverse_kl"}}, "loss.name: 'head_tail' -> 'reverse_kl'"),
    ],
)
def test_what_makes_another_run_is_refused_by_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="only goes on with the configuration it was started with") as refused:
        changed(limits__lease_s=5, **overrides)
    assert named in str(refused.value)
    assert "limits.lease_s:" not in str(refused.value)
    assert all(setting in str(refused.value) for setting in SAFE_CHANGES)


def test_more_steps_are_refused_when_the_learning_rate_depends_on_their_number() -> None:
    config = pipeline.small_config("r", learner__schedule="cosine")
    with pytest.raises(ConfigError, match=r"learner\.num_steps: 4 -> 9"):
        safe_changes(config, pipeline.small_config("r", learner__schedule="cosine", learner__num_steps=9), run_id="a")


async def test_a_finished_run_with_more_steps_goes_on_and_remembers_why(tmp_path: Path) -> None:
    run = pipeline.new_run(pipeline.small_config(tmp_path / "a", evaluate__every=0))
    await pipeline.run_all(run)
    resumed, log = _open_or_create(None, {"learner.num_steps": 6}, "small-1", str(tmp_path / "a"))
    assert resumed.learner.num_steps == 6
    assert [change.settings for change in log.changes()] == [{"learner.num_steps": (4, 6)}]
    longer = open_stored_run(str(tmp_path / "a"), "small-1")
    assert longer.config == resumed
    await pipeline.run_all(longer)
    assert [(s.step, s.rewind) for s in longer.log.steps()] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]

    # Copied elsewhere, it goes on there, with the changes made so far.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved, log = _open_or_create(None, {}, "small-1", str(tmp_path / "b"))
    assert moved == RunConfig.model_validate(log.config())
    assert (moved.storage.root, moved.learner.num_steps) == (str(tmp_path / "b"), 6)
    assert len(log.changes()) == 1
