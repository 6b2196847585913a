"""`asyncopd chaos` itself: real processes, real kills, the proof at the end; and that its witness can see a wrong."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from storage_builders import make_scores, make_step, make_trajectories, memory_log

from asyncopd.chaos.ordeal import Disturbance, Strike, fill, plan_strikes
from asyncopd.chaos.settings import chaos_config
from asyncopd.chaos.verdict import Check, checks, costs
from asyncopd.chaos.witness import Witness
from asyncopd.cli import main
from asyncopd.types import IndexRange, PolicyVersion, PolicyWeights
from storage.manifests import quarantine
from storage.run_log import StoredRunLog

pytestmark = pytest.mark.processes


@pytest.fixture
def _environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # The command gives its process a home and a server of its own; the next test shall not inherit them.
    monkeypatch.setenv("ASYNCOPD_HOME", "replaced by chaos")
    monkeypatch.setenv("PREFECT_API_URL", "replaced by chaos")


@pytest.mark.chaos
@pytest.mark.usefixtures("_environment_comes_back")
def test_a_run_whose_roles_are_killed_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["chaos", "--kills", "2", "--steps", "30", "--without-prefect", "--seed", "3"])
    output = capsys.readouterr().out
    assert ended.value.code == 0, output
    assert output.count("holds  ") == 10
    assert "final weights too, bit for bit" in output


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.usefixtures("_environment_comes_back")
def test_a_run_whose_flow_worker_and_server_are_killed_too_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["chaos", "--kills", "8", "--seed", "5"])
    assert ended.value.code == 0, capsys.readouterr().out


# -- the proof can fail ---------------------------------------------------------------------------------------------
def finished_run() -> tuple[StoredRunLog, Witness]:
    """Two steps of eight indices, witnessed from the start."""
    log = memory_log()
    witness = Witness(log, teacher="oracle")
    for start in range(0, 16, 4):
        shard = IndexRange(start, start + 4)
        trajectories = make_trajectories(shard)
        log.claim("rollout", shard, worker="w", lease_s=10)
        log.publish_trajectories(shard, trajectories, worker="w", facts={})
        log.publish_scores("oracle", shard, [make_scores(t) for t in trajectories], worker="w", facts={})
    for number in range(2):
        train(log, number, IndexRange(8 * number, 8 * number + 8))
    log.publish_policy(PolicyWeights(PolicyVersion(2), b"w2"), worker="w", facts={})
    witness.look()
    return log, witness


def train(log: StoredRunLog, number: int, indices: IndexRange) -> None:
    step = make_step(number)
    log.publish_step(type(step)(**{**vars(step), "indices": indices, "staleness_tokens": {0: 40}, "dropped": {}}))


def failing(witness: Witness, *, num_steps: int = 2, replayed: bytes = b"w2") -> list[Check]:
    config = chaos_config("memory://x", num_steps=num_steps, max_staleness=0)
    return [check for check in checks(witness, config, replayed=replayed, twin=None) if not check.holds]


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
    log, witness = finished_run()
    num_tokens = witness.durable["rollout"][IndexRange(0, 4)].manifest.facts["num_tokens"]
    before = Disturbance(Strike("SIGKILL", "a"), struck=0.0, at_step=1, recovery_s=1.0, restarted=())
    after = Disturbance(Strike("SIGKILL", "b"), struck=time.time(), at_step=1, recovery_s=1.0, restarted=())
    quarantine(log.store, log.layout.shard_manifest(log.layout.trajectories, IndexRange(0, 4)))
    assert "what was durable stays as it was" in [check.claim for check in failing(witness)]
    assert [cost.tokens_lost for cost in costs(witness, [before, after])] == [0, num_tokens]


def test_a_shard_claimed_again_after_it_was_durable_is_found() -> None:
    log, witness = finished_run()
    log.retire("w")
    log.claim("rollout", IndexRange(0, 4), worker="again", lease_s=10)
    (check,) = failing(witness)
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
