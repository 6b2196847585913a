"""Counterfactual staleness: which rollouts a step would have consumed, and what a learner then measures."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offline_builders import QUIET, make_run

from asyncopd.config.requests import CounterfactualRequest
from asyncopd.errors import ConfigError
from asyncopd.learner.counterfactual import (
    Log,
    Rollout,
    Setting,
    check_defined,
    consume,
    settings_of,
    whole_batches,
)
from asyncopd.schedule import OnStale, Order
from asyncopd.study.cells import CellStore
from flows.counterfactual import Cell, log_of, run_cells, run_counterfactual, start_version
from flows.wiring import OpenRun
from storage.stores.base import MemoryStore

B = 4
LOGS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 1)), min_size=4, max_size=40).map(
    lambda rows: [rollout(index, *row) for index, row in enumerate(rows)]
)
SETTINGS = st.builds(
    Setting,
    max_staleness=st.integers(0, 8),
    lag=st.integers(0, 6),
    order=st.sampled_from(["index", "arrival"]),
    on_stale=st.sampled_from(["train", "drop", "hold"]),
)


def rollout(index: int, old: int = 0, early: int = 0, jitter: float = 0.0) -> Rollout:
    """Trained at its own step by the parent; `old` versions stale, its scores there `early` steps before."""
    step = index // B
    version = max(0, step - old)
    arrived = max(version, step - early)
    return Rollout(index, step, arrived, arrived + jitter, version, 10)


def log_with(rollouts: list[Rollout], order: Order = "index", num_clocks: int | None = None, **facts: int) -> Log:
    """A log of whole batches, whose parent trained as many steps as there are."""
    num_batches = max(r.index for r in rollouts) // B + 1
    clocks = max(r.step for r in rollouts) + 1 if num_clocks is None else num_clocks
    return Log("parent", order, B, clocks, rollouts, **{"num_batches": num_batches, **facts})


@given(LOGS, SETTINGS)
def test_each_rollout_has_at_most_one_fate_and_none_is_trained_before_it_was_there(
    log: list[Rollout], setting: Setting
) -> None:
    found = consume(log_with(log), setting)
    fates = [index for clock in (*found.steps, *found.stale) for index in clock]
    assert len(fates) == len(set(fates))
    for clock, indices in enumerate(found.steps):
        assert len(indices) in ((0, B) if setting.order == "arrival" else range(B + 1))
        for index in indices:
            there = log[index].arrived_step if setting.order == "arrival" else log[index].step
            assert clock >= there + setting.lag
            if setting.on_stale != "train":
                assert clock - log[index].version_oldest <= setting.max_staleness
    if setting.on_stale == "train":
        assert not any(found.stale)


@given(LOGS, st.integers(0, 6))
def test_a_lag_adds_itself_to_the_recorded_staleness(log: list[Rollout], lag: int) -> None:
    found = consume(log_with(log), Setting(99, lag, "index", "train"))
    for clock, indices in enumerate(found.steps):
        for index in indices:
            recorded = log[index].step - log[index].version_oldest
            assert clock - log[index].version_oldest == recorded + lag


def test_without_lag_index_order_is_the_parents_own() -> None:
    log = [rollout(index, old=2) for index in range(24)]
    found = consume(log_with(log), Setting(2, 0, "index", "drop"))
    assert found.steps == tuple(tuple(range(B * s, B * s + B)) for s in range(6))
    assert not any(found.stale)


def test_arrival_order_trains_what_was_there_first_and_drops_what_is_too_old_by_then() -> None:
    # Shard 4..7 arrives last but was started under version 0: at clock 2 it is two versions old.
    log = [rollout(i) for i in range(4)]
    log += [Rollout(i, 1, 1, 1.9, 0, 10) for i in range(4, 8)]
    log += [Rollout(i, 2, 1, 1.1, 1, 10) for i in range(8, 12)]
    bound = Setting(1, 0, "arrival", "drop")
    found = consume(log_with(log), bound)
    assert found.steps == ((0, 1, 2, 3), (8, 9, 10, 11), ())
    assert found.stale == ((), (), (4, 5, 6, 7))
    trained = consume(log_with(log), Setting(1, 0, "arrival", "train"))
    assert trained.steps[2] == (4, 5, 6, 7)


def test_index_order_trains_the_survivors_of_a_batch() -> None:
    log = [rollout(0, old=1), rollout(1), rollout(2), rollout(3)]
    log += [Rollout(i, 1, 1, 1.0, i % 2, 10) for i in range(4, 8)]
    found = consume(log_with(log), Setting(0, 0, "index", "drop"))
    assert found.steps == ((0, 1, 2, 3), (5, 7))
    assert found.stale == ((), (4, 6))


def test_index_order_waits_until_all_of_a_batch_is_there_and_goes_on_a_batch_per_clock() -> None:
    # A log of order arrival: 4..7 came after 8..11, at clock 3, so index order stands still at clocks 1 and 2.
    log = [Rollout(i, 0, 0, 0.0, 0, 10) for i in range(4)]
    log += [Rollout(i, 2, 2, 3.0, 1, 10) for i in range(4, 7)] + [Rollout(7, 3, 3, 3.0, 1, 10)]
    log += [Rollout(i, 1, 1, 1.0, 1, 10) for i in range(8, 12)]
    recorded = log_with(log, "arrival", num_clocks=6)
    found = consume(recorded, Setting(9, 0, "index", "train"))
    assert found.steps == ((0, 1, 2, 3), (), (), (4, 5, 6, 7), (8, 9, 10, 11), ())
    later = consume(recorded, Setting(9, 1, "index", "train"))
    assert later.steps == ((), (0, 1, 2, 3), (), (), (4, 5, 6, 7), (8, 9, 10, 11))
    # Batch 1 is not all in the log, so nothing from it on can be trained in index order.
    part = log_with([r for r in log if r.index != 7], "arrival", num_clocks=6, num_batches=1)
    assert consume(part, Setting(9, 0, "index", "train")).steps == ((0, 1, 2, 3), (), (), (), (), ())
    assert whole_batches([*range(7), *range(8, 12)], B) == 1


def test_settings_that_fall_behind_a_log_for_ever_are_refused() -> None:
    trained = [Rollout(i, i // B, i // B, i, i // B, 10) for i in range(8)]
    stale = [Rollout(8, 1, 1, 8, 0, 10, is_trained=False)]
    index, train = Setting(2, 0, "index", "drop"), Setting(2, 0, "arrival", "train")
    check_defined([index, train], log_with(trained, "arrival"))
    check_defined([Setting(2, 0, "arrival", "drop")], log_with(trained + stale, "arrival", num_filtered=1))
    # In index order nothing is made up for, so what was filtered does not matter.
    check_defined([index, train], log_with(trained, "index", num_filtered=1))
    ask = r".* left 1 stale and 0 filtered .*--order arrival --on-stale drop,hold, or"
    with pytest.raises(ConfigError, match="^order index: run parent" + ask):
        check_defined([index], log_with(trained + stale, "arrival"))
    with pytest.raises(ConfigError, match="^order index and on stale train: run parent" + ask):
        check_defined([index, train], log_with(trained + stale, "arrival"))
    with pytest.raises(ConfigError, match="^on stale train: run parent" + ask):
        check_defined([train], log_with(trained + stale, "arrival"))
    with pytest.raises(ConfigError, match=r"^order index: .* left 0 stale and 3 filtered .*--order arrival, or"):
        check_defined([index], log_with(trained, "arrival", num_filtered=3))
    check_defined([train], log_with(trained, "arrival", num_filtered=3))
    assert log_with(trained + stale, "arrival").recorded_staleness == 0


def test_the_lag_makes_the_log_as_stale_as_the_bound_allows() -> None:
    asked = CounterfactualRequest.of({"staleness": "0,2,8", "order": "index", "on_stale": "train"})
    settings = settings_of(asked, recorded_staleness=2)
    assert [setting.lag for setting in settings] == [0, 0, 6]
    assert {s.lag for s in settings_of(asked.model_copy(update={"lag": 5}), recorded_staleness=2)} == {5}
    assert CounterfactualRequest.of({"staleness": "0:64"}).staleness == (0, 1, 2, 4, 8, 16, 32, 64)
    assert CounterfactualRequest.of({"staleness": "0:64"}) == CounterfactualRequest()
    assert CounterfactualRequest.of({"staleness": "0,3"}).staleness == (0, 3)
    assert CounterfactualRequest.of({"staleness": [0, 3]}).staleness == (0, 3)
    cell = Cell(8, 6, "index", "train", 3, 0, True, 8.0, 8, 0.1, 0.2, 0.9, 1.0, 30, 10)
    assert Cell(**json.loads(json.dumps(asdict(cell)))) == cell
    assert cell.waste == 0.25


# -- on a real log ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return make_run(tmp_path_factory.mktemp("counterfactual"), learner__num_steps=16, learner__lr=1e-2)


def cells_of(run: OpenRun, settings: list[Setting]) -> list[Cell]:
    log = log_of(run)
    first, measured_from = start_version(settings, log, None)
    known = CellStore(MemoryStore("memory://cells"), "counterfactual", {})

    def ask() -> list[Cell]:
        return asyncio.run(
            run_cells(run, log, settings, first=first, measured_from=measured_from, known=known, console=QUIET)
        )

    cells = ask()
    assert ask() == cells
    return cells


def test_without_lag_the_figures_are_those_the_run_measured(run: OpenRun) -> None:
    (cell,) = cells_of(run, [Setting(2, 0, "index", "train")])
    steps = run.log.steps()
    num_tokens = sum(step.num_tokens for step in steps)
    for figure, key in ((cell.loss_nats, "train/loss_nats"), (cell.drift_nats, "train/drift_nats")):
        expected = sum(step.metrics[key] * step.num_tokens for step in steps) / num_tokens
        assert figure == pytest.approx(expected, rel=1e-12)
    assert (cell.num_steps, cell.num_tokens, cell.num_tokens_wasted) == (16, num_tokens, 0)
    assert cell.staleness_max == max(max(step.staleness_tokens) for step in steps)


def test_more_staleness_means_more_drift_and_fewer_effective_tokens(run: OpenRun) -> None:
    settings = [Setting(bound, max(0, bound - 2), "index", "train") for bound in (2, 5)]
    fresh, stale = cells_of(run, settings)
    assert stale.staleness_mean > fresh.staleness_mean + 2
    assert stale.staleness_max >= fresh.staleness_max + 2
    assert stale.drift_nats > 1.5 * fresh.drift_nats
    assert stale.ess_fraction < fresh.ess_fraction


def test_a_bound_below_the_recorded_staleness_wastes_what_is_older(run: OpenRun) -> None:
    train, drop, hold = cells_of(run, [Setting(1, 0, "index", policy) for policy in ("train", "drop", "hold")])
    assert train.num_tokens_wasted == 0
    assert drop.num_tokens_wasted == hold.num_tokens_wasted > 0
    assert drop.num_tokens + drop.num_tokens_wasted == train.num_tokens
    assert drop.staleness_max <= 1 < train.staleness_max


@pytest.mark.parametrize("on_stale", ["drop", "hold", "train"])
def test_a_log_of_order_arrival_is_consumed_as_it_was_if_nothing_is_changed(tmp_path: Path, on_stale: OnStale) -> None:
    run = make_run(
        tmp_path,
        staleness__order="arrival",
        staleness__on_stale=on_stale,
        staleness__max_staleness=0,
        learner__num_steps=8,
    )
    steps, log = run.log.steps(), log_of(run)
    same = Setting(0, 0, "arrival", on_stale)
    found = consume(log, same)
    assert found.steps == tuple(step.trained for step in steps)
    assert found.stale == tuple((*step.dropped, *step.held) for step in steps)
    assert log.recorded_staleness == max(step.metrics["train/staleness_max_versions"] for step in steps)
    (cell,) = cells_of(run, [same])
    num_tokens = sum(step.num_tokens for step in steps)
    for figure, key in ((cell.loss_nats, "train/loss_nats"), (cell.drift_nats, "train/drift_nats")):
        expected = sum(step.metrics[key] * step.num_tokens for step in steps) / num_tokens
        assert figure == pytest.approx(expected, rel=1e-12)
    assert (cell.num_steps, cell.num_idle, cell.num_tokens) == (8, 0, num_tokens)
    index = Setting(9, 0, "index", "train")
    if on_stale != "train":
        assert log.num_stale > 0
        assert cell.num_tokens_wasted > 0
        with pytest.raises(ConfigError, match=r"^order index and on stale train: run parent"):
            check_defined([index], log)
        return
    # The same rollouts in index order: every batch after the first of its rollouts, none twice.
    check_defined([index], log)
    (in_index_order,) = cells_of(run, [index])
    trained = [index for step in consume(log, index).steps for index in step]
    assert trained == sorted(trained)
    assert len(trained) == in_index_order.num_steps * run.config.learner.batch_size
    assert in_index_order.num_steps + in_index_order.num_idle == 8
    assert in_index_order.num_steps >= 6


def test_a_log_too_short_for_the_lag_is_refused(run: OpenRun) -> None:
    with pytest.raises(ConfigError, match="this log bears a lag of 4"):
        start_version([Setting(64, 62, "index", "train")], log_of(run), None)


def test_the_command_writes_tables_and_reuses_finished_cells(run: OpenRun, tmp_path: Path) -> None:
    asked = CounterfactualRequest.of({"staleness": "1,4", "on_stale": "train,drop"})

    def ask() -> None:
        address = run.config.storage.root, run.log.run_id
        asyncio.run(run_counterfactual(*address, asked, console=QUIET, out=str(tmp_path)))

    ask()
    table = pq.read_table(tmp_path / "counterfactual.parquet")
    assert table.num_rows == 8
    assert {"lag", "order", "drift_nats", "waste"} <= set(table.column_names)
    text = (tmp_path / "counterfactual.md").read_text()
    assert "Exact:" in text
    assert "Approximate: the closed loop" in text
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    assert len(cells) == 8 + 1
    ask()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")} == cells
    assert (tmp_path / "counterfactual.md").read_text() == text
