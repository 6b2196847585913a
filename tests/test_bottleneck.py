"""Which role holds the others up, and what `asyncopd status` says about a run that stands still."""

from __future__ import annotations

import time

import pytest
from storage_builders import make_step, memory_log
from synthetic_run import config_of

from asyncopd.cli.progress import ProgressWatch, bottleneck
from asyncopd.records import WorkerStatus
from asyncopd.worker import WINDOW_S, BusyShare, Pace
from storage.run_log import StoredRunLog
from storage.run_view import RunView


def test_the_role_that_never_waits_is_the_bottleneck() -> None:
    found = bottleneck({"rollout": [0.98, 0.94], "score": [0.2], "learn": [0.4]})
    assert found is not None
    assert found.startswith("rollout is the bottleneck: learn and score wait for it (busy: rollout 96%")


def test_roles_that_take_turns_have_no_bottleneck() -> None:
    found = bottleneck({"rollout": [0.4], "score": [0.1], "learn": [0.5]})
    assert found is not None
    assert found.startswith("no role is the bottleneck")


def test_roles_that_never_wait_share_a_machine_that_is_too_small() -> None:
    found = bottleneck({"rollout": [1.0], "score": [0.9], "learn": [0.8]})
    assert found is not None
    assert "the machine is the bottleneck" in found


def test_one_role_alone_says_nothing() -> None:
    assert bottleneck({"evaluate": [1.0], "learn": [0.2]}) is None


def test_busy_counts_overlapping_work_once_and_forgets_what_is_long_ago() -> None:
    now = 100.0

    def clock() -> float:
        return now

    share = BusyShare(clock)
    now = 101.0
    with share.working(), share.working():
        now = 103.0
    now = 104.0
    assert share.share() == pytest.approx(2 / 4)
    with share.working():
        now = 104.0 + WINDOW_S / 2
        assert share.share() == pytest.approx((2 + 5) / (4 + 5))
    now += WINDOW_S
    assert share.share() == 0.0


def paces(totals: dict[float, int], asked: list[float], *, is_working: bool = True) -> list[float | None]:
    """The rate at each moment of `asked`, of a total that grows at the moments of `totals`; asked each second too."""
    now, found = 0.0, {}
    pace = Pace(lambda: now)
    for tick in range(int(max(asked)) + 1):
        now = float(tick)
        total = max((total for when, total in totals.items() if when <= now), default=0)
        found[now] = pace.rate(total, is_working=is_working or now <= max(totals))
    return [found[when] for when in asked]


def test_a_steady_pace_is_that_of_the_last_five_seconds() -> None:
    steady = {float(s): 100 * min(s, 10) + 300 * max(0, s - 10) for s in range(21)}
    assert paces(steady, [0, 1, 20]) == [None, pytest.approx(100), pytest.approx(300)]


def test_the_pace_of_long_pieces_of_work_is_never_0_and_does_not_jump() -> None:
    # A shard of 600 tokens every 30 s was shown as 120 tokens/s for five seconds and as 0 for the other 25.
    assert paces({30.0: 600, 60.0: 1200, 90.0: 1800}, [29, 30, 45, 59, 60, 89, 90, 100]) == [None, *[20] * 7]


def test_the_pace_of_a_role_without_work_fades() -> None:
    assert paces({30.0: 600}, [30, 60, 120], is_working=False) == [20, 10, 5]


CONFIG = config_of(learner={"num_steps": 10, "batch_size": 8})


def status(log: StoredRunLog) -> ProgressWatch:
    return ProgressWatch(RunView(log), CONFIG)


def test_a_run_is_going_on_while_its_learner_beats() -> None:
    log = memory_log()
    for number in range(4):
        log.publish_step(make_step(number))
    log.heartbeat("learn-1", WorkerStatus(role="learn", busy=0.9))
    log.heartbeat("rollout-1", WorkerStatus(role="rollout", busy=0.1))
    progress = status(log).look()
    assert progress.eta_s == pytest.approx(6.0)
    assert progress.stopped is None
    assert progress.bottleneck is not None
    assert progress.bottleneck.startswith("learn is the bottleneck: rollout waits for it")


def test_a_stopped_run_shows_why_and_no_time_left() -> None:
    log = memory_log()
    for number in range(4):
        log.publish_step(make_step(number))
    log.record_state("running", by="f")
    log.heartbeat("learn-1", WorkerStatus(role="learn", busy=0.9))
    log.record_state("stopped", by="f", reason="cancelled")
    progress = status(log).look()
    assert progress.eta_s is None
    assert progress.stopped == progress.status == "cancelled"


def test_a_run_without_a_living_learner_stands_still() -> None:
    log = memory_log()
    for number in range(4):
        log.publish_step(make_step(number))
    log.heartbeat("learn-1", WorkerStatus(role="learn"))
    late = ProgressWatch(RunView(log), CONFIG, wall_clock=lambda: time.time() + 60).look()
    assert (late.eta_s, late.stopped, late.bottleneck) == (None, "no learner gives a sign of life", None)
