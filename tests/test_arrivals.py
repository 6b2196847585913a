"""Order `arrival`: who gets which position, what is too stale, and that no schedule of it stands still."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import Durations, Simulation, simulate

from asyncopd.schedule import (
    Arrival,
    OnStale,
    OpenShards,
    Plan,
    Seen,
    arrivals_of_step,
    judge,
    num_taken,
    staleness_in_force,
)
from asyncopd.types import IndexRange

RULES: tuple[OnStale, ...] = ("drop", "hold", "train")


def plan_of(on_stale: OnStale = "drop", **changes: int) -> Plan:
    """B = 4 in shards of 2, τ = 1, 3 steps."""
    fields = {"num_steps": 3, "batch_size": 4, "shard_size": 2, "max_staleness": 1, **changes}
    return Plan(**fields, order="arrival", on_stale=on_stale)


def arrivals_of(plan: Plan, *shards: tuple[int, tuple[int, ...]]) -> list[Arrival]:
    """Arrivals of (shard number, versions of its indices), in the given order."""
    arrivals: list[Arrival] = []
    for number, versions in shards:
        shard = plan.shard(number)
        by_index = dict(zip(shard.indices, versions, strict=True))
        arrivals.append(judge(plan, shard, earlier=arrivals, oldest_version=by_index, dropped={}))
    return arrivals


# -- positions ----------------------------------------------------------------------------------------------------
def test_positions_follow_the_arrivals_not_the_indices() -> None:
    arrivals = arrivals_of(plan_of(), (3, (0, 0)), (0, (0, 0)), (1, (0, 0)))
    assert [arrival.taken for arrival in arrivals] == [(6, 7), (0, 1), (2, 3)]
    assert [arrival.num_taken_before for arrival in arrivals] == [0, 2, 4]
    assert [arrival.shard.start for arrival in arrivals_of_step(arrivals, 0, 4)] == [6, 0]
    assert dict(arrivals[2].steps(4)) == {2: 1, 3: 1}


@pytest.mark.parametrize(("rule", "taken"), [("drop", 2), ("hold", 2), ("train", 4)])
def test_staleness_beyond_the_bound_is_dropped_held_or_trained(rule: OnStale, taken: int) -> None:
    # τ = 1: the step of positions 8 to 11 is step 2, for which version 0 is too old and version 1 is not.
    arrivals = arrivals_of(plan_of(rule), *((n, (0, 0)) for n in range(4)), (4, (0, 1)), (5, (1, 0)))
    assert num_taken(arrivals) == 8 + taken
    assert arrivals[4].dropped == ({8: "stale"} if rule == "drop" else {})
    assert arrivals[5].held == ({11: "stale"} if rule == "hold" else {})


def test_a_row_is_judged_by_the_step_it_would_go_to_not_by_its_shards_first() -> None:
    # Three taken; the shard's first index still fits step 1 under version 0, its second is of step 2 and too stale.
    arrivals = arrivals_of(plan_of(), (0, (0, 0)), (1, (0, 0)), (2, (0, 0)), (3, (0, 0)))
    odd = [*arrivals[:3], Arrival(3, IndexRange(6, 8), 6, dropped={6: "too long"})]
    last = judge(plan_of(), IndexRange(8, 10), earlier=odd, oldest_version={8: 0, 9: 0}, dropped={})
    assert (last.taken, last.dropped) == ((8,), {9: "stale"})
    assert dict(last.steps(4)) == {8: 1, 9: 2}


def test_an_arrival_that_gives_nothing_belongs_to_the_step_that_waited_for_it() -> None:
    plan = plan_of(max_staleness=0)
    arrivals = arrivals_of(plan, (0, (0, 0)), (1, (0, 0)), (2, (0, 0)), (3, (1, 1)), (4, (1, 1)))
    assert arrivals[2].dropped == {4: "stale", 5: "stale"}
    assert [a.number for a in arrivals_of_step(arrivals, 0, 4)] == [0, 1]
    assert [a.number for a in arrivals_of_step(arrivals, 1, 4)] == [2, 3, 4]


def test_shards_have_no_end_in_arrival_order_and_one_in_index_order() -> None:
    endless = OpenShards(plan_of())
    assert endless.window(20)[-1] == IndexRange(38, 40)
    endless.remove(IndexRange(2, 4))
    assert [shard.start for shard in endless.window(3)] == [0, 4, 6]
    finite = OpenShards(Plan(1, 4, 2, 0))
    for shard in list(finite):
        finite.remove(shard)
    assert finite.first is None


# -- admission ----------------------------------------------------------------------------------------------------
def test_samplers_run_a_bounded_way_ahead_of_the_learner() -> None:
    plan = plan_of("train", max_ahead=1)  # two shards
    assert plan.admits(plan.shard(1), Seen(version=0))
    assert not plan.admits(plan.shard(2), Seen(version=0))
    assert plan.admits(plan.shard(2), Seen(version=0, num_arrivals=1, num_taken=2))


def test_no_more_is_started_than_the_last_steps_still_lack() -> None:
    plan = plan_of("drop", num_steps=2)
    seen = Seen(version=1, num_arrivals=5, num_taken=7)  # one trajectory is missing, so one shard
    assert plan.admits(plan.shard(5), seen)
    assert not plan.admits(plan.shard(6), seen)
    assert plan.is_complete(Seen(version=1, num_arrivals=6, num_taken=8))


def test_what_would_be_too_stale_at_once_waits_for_a_version() -> None:
    seen = Seen(version=0, num_arrivals=4, num_taken=8)  # the next position belongs to step 2
    assert "version 1" in str(plan_of("drop").waits_for(IndexRange(8, 10), seen))
    assert plan_of("train").admits(IndexRange(8, 10), seen)


# -- drift --------------------------------------------------------------------------------------------------------
def test_staleness_in_force_is_none_while_the_drift_exceeds_its_bound() -> None:
    assert staleness_in_force(4, drift_nats=0.02, max_drift=0.01) == 0
    assert staleness_in_force(4, drift_nats=0.01, max_drift=0.01) == 4
    assert staleness_in_force(4, drift_nats=9.0, max_drift=None) == 4


def test_under_drift_only_what_the_next_version_needs_may_start() -> None:
    # B = 4, τ = 2, version 3 is out: step 3 makes the next version, steps 4 and 5 may wait for it.
    plan = Plan(num_steps=9, batch_size=4, shard_size=4, max_staleness=2, max_drift=0.01)
    calm, drifting = Seen(version=3, drift_nats=0.001), Seen(version=3, drift_nats=0.5)
    assert [plan.admits(plan.step(step), calm) for step in (3, 4, 5, 6)] == [True, True, True, False]
    assert [plan.admits(plan.step(step), drifting) for step in (3, 4, 5, 6)] == [True, False, False, False]
    assert plan.waits_for(plan.step(4), drifting) == "version 4 (step 3 to be trained, and the drift is 0.5 nats)"


@pytest.mark.parametrize("rule", RULES)
def test_under_drift_arrival_order_too_starts_what_the_next_version_lacks(rule: OnStale) -> None:
    fields = {"num_steps": 9, "batch_size": 4, "shard_size": 2, "max_staleness": 2, "max_drift": 0.01}
    plan = Plan(**fields, order="arrival", on_stale=rule)
    seen = Seen(version=3, drift_nats=0.5, num_arrivals=8, num_taken=14)  # step 3 lacks two
    assert plan.admits(plan.shard(8), seen)
    assert not plan.admits(plan.shard(9), seen)
    full = Seen(version=3, drift_nats=0.5, num_arrivals=9, num_taken=16)
    assert plan.waits_for(plan.shard(9), full) == "version 4 (step 3 to be trained, and the drift is 0.5 nats)"


# -- whole runs, on a simulated clock -----------------------------------------------------------------------------
arrival_plans = st.builds(
    lambda steps, per_step, size, bound, rule, ahead, drift: Plan(
        steps, per_step * size, size, bound, "arrival", rule, ahead, drift
    ),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from(RULES),
    st.integers(1, 5),
    st.sampled_from([None, 0.5]),
)


def random_durations(seed: int) -> Durations:
    def drawn(kind: str, number: int) -> float:
        # Heavy-tailed, like response lengths: some take a hundred times the median.
        return random.Random(f"{seed}/{kind}/{number}").paretovariate(1.1)

    return Durations(
        sample_s=lambda index: drawn("sample", index),
        score_s=lambda shard: drawn("score", shard.start),
        train_s=lambda step: drawn("train", step),
        drift_nats=lambda step: random.Random(f"{seed}/drift/{step}").random(),
    )


def check(plan: Plan, result: Simulation) -> None:
    assert len(result.trained_at) == plan.num_steps
    positions = [index for arrival in result.arrivals for index in arrival.taken]
    decided = [index for arrival in result.arrivals for index in arrival.shard.indices]
    assert len(decided) == len(set(decided))
    lost = [index for arrival in result.arrivals for index in (*arrival.dropped, *arrival.held)]
    assert sorted(positions + lost) == sorted(decided)
    for position, index in enumerate(positions[: plan.num_indices]):
        staleness = position // plan.batch_size - result.started_under[index]
        assert staleness >= 0
        assert plan.on_stale == "train" or staleness <= plan.max_staleness
    for step in range(plan.num_steps):
        judged = [
            i
            for a in arrivals_of_step(result.arrivals, step, plan.batch_size)
            for i, s in a.steps(plan.batch_size)
            if s == step
        ]
        assert len([i for i in judged if i not in lost]) == plan.batch_size
    assert result.most_ahead <= plan.max_ahead * plan.shards_per_step
    assert len(result.started_under) == len(decided)  # the learner comes to everything that was started
    assert plan.num_indices <= len(positions) < plan.num_indices + plan.shard_size
    if plan.on_stale == "train":
        assert lost == []
        assert len(result.started_under) == plan.num_indices


@settings(max_examples=400, deadline=None)
@given(arrival_plans, st.integers(0, 10**6), st.integers(1, 20))
def test_every_run_of_arrival_order_ends_with_full_steps_whatever_the_durations(
    plan: Plan, seed: int, num_slots: int
) -> None:
    check(plan, simulate(plan, random_durations(seed), num_slots=num_slots))  # raises when it deadlocks


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(0, 10**6))
def test_no_drift_whatever_it_is_stops_a_run_in_index_order(
    steps: int, per_step: int, size: int, bound: int, seed: int
) -> None:
    plan = Plan(steps, per_step * size, size, bound, max_drift=0.5)
    result = simulate(plan, random_durations(seed), num_slots=3)
    assert len(result.trained_at) == steps
    assert all(0 <= i // plan.batch_size - v <= bound for i, v in enumerate(result.started_under))


def test_unbounded_drift_is_the_synchronous_schedule() -> None:
    wild = Durations(lambda index: 1.0 + index % 3, lambda shard: 0.1, lambda step: 1.0, lambda step: 99.0)
    drifting = simulate(Plan(6, 4, 2, 3, max_drift=0.1), wild, num_slots=4)
    # Before the first step nothing is measured, so the first versions may still be old.
    assert max(i // 4 - v for i, v in enumerate(drifting.started_under) if i >= 16) == 0
