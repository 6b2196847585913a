"""Order `arrival`, in-flight updates and drift-bounded admission on real parts, in one process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pipeline
import pytest

from asyncopd.schedule import Arrival, num_taken
from asyncopd.types import IndexRange, IndexSet
from flows.wiring import OpenRun, open_stored_run
from storage.maintain.ledger import events_of, ledger_of
from storage.run_view import RunView


def arrival_config(root: Path, on_stale: str, **overrides: Any) -> Any:
    """τ = 0, so that whatever is generated ahead of the learner is too stale for the step it reaches."""
    fields = {"staleness__order": "arrival", "staleness__on_stale": on_stale, "staleness__max_staleness": 0}
    return pipeline.small_config(root, **{**fields, "evaluate__every": 0, **overrides})


def check_arrival_run(run: OpenRun) -> None:
    """Whatever the rule: full steps, every index in one state, and steps that are what the arrivals say."""
    plan, steps, arrivals = run.config.plan, run.log.steps(), run.log.arrivals()
    assert [step.step for step in steps] == list(range(plan.num_steps))
    positions = [index for arrival in arrivals for index in arrival.taken]
    assert [index for step in steps for index in step.trained] == positions[: plan.num_indices]
    assert all(len(step.trained) == plan.batch_size for step in steps)
    ledger = ledger_of(run.log)
    assert ledger.violations() == []
    assert sum(ledger.counts().values()) == len(ledger.admitted)
    assert ledger.counts()["trained"] == plan.num_indices
    for step in steps:
        assert step.metrics["train/dropped_trajectories"] == len(step.dropped)
        assert step.metrics["train/held_trajectories"] == len(step.held)
        assert sum(step.staleness_tokens.values()) == step.num_tokens


@pytest.mark.parametrize("on_stale", ["drop", "hold", "train"])
async def test_a_run_of_arrival_order_fills_every_step_and_accounts_for_the_rest(tmp_path: Path, on_stale: str) -> None:
    run = pipeline.new_run(arrival_config(tmp_path, on_stale))
    await pipeline.run_all(run)
    check_arrival_run(run)
    steps, ledger = run.log.steps(), ledger_of(run.log)
    # Three lanes start under version 0 and a step takes two shards, so at least one comes too late for step 0.
    if on_stale == "train":
        assert ledger.counts()["dropped"] == ledger.counts()["held"] == 0
        assert sum(step.metrics["train/stale_trajectories"] for step in steps) >= run.config.rollout.shard_size
        return
    assert sum(step.metrics["train/stale_trajectories"] for step in steps) == 0
    assert max(max(step.staleness_tokens) for step in steps) == 0
    left_out = {"drop": "dropped", "hold": "held"}[on_stale]
    assert ledger.reasons(left_out).keys() == {"stale"}  # type: ignore[arg-type]
    assert ledger.counts()[left_out] >= run.config.rollout.shard_size  # type: ignore[index]


async def test_a_rewound_learner_trains_the_same_trajectories_to_the_same_weights(tmp_path: Path) -> None:
    run = pipeline.new_run(arrival_config(tmp_path, "drop"))
    await pipeline.run_all(run)
    before, arrivals = run.log.steps(), run.log.arrivals()
    weights = run.log.read_policy(run.log.latest_policy()).safetensors

    rewind = run.log.record_rewind(2, worker="test")  # as if steps 2 and 3 had been lost
    assert ledger_of(run.log).counts()["trained"] == 2 * run.config.learner.batch_size
    await pipeline.train_steps(open_stored_run(str(tmp_path), run.log.run_id))
    after = run.log.steps()
    assert [(step.step, step.rewind) for step in after] == [(0, 0), (1, 0), (2, rewind + 1), (3, rewind + 1)]
    assert [(s.indices, s.dropped, s.held) for s in after] == [(s.indices, s.dropped, s.held) for s in before]
    assert run.log.read_policy(run.log.latest_policy()).safetensors == weights
    assert run.log.arrivals() == arrivals
    check_arrival_run(run)


@pytest.mark.parametrize("on_stale", ["drop", "train"])
async def test_a_learner_killed_in_mid_run_neither_loses_nor_repeats_anything(tmp_path: Path, on_stale: str) -> None:
    config = arrival_config(tmp_path, on_stale, learner__num_steps=6, learner__checkpoint_every=4)
    run = pipeline.new_run(config)

    def another() -> OpenRun:
        return open_stored_run(str(tmp_path), run.log.run_id)

    async with asyncio.TaskGroup() as roles:
        roles.create_task(pipeline.roll_out(another()))
        roles.create_task(pipeline.score_shards(another()))
        for stop_after in (1, 4):  # before the first checkpoint, and between two
            learner = asyncio.create_task(pipeline.train_steps(another()))
            while run.log.find_step(stop_after) is None:
                assert not learner.done()
                await asyncio.sleep(0.002)
            learner.cancel()
            await asyncio.wait([learner])
        await pipeline.train_steps(another())
    assert len(run.log.rewinds()) == 2
    check_arrival_run(run)


async def test_of_two_learners_the_first_to_record_an_arrival_decides(tmp_path: Path) -> None:
    run = pipeline.new_run(arrival_config(tmp_path, "train"))
    mine, theirs = (Arrival(0, shard, 0) for shard in (IndexRange(0, 4), IndexRange(4, 8)))
    assert run.log.record_arrival(mine)
    assert not open_stored_run(str(tmp_path), run.log.run_id).log.record_arrival(theirs)
    assert run.log.arrivals() == [mine]


async def test_generation_stops_when_every_step_has_its_trajectories(tmp_path: Path) -> None:
    run = pipeline.new_run(arrival_config(tmp_path, "train"))
    await pipeline.run_all(run)
    plan = run.config.plan
    assert num_taken(run.log.arrivals()) == plan.num_indices
    assert len(run.log.trajectory_shards()) == plan.num_shards


async def test_an_index_order_run_has_a_ledger_of_nothing_but_trained_indices(tmp_path: Path) -> None:
    run = pipeline.new_run(pipeline.small_config(tmp_path, evaluate__every=0))
    await pipeline.run_all(run)
    ledger = ledger_of(run.log)
    assert ledger.violations() == []
    assert ledger.counts() == {
        "claimed": 0,
        "produced": 0,
        "scored": 0,
        "trained": run.config.plan.num_indices,
        "dropped": 0,
        "held": 0,
    }
    # A shard without its manifest is a shard that was never produced.
    shard = run.log.trajectory_shards()[0]
    run.log.store.delete(run.log.layout.shard_manifest(run.log.layout.trajectories, shard))
    broken = ledger_of(run.log)
    assert {violation.index for violation in broken.violations()} == set(shard.indices)
    assert broken.counts()["claimed"] == len(shard)


async def test_a_run_in_progress_never_looks_broken(tmp_path: Path) -> None:
    run = pipeline.new_run(arrival_config(tmp_path, "drop", learner__num_steps=8))
    running = asyncio.create_task(pipeline.run_all(run))
    looks = 0
    while not running.done():
        log = open_stored_run(str(tmp_path), run.log.run_id).log
        assert (await asyncio.to_thread(ledger_of, log)).violations() == []
        looks += 1
    await running
    assert looks > 3


async def test_step_records_of_both_orders_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = pipeline.new_run(arrival_config(tmp_path, "hold"))
    await pipeline.run_all(run)
    step = run.log.steps()[0]
    assert isinstance(step.indices, IndexSet)
    key = run.log.layout.step(0, 0)
    fields = json.loads(run.log.store.get(key))
    assert fields["index_list"] == list(step.indices.indices)
    assert fields["indices"] == [min(step.indices.indices), max(step.indices.indices) + 1]
    assert any(event.move is None and event.held for event in events_of(RunView(run.log)))


async def test_without_in_flight_updates_every_response_has_one_version(tmp_path: Path) -> None:
    config = pipeline.small_config(
        tmp_path, staleness__in_flight_updates=False, evaluate__every=0, learner__num_steps=8
    )
    run = pipeline.new_run(config)
    await pipeline.run_all(run)
    trajectories = [t for shard in config.plan.shards() for t in run.log.read_trajectories(shard)]
    assert {len(t.version_runs) for t in trajectories} == {1}
    assert len({t.version_first for t in trajectories}) > 1
    assert ledger_of(run.log).violations() == []


async def test_samplers_turn_synchronous_while_the_drift_is_too_large(tmp_path: Path) -> None:
    # Rounding alone is more drift than 1e-30 nats, so after the first record τ is 0 for good.
    config = pipeline.small_config(
        tmp_path, staleness__max_drift=1e-30, staleness__max_staleness=2, learner__num_steps=9, evaluate__every=0
    )
    run = pipeline.new_run(config)
    await pipeline.run_all(run)
    steps = run.log.steps()
    assert steps[0].metrics["train/drift_nats"] > 1e-30
    # Version 2 at the latest knows a record; under it at most step 4 may already have been started.
    assert [max(step.staleness_tokens) for step in steps[5:]] == [0] * 4
