"""Chaos itself: real processes, real kills, the proof at the end; and that its observer can see a wrong."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from chaos.observer import Observer
from chaos.runs import chaos_config
from chaos.strikes import Disturbance, Strike, fill, plan_strikes
from chaos.verdict import Check, checks, costs
from role_processes import until
from storage_builders import make_scores, make_step, make_trajectories, memory_log

from asyncopd.local.processes import STACK_HOME
from asyncopd.types import IndexRange, PolicyVersion, PolicyWeights
from storage.manifests import quarantine
from storage.run_log import StoredRunLog

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parent.parent


@pytest.mark.chaos
def test_a_run_whose_roles_are_killed_loses_nothing() -> None:
    with start("--kills", "2", "--steps", "30", "--without-prefect", "--seed", "3") as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count("holds  ") == 10
    assert "final weights too, bit for bit" in output
    assert left_of(output) == []


@pytest.mark.chaos
@pytest.mark.slow
def test_a_run_whose_flow_worker_and_server_are_killed_too_loses_nothing() -> None:
    with start("--kills", "8", "--seed", "5") as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert left_of(output) == []


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_it_whatever_ends_it(number: signal.Signals) -> None:
    with start("--kills", "2", "--without-prefect") as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        until(lambda: len(processes_of(said)) >= 5, 90, "its roles to run")
        process.send_signal(number)
        process.wait(60)
    until(lambda: left_of(said) == [], 30, f"everything to be gone, not {left_of(said)}")


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "chaos", *arguments]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def folder_of(output: str) -> str:
    """The folder that chaos names in its first line."""
    return output.split("\n", 1)[0].removeprefix("chaos in ").strip()


def processes_of(output: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_its = process.environ().get(STACK_HOME) == f"{folder_of(output)}/home"
            if is_its and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_of(output: str) -> list[object]:
    """Its processes, its folder and its mounted disk, as far as they are still there."""
    folder = folder_of(output)
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if folder in line]
    return [*processes_of(output), *mounts, *([folder] if Path(folder).exists() else [])]


# -- the proof can fail ---------------------------------------------------------------------------------------------
def finished_run() -> tuple[StoredRunLog, Observer]:
    """Two steps of eight indices, observed from the start."""
    log = memory_log()
    observer = Observer(log, teacher="oracle")
    for start in range(0, 16, 4):
        shard = IndexRange(start, start + 4)
        trajectories = make_trajectories(shard)
        log.claim("rollout", shard, worker="w", lease_s=10)
        log.publish_trajectories(shard, trajectories, worker="w")
        log.publish_scores("oracle", shard, [make_scores(t) for t in trajectories], worker="w")
    for number in range(2):
        train(log, number, IndexRange(8 * number, 8 * number + 8))
    log.publish_policy(PolicyWeights(PolicyVersion(2), b"w2"), worker="w")
    observer.look()
    return log, observer


def train(log: StoredRunLog, number: int, indices: IndexRange) -> None:
    step = make_step(number)
    log.publish_step(type(step)(**{**vars(step), "indices": indices, "staleness_tokens": {0: 40}, "dropped": {}}))


def failing(observer: Observer, *, num_steps: int = 2, replayed: bytes = b"w2") -> list[Check]:
    config = chaos_config("memory://x", num_steps=num_steps, max_staleness=0)
    return [check for check in checks(observer, config, replayed=replayed, twin=None) if not check.holds]


def test_an_undisturbed_run_passes() -> None:
    assert failing(finished_run()[1]) == []


def test_other_weights_than_the_replay_are_found() -> None:
    (check,) = failing(finished_run()[1], replayed=b"w3")
    assert "uninterrupted replay" in check.claim


def test_a_lost_step_is_found() -> None:
    found = failing(finished_run()[1], num_steps=3)
    assert [check.claim.split()[0] for check in found] == ["every", "admitted"]
    assert "8 lost" in found[0].found


def test_a_shard_that_was_durable_and_is_gone_is_found_and_its_tokens_counted() -> None:
    log, observer = finished_run()
    num_tokens = observer.durable["rollout"][IndexRange(0, 4)].manifest.facts.num_tokens
    before = Disturbance(Strike("SIGKILL", "a"), struck=0.0, at_step=1, recovery_s=1.0, restarted=())
    after = Disturbance(Strike("SIGKILL", "b"), struck=time.time(), at_step=1, recovery_s=1.0, restarted=())
    quarantine(log.store, log.layout.shard_manifest(log.layout.trajectories, IndexRange(0, 4)))
    assert "what was durable stays as it was" in [check.claim for check in failing(observer)]
    assert [cost.tokens_lost for cost in costs(observer, [before, after])] == [0, num_tokens]


def test_a_shard_claimed_again_after_it_was_durable_is_found() -> None:
    log, observer = finished_run()
    log.retire("w")
    log.claim("rollout", IndexRange(0, 4), worker="again", lease_s=10)
    (check,) = failing(observer)
    assert check.claim == "rollout: no shard is claimed after it was durable"


# -- pieces ---------------------------------------------------------------------------------------------------------
class Everything:
    roles = ("learn-0", "rollout-0", "score-0")
    beyond_roles = ("flow", "worker", "server")


def test_twenty_kills_strike_everything_and_a_seed_repeats_them() -> None:
    strikes = plan_strikes(random.Random(1), Everything(), num_kills=20, full_disk=True)  # type: ignore[arg-type]
    kills = [strike.target for strike in strikes if strike.kind == "SIGKILL"]
    assert len(kills) == 20
    assert set(kills) == {*Everything.roles, *Everything.beyond_roles}
    assert sum(strike.kind == "SIGSTOP" for strike in strikes) == 4
    assert sum(strike.kind == "full disk" for strike in strikes) == 1
    again = plan_strikes(random.Random(1), Everything(), num_kills=20, full_disk=True)  # type: ignore[arg-type]
    assert strikes == again


def test_ballast_fills_a_disk_to_the_brim() -> None:
    # The kernel's own full disk: every write to it fails with ENOSPC.
    fill(Path("/dev/full"))
