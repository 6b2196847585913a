"""The capacity planner: the run's own rule, work that is conserved, and times that arithmetic gives too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pipeline as stages
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import Durations, simulate
from storage_builders import make_step, make_trajectory, memory_log

import asyncopd.schedule
from asyncopd.cli import main
from asyncopd.cli.plan import costs_of_run
from asyncopd.config import RunConfig, load_config
from asyncopd.errors import ConfigError, DeadlineError
from asyncopd.plan.forecast import best_split, calibrate, forecast, wall_s
from asyncopd.plan.pipeline import Outcome, run
from asyncopd.plan.workload import Costs, DecodeCurve, Fleet, Lognormal, Observed, Workload, splits
from asyncopd.schedule import Plan
from asyncopd.types import Span
from storage.run_log import StoredRunLog
from storage.run_view import RunView

CONFIGS = Path(__file__).parent.parent / "configs"
CURVE = DecodeCurve((1, 8, 64), (0.004, 0.006, 0.02))
COSTS = Costs(
    CURVE,
    score_tokens_per_s=3000,
    train_tokens_per_s=1500,
    train_step_s=0.1,
    score_shard_s=0.02,
    publish_s=0.05,
    fetch_s=0.03,
    refresh_s=0.02,
    prefill_token_s=1e-4,
    shard_s=0.01,
    handover_s=0.04,
)

plans = st.builds(
    lambda steps, per_step, size, bound: Plan(steps, per_step * size, size, bound),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 5),
)
fleets = st.builds(Fleet, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


def heavy_tailed(plan: Plan, seed: int) -> list[int]:
    drawn = np.random.default_rng(seed).pareto(1.1, plan.num_indices)
    return [int(length) for length in np.clip(3 + 5 * drawn, 1, 900)]


# -- the rule and the books ---------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(plans, fleets, st.integers(0, 10**6), st.integers(1, 12))
def test_every_token_is_sampled_and_trained_once_within_the_staleness_bound(
    plan: Plan, fleet: Fleet, seed: int, num_slots: int
) -> None:
    lengths = heavy_tailed(plan, seed)
    out = run(plan, lengths, COSTS, fleet, num_slots=num_slots)  # raises when it deadlocks
    assert out.num_tokens == sum(lengths) == sum(out.engine_tokens)
    assert 0 <= min(out.staleness_tokens) <= max(out.staleness_tokens) <= plan.max_staleness
    assert len(out.trained_at) == plan.num_steps
    assert list(out.trained_at) == sorted(out.trained_at)
    # Nobody is busy for longer than there was time, and the learner's work is known exactly.
    assert out.rollout_busy_s <= out.wall_s * fleet.rollout + 1e-6
    assert out.teacher_busy_s <= out.wall_s * fleet.teacher + 1e-6
    learning = sum(lengths) / (COSTS.train_tokens_per_s * fleet.learner) + plan.num_steps * 0.15
    assert out.learner_busy_s == pytest.approx(learning)


def test_admission_is_the_runs_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(num_steps=6, batch_size=8, shard_size=4, max_staleness=3)
    lengths = heavy_tailed(plan, 0)

    def outcome() -> Outcome:
        return run(plan, lengths, COSTS, Fleet(2, 1, 1), num_slots=8)

    asynchronous = outcome()
    own = asyncopd.schedule.may_start
    monkeypatch.setattr(
        asyncopd.schedule,
        "may_start",
        lambda index, version, **rule: own(index, version, **{**rule, "max_staleness": 0}),
    )
    synchronous = outcome()
    assert set(synchronous.staleness_tokens) == {0}
    assert asynchronous.wall_s < synchronous.wall_s
    monkeypatch.setattr(asyncopd.schedule, "may_start", lambda index, version, **rule: False)
    with pytest.raises(DeadlineError, match="nothing can go on after 0 of 6 steps"):
        outcome()


# -- times that arithmetic gives too ------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 60), st.integers(1, 3), st.integers(1, 4)
)
def test_the_synchronous_loop_takes_the_sum_of_its_stages(
    num_steps: int, per_step: int, size: int, length: int, num_teachers: int, num_learners: int
) -> None:
    plan = Plan(num_steps, per_step * size, size, max_staleness=0)
    out = run(plan, [length] * plan.num_indices, COSTS, Fleet(1, num_teachers, num_learners), num_slots=plan.batch_size)
    decoding = length * CURVE.table(plan.batch_size)[plan.batch_size]
    scoring = math.ceil(per_step / num_teachers) * (0.02 + size * length / 3000)
    training = 0.1 + plan.batch_size * length / (1500 * num_learners) + 0.05
    step = decoding + per_step * 0.01 + 0.04 + scoring + training
    # Between steps an engine fetches and loads the version; nothing is in flight, so no cache is rebuilt.
    expected = [number * (step + 0.03 + 0.02) + step for number in range(num_steps)]
    assert out.trained_at == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(0, 10**6))
def test_one_engine_with_room_for_everything_agrees_with_the_schedule_simulation(plan: Plan, seed: int) -> None:
    # All different: of shards that end at one instant the two simulations would score another one first.
    lengths = [length * plan.num_indices + index for index, length in enumerate(heavy_tailed(plan, seed))]
    step_s, score_rate, train_rate = 0.01, 400.0, 300.0
    costs = Costs(DecodeCurve((1,), (step_s,)), score_rate, train_rate)
    num_slots = plan.num_indices
    proved = simulate(
        plan,
        Durations(
            sample_s=lambda index: lengths[index] * step_s,
            score_s=lambda shard: sum(lengths[i] for i in shard.indices) / score_rate,
            train_s=lambda step: sum(lengths[i] for i in plan.step(step).indices) / train_rate,
        ),
        num_slots=num_slots,
    )
    assert run(plan, lengths, costs, Fleet(1, 1, 1), num_slots=num_slots).trained_at == pytest.approx(proved.trained_at)


@settings(max_examples=150, deadline=None)
@given(plans, fleets, st.integers(1, 80), st.integers(1, 12), st.sampled_from(("rollout", "teacher", "learner")))
def test_more_gpus_are_never_slower_when_all_responses_are_alike(
    plan: Plan, fleet: Fleet, length: int, num_slots: int, role: str
) -> None:
    more = Fleet(**{name: getattr(fleet, name) + (name == role) for name in ("rollout", "teacher", "learner")})
    # Two anomalies are kept out, as real as Graham's: a faster engine may hand a later shard to the only teacher first,
    # and one that is caught by a refresh in the middle of a response pays for having started early.
    costs = Costs(CURVE, 3000 if role == "teacher" else 1e12, 1500, train_step_s=0.1)
    lengths = [length] * plan.num_indices
    before, after = (run(plan, lengths, costs, each, num_slots=num_slots).wall_s for each in (fleet, more))
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_planned_within_its_own_bound(path: Path) -> None:
    config = load_config(path)
    lengths = Lognormal(20, 60, 200)
    work = Workload(lengths, config.learner.batch_size, config.rollout.shard_size, 4, num_slots=config.rollout.slots)
    planned = forecast(work, COSTS, Fleet(2, 1, 1), config.staleness.max_staleness)
    tokens = int(lengths.draw(4 * config.learner.batch_size, work.seed).sum())
    assert sum(planned.staleness_tokens.values()) == tokens
    assert max(planned.staleness_tokens) <= config.staleness.max_staleness


def test_processes_that_share_a_machine_slow_each_other_down() -> None:
    plan = Plan(num_steps=6, batch_size=8, shard_size=4, max_staleness=2)
    lengths = [20] * plan.num_indices
    alone = run(plan, lengths, COSTS, Fleet(1, 1, 1), num_slots=16)
    halved = Costs(**{**vars(COSTS), "speeds": (1.0, 0.5)})
    shared = run(plan, lengths, halved, Fleet(1, 1, 1), num_slots=16)
    assert alone.wall_s < shared.wall_s
    synchronous = Plan(num_steps=6, batch_size=8, shard_size=8, max_staleness=0)
    walls = [run(synchronous, lengths, costs, Fleet(1, 1, 1), num_slots=16).wall_s for costs in (COSTS, halved)]
    assert walls[0] == pytest.approx(walls[1]), "who takes turns never meets another"


# -- forecasts ----------------------------------------------------------------------------------------------------
WORK = Workload(Lognormal(60, 400, 500), batch_size=32, shard_size=8, num_steps=12, num_slots=16)


def test_the_best_split_is_the_best_of_all() -> None:
    found = best_split(WORK, COSTS, 6, 2)
    every = {fleet: forecast(WORK, COSTS, fleet, 2).tokens_per_s for fleet in splits(6)}
    assert len(every) == 10
    assert all(fleet.num_gpus == 6 for fleet in every)
    assert every[found.fleet] == found.tokens_per_s == max(every.values())


def test_time_shared_gpus_take_turns() -> None:
    shared = Fleet(4, 1, 4, time_shared=True)
    assert shared.num_gpus == 5
    alternating = forecast(WORK, COSTS, shared, 0)
    switching = forecast(WORK, Costs(**{**vars(COSTS), "switch_s": 1.5}), shared, 0)
    assert switching.wall_s == pytest.approx(alternating.wall_s + 12 * 2 * 1.5)
    with pytest.raises(ConfigError, match="time-shared GPUs are synchronous"):
        forecast(WORK, COSTS, shared, 1)


def test_lognormal_lengths_have_the_mean_and_percentile_they_were_asked_for() -> None:
    law = Lognormal.parse("lognormal:mean=3000,p99=15000,max=16384")
    drawn = law.draw(400_000, seed=1)
    assert drawn.mean() == pytest.approx(3000, rel=0.01)
    assert np.percentile(drawn, 99) == pytest.approx(15_000, rel=0.02)
    assert drawn.max() == 16_384
    assert drawn.min() >= 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lognormal:mean=3000,p99=2000,max=16384", "need 1 <= mean < p99 <= max"),
        ("lognormal:mean=5,p99=16000,max=16384", "the lowest is"),
        ("lognormal:mean=3000,max=16384", "cannot be read"),
        ("lognormal:mean=3000,p99=9000,max=16384,shape=2", r"unknown \['shape'\]"),
    ],
)
def test_impossible_lengths_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Lognormal.parse(text)


def test_observed_lengths_are_repeated_in_their_order() -> None:
    assert Observed((3, 5, 8), "walk-1").draw(7, seed=4).tolist() == [3, 5, 8, 3, 5, 8, 3]


# -- a logged run -------------------------------------------------------------------------------------------------
def logged_run(config: RunConfig, costs: Costs) -> StoredRunLog:
    """A synchronous run with the timeline that `costs` would have left; all responses of a step are equally long."""
    log, now, size = memory_log(), 1000.0, config.learner.batch_size
    spans: list[Span] = []

    def work(role: str, activity: str, seconds: float) -> None:
        nonlocal now
        spans.append(Span(role, f"{role}-1", activity, now, now + seconds))
        now += seconds

    for step in range(config.learner.num_steps):
        length = 5 + 3 * step % 17
        if step:
            work("rollout", "orchestrate:refresh", costs.refresh_s)
        shard = config.plan.step(step)
        made = [make_trajectory(index, num_tokens=length) for index in shard.indices]
        log.publish_trajectories(shard, made, worker="rollout-1")
        work("rollout", "sample", length * costs.decode.table(size)[size])
        work("rollout", "orchestrate:parquet", costs.shard_s)
        now += costs.handover_s / 2
        work("score", "score", size * length / costs.score_tokens_per_s)
        work("score", "orchestrate:parquet", costs.score_shard_s)
        now += costs.handover_s / 2
        seconds = costs.train_step_s + size * length / costs.train_tokens_per_s
        work("learn", "train", seconds)
        trained = make_step(step, metrics={"train/seconds": seconds})
        log.publish_step(replace(trained, num_tokens=size * length))
        if step < config.learner.num_steps - 1:
            work("learn", "orchestrate:publish", costs.publish_s)
    log.publish_spans("all-1", 1, spans)
    return log


def test_costs_are_read_back_from_the_timeline_they_left(tmp_path: Path) -> None:
    config = stages.small_config(
        tmp_path, staleness__max_staleness=0, learner__num_steps=40, learner__batch_size=8, rollout__shard_size=8
    )
    true = replace(COSTS, decode=DecodeCurve((1, 8), (0.02, 0.03)), fetch_s=0.0, prefill_token_s=0.0)
    log = logged_run(config, true)
    work, read = costs_of_run(log, config, DecodeCurve((1, 8), (1.0, 1.5)))
    assert list(work.lengths.draw(24, 0)) == [5] * 8 + [8] * 8 + [11] * 8
    assert read.decode.step_s == pytest.approx(true.decode.step_s, rel=0.01)
    for name in ("score_tokens_per_s", "train_tokens_per_s", "train_step_s", "score_shard_s", "shard_s"):
        assert getattr(read, name) == pytest.approx(getattr(true, name), rel=0.01), name
    # The run ends with the last step, before its publication and without another refresh: one in forty is missing.
    for name in ("publish_s", "refresh_s", "handover_s"):
        assert getattr(read, name) == pytest.approx(getattr(true, name), rel=0.05), name
    assert forecast(work, read, Fleet(1, 1, 1), 0).wall_s == pytest.approx(
        wall_s(RunView(log).read("spans").spans()), rel=0.01
    )
    with pytest.raises(ConfigError, match="read where nothing overlaps"):
        calibrate("r", stages.small_config(tmp_path, staleness__max_staleness=1), CURVE, steps=[], spans=[], lengths=[])


# -- the command --------------------------------------------------------------------------------------------------
COMMAND = [
    "plan",
    "--lengths",
    "lognormal:mean=60,p99=400,max=500",
    "--decode",
    "1:0.004,64:0.02",
    "--score-tokens-per-s",
    "3000",
    "--train-tokens-per-s",
    "1500",
    "--rollout-gpus",
    "2",
    "--learner-gpus",
    "2",
    "--batch-size",
    "16",
    "--shard-size",
    "8",
    "--steps",
    "6",
    "--tau",
    "0",
    "2",
]


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, "--json", str(tmp_path / "plan.json")])
    assert ended.value.code == 0
    record = json.loads((tmp_path / "plan.json").read_text())
    assert [row["max_staleness"] for row in record["fleet"]] == [0, 2]
    assert record["time_shared"]["fleet"] == {"rollout": 4, "teacher": 1, "learner": 4, "time_shared": True}
    assert all(
        sum(row["fleet"][role] for role in ("rollout", "teacher", "learner")) == 5 for row in record["best_splits"]
    )
    shown = capsys.readouterr().out
    assert f"{record['fleet'][1]['tokens_per_s']:,.0f}" in shown
    assert "Taken as free" in shown


@pytest.mark.parametrize("missing", [["--lengths"], ["--decode"], ["--lengths", "--decode", "--train-tokens-per-s"]])
def test_the_command_says_everything_that_is_missing(missing: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = list(COMMAND)
    for option in missing:
        at = command.index(option)
        del command[at : at + 2]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(option in said.partition("All but")[0] for option in missing)
    assert "--score-tokens-per-s" not in said
