"""The table of metrics: what is not in it cannot be recorded, and docs/metrics.md says what stands there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from asyncopd.errors import ConfigError
from asyncopd.metrics import (
    DRIFT,
    EVALUATION,
    LOSS,
    METRICS,
    RATIO_MAX,
    TRAJECTORIES,
    Metric,
    Reduction,
    documented,
    recorded,
)
from asyncopd.types import Evaluation

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"


def test_the_page_is_made_from_the_table() -> None:
    # Run `python -m asyncopd.metrics` when this fails.
    assert PAGE.read_text() == documented(PAGE.read_text())
    assert f"| `{LOSS.key}` | {LOSS.meaning} | nats per token | token mean |" in PAGE.read_text()


def test_a_metric_outside_the_table_cannot_be_recorded() -> None:
    assert recorded({LOSS: 1}) == {"train/loss_nats": 1.0}
    stray = Metric("train/surprise_nats", "nats", Reduction.TOKEN_MEAN, "made up")
    with pytest.raises(ConfigError, match=r"'train/surprise_nats' is not in the table of asyncopd/metrics\.py"):
        recorded({stray: 1.0})
    # Nor one that means something else under a key of the table.
    with pytest.raises(ConfigError, match="train/loss_nats"):
        recorded({Metric(LOSS.key, "bits", Reduction.TOKEN_MEAN, "made up"): 1.0})
    assert METRICS["train/drift_nats"] is DRIFT
    assert "train/surprise_nats" not in METRICS


def test_a_metric_says_how_tokens_and_steps_reduce() -> None:
    values = np.array([1, 2, 6], np.float32)
    assert LOSS.reduced(values) == 3
    assert RATIO_MAX.reduced(values) == 6
    with pytest.raises(ConfigError, match="train/trajectories reduces as 'count'"):
        TRAJECTORIES.reduced(values)
    assert (LOSS.over_steps([1, 3]), RATIO_MAX.over_steps([1, 3]), TRAJECTORIES.over_steps([1, 3])) == (2, 3, 4)


def test_units_agree_with_keys_and_evaluations_have_the_fields_described() -> None:
    for metric in METRICS.values():
        assert re.fullmatch(r"(train|rollout|loss)/[a-z0-9_]+", metric.key)
        assert metric.key.endswith("_nats") == metric.unit.startswith("nats") or metric.key == "train/grad_norm"
        assert not metric.key.endswith("_fraction") or metric.unit == "fraction"
    assert {metric.key for metric in EVALUATION} < {field.name for field in fields(Evaluation)}


def test_no_module_spells_the_key_of_a_metric_itself() -> None:
    spelled = [
        f"{path.relative_to(ROOT)}: {key}"
        for package in ("asyncopd", "storage", "flows", "api")
        for path in (ROOT / package).rglob("*.py")
        for key in re.findall(r'"((?:train|loss|rollout)/\w+)"', path.read_text())
        if path != ROOT / "asyncopd" / "metrics.py"
    ]
    assert spelled == []
