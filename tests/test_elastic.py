"""Workers join and leave a running run as processes that meet in storage alone; kills cost at most their leases."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
from chaos.runs import replayed_weights
from patience import stretched
from role_processes import paced_run, roles_of, until

from storage.run_log import StoredRunLog

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def test_samplers_that_join_and_are_killed_never_hold_the_learner_up_longer_than_a_lease_and_a_shard(
    tmp_path: Path,
) -> None:
    run = paced_run(tmp_path, learner__num_steps=50, staleness__max_staleness=1)
    log = run.log
    with roles_of(run, tmp_path / "logs") as roles:
        learner, _, first = (roles.start(role) for role in ("learn", "score", "rollout"))
        second, third = roles.start("rollout"), roles.start("rollout")
        until(lambda: len(log.steps()) >= 3, 90, "the first sampler's trajectories to be trained")

        def samplers() -> set[str]:
            return {log.find_trajectories(shard).worker for shard in log.trajectory_shards()}

        names = [until(lambda p=p: roles.name(p), 60, "a sampler to join") for p in (first, second, third)]
        until(lambda: samplers() == set(names), 60, "all three to sample")
        num_before = len(log.steps())
        for process in (first, third):
            process.kill()
            process.wait()
        assert learner.wait(timeout=stretched(120)) == 0
        assert second.wait(timeout=stretched(20)) == 0
    steps = log.steps()
    assert [index for step in steps for index in step.indices.indices] == list(range(8 * 50))
    assert num_before < 45, "the samplers were killed when hardly anything was left to do"
    shard_s = max(log.find_trajectories(shard).facts.seconds for shard in log.trajectory_shards())
    pauses = [after.finished - before.finished for before, after in itertools.pairwise(steps)]
    # The second is for polls of 0.1 s along three roles, on a machine that others use too.
    assert max(pauses[num_before - 1 :]) < run.config.limits.lease_s + shard_s + 1.0


def test_a_stopped_run_ends_the_workers_that_joined_it_and_takes_no_more(tmp_path: Path) -> None:
    run = paced_run(tmp_path)
    run.log.record_state("running", by="flow-1")
    with roles_of(run, tmp_path / "logs") as roles:
        waiting = roles.start("rollout")
        name = until(lambda: roles.name(waiting), 60, "the sampler to join")
        run.log.record_state("stopped", by="flow-1", reason="cancelled")
        assert waiting.wait(timeout=stretched(5)) == 143
        assert run.log.heartbeats()[name].retired
        assert "run small-1 is stopped (cancelled)" in roles.output(waiting)
        assert not run.log.failures(), "being stopped is no failure"
        late = roles.start("score")
        late.wait(timeout=stretched(60))
        assert "Go on with it first: asyncopd train --run-id small-1" in roles.output(late)


def test_a_learner_that_slept_through_its_replacement_cannot_publish_any_more(tmp_path: Path) -> None:
    run = paced_run(tmp_path, learner__num_steps=30, staleness__max_staleness=0)
    log = run.log
    with roles_of(run, tmp_path / "logs") as roles:
        asleep = roles.start("learn")
        until(lambda: roles.name(asleep), 60, "the first learner to join")
        # Nothing trains before it waits behind the first: a process takes longer to import torch than 30 steps take.
        standby = roles.start("learn")
        until(lambda: roles.name(standby), 60, "the second learner to join")
        roles.start("score")
        roles.start("rollout")
        until(lambda: len(log.steps()) >= 10, 90, "ten steps")
        assert log.current_rewind() == 0, "it waits for the first"
        asleep.send_signal(signal.SIGSTOP)
        until(lambda: log.current_rewind() == 1, 20, "the second learner to take over after a lease")
        before = {step.step: step for step in log.steps()}
        until(lambda: len(log.steps()) > 10, 30, "it to train")
        asleep.send_signal(signal.SIGCONT)
        assert asleep.wait(timeout=stretched(20)) == 1
        assert standby.wait(timeout=stretched(90)) == 0
    assert "SupersededError: " in roles.output(asleep)
    steps = log.steps()
    assert [step.step for step in steps] == list(range(30))
    assert all(step.rewind in (0, 1) for step in steps)
    went_back_to = log.rewinds()[0].to_step
    assert {step.rewind for step in steps[went_back_to:]} == {1}
    assert before.keys() <= set(range(30))
    assert_weights_are_those_of_a_fresh_learner(log, tmp_path)


def assert_weights_are_those_of_a_fresh_learner(log: StoredRunLog, tmp_path: Path) -> None:
    """Train the same log again in one process without interruption: on one thread the weights agree bit for bit."""
    last = log.latest_policy()
    assert last is not None
    assert replayed_weights(log.store.url, log.run_id, str(tmp_path / "replay")) == log.read_policy(last).safetensors
