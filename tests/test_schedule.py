"""The scheduling rule, alone and under a simulated clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import Durations, simulate

from asyncopd.errors import ConfigError
from asyncopd.schedule import Plan, may_start, required_version, step_of
from asyncopd.types import IndexRange


def test_trajectory_waits_for_the_version_its_index_needs() -> None:
    # B=4, τ=1: index 9 belongs to step 2 and may not start before version 1.
    assert not may_start(9, 0, batch_size=4, max_staleness=1)
    assert may_start(9, 1, batch_size=4, max_staleness=1)


def test_synchronous_run_waits_for_every_version() -> None:
    assert [required_version(i, batch_size=2, max_staleness=0) for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_first_steps_never_wait_for_a_negative_version() -> None:
    assert required_version(5, batch_size=2, max_staleness=10) == 0


@given(st.integers(0, 10_000), st.integers(1, 64), st.integers(0, 16))
def test_consumption_version_minus_required_version_is_at_most_the_bound(index: int, batch: int, bound: int) -> None:
    assert 0 <= step_of(index, batch) - required_version(index, batch_size=batch, max_staleness=bound) <= bound


def test_a_shard_that_would_straddle_two_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="must divide"):
        Plan(num_steps=2, batch_size=6, shard_size=4, max_staleness=0)


def test_shards_cover_every_index_once_and_know_their_names() -> None:
    plan = Plan(num_steps=3, batch_size=4, shard_size=2, max_staleness=1)
    assert [i for shard in plan.shards() for i in shard.indices] == list(range(12))
    assert plan.shards_of_step(1) == [IndexRange(4, 6), IndexRange(6, 8)]
    assert IndexRange.parse(IndexRange(128, 192).name) == IndexRange(128, 192)
    assert list(plan.shards(first_step=2)) == plan.shards_of_step(2)


plans = st.builds(
    lambda steps, per_step, size, bound: Plan(steps, per_step * size, size, bound),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 6),
)


def random_durations(seed: int) -> Durations:
    def drawn(kind: str, number: int) -> float:
        # Heavy-tailed, like response lengths: some take a hundred times the median.
        return random.Random(f"{seed}/{kind}/{number}").paretovariate(1.1)

    return Durations(
        sample_s=lambda index: drawn("sample", index),
        score_s=lambda shard: drawn("score", shard.start),
        train_s=lambda step: drawn("train", step),
    )


@settings(max_examples=200, deadline=None)
@given(plans, st.integers(0, 10**6), st.integers(1, 20))
def test_staleness_is_bounded_and_nothing_deadlocks_whatever_the_durations(
    plan: Plan, seed: int, num_slots: int
) -> None:
    result = simulate(plan, random_durations(seed), num_slots=num_slots)  # raises when it deadlocks
    staleness = [step_of(i, plan.batch_size) - version for i, version in enumerate(result.started_under)]
    assert min(staleness) >= 0
    assert max(staleness) <= plan.max_staleness
    assert list(result.trained_at) == sorted(result.trained_at)
    assert len(result.trained_at) == plan.num_steps


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(0, 10**6))
def test_zero_staleness_is_the_synchronous_loop(plan: Plan, seed: int) -> None:
    plan = Plan(plan.num_steps, plan.batch_size, plan.shard_size, max_staleness=0)
    durations = random_durations(seed)
    result = simulate(plan, durations, num_slots=plan.batch_size)
    now = 0.0
    for step in range(plan.num_steps):  # sample all, score as shards finish, train; nothing else overlaps
        produced = sorted(
            (now + max(durations.sample_s(i) for i in shard.indices), shard) for shard in plan.shards_of_step(step)
        )
        scored = now
        for at, shard in produced:
            scored = max(scored, at) + durations.score_s(shard)
        now = scored + durations.train_s(step)
        assert result.trained_at[step] == pytest.approx(now)
    assert all(v == step_of(i, plan.batch_size) for i, v in enumerate(result.started_under))
