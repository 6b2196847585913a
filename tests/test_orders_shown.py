"""What is dropped and held is counted where people look, and settings that do not fit together are refused."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic_run import config_of, new_log, publish_run, train_step

from asyncopd.cli.progress import ProgressWatch, plain_line
from asyncopd.config import load_config
from asyncopd.errors import ConfigError
from asyncopd.report.summary import Summary
from asyncopd.report.text import to_markdown
from asyncopd.types import IndexSet
from flows.report import summarise
from storage.run_view import RunView
from storage.stores import open_store


def run_with(on_stale: str, **left_out: dict[int, str]) -> tuple[Any, Any]:
    """A finished run of arrival order whose last step also decided about indices 96 and 97."""
    config = config_of(staleness={"order": "arrival", "on_stale": on_stale})
    log = new_log(open_store(f"memory://shown-{on_stale}-{'-'.join(left_out)}"), config)
    publish_run(log, config, num_steps=11)
    log.publish_step(train_step(11, indices=IndexSet((*range(88, 98),)), **left_out))
    return log, config


@pytest.mark.parametrize(
    ("on_stale", "field", "shown", "reported"),
    [
        ("drop", "dropped", "2 dropped (stale)", "- 2 trajectories were not trained: stale."),
        ("hold", "held", "2 held (stale)", "- 2 trajectories are held untrained: stale."),
    ],
)
def test_panel_and_report_count_what_was_left_out_with_its_reason(
    on_stale: str, field: str, shown: str, reported: str
) -> None:
    log, config = run_with(on_stale, **{field: {96: "stale", 97: "stale"}})
    line = plain_line(ProgressWatch(RunView(log), config).look(), config)
    assert f"max of 2 allowed, {shown}" in line
    summary = summarise(log, config)
    text = to_markdown(summary, "report")
    assert reported in text
    assert "in arrival order at a staleness of at most τ = 2 (what was older" in text
    assert Summary.from_json(summary.to_json()) == summary


def test_where_stale_trajectories_are_trained_no_bound_is_claimed() -> None:
    log, config = run_with("train")
    assert "max of unbounded" in plain_line(ProgressWatch(RunView(log), config).look(), config)
    text = to_markdown(summarise(log, config), "report")
    assert "in arrival order, also what was older than τ = 2." in text
    assert "at most τ" not in text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"order": "arrival"}, "order arrival needs on_stale"),
        ({"on_stale": "drop"}, "on_stale drop has nothing to decide in order index"),
        ({"max_ahead": 5}, "max_ahead 5 has no effect in order index"),
        ({"max_staleness": 0, "in_flight_updates": False}, "in_flight_updates false has no effect at max_staleness 0"),
        ({"max_staleness": 0, "max_drift": 0.1}, "max_drift has no effect at max_staleness 0"),
        ({"max_drift": 0}, "staleness.max_drift: must be greater than 0"),
        ({"order": "arrival", "on_stale": "skip"}, "staleness.on_stale: expected one of 'drop', 'hold' or 'train'"),
        ({"order": "arrival", "on_stale": "drop", "max_ahead": 0}, "staleness.max_ahead: must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config({"staleness": settings})


def test_a_stored_configuration_of_every_order_is_read_back() -> None:
    for settings in ({}, {"order": "arrival", "on_stale": "hold", "max_ahead": 5, "max_drift": 0.5}):
        config = load_config({"staleness": settings})
        assert load_config(config.model_dump(mode="json")) == config
        assert config.plan.order == config.staleness.order
