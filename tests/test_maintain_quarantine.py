"""Quarantine: what is set aside is made again where it may be, and nothing that was trained is trained again."""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import maintain_runs
import pipeline
import pytest

from asyncopd.cli import main
from asyncopd.errors import ObjectMissingError, StorageError
from asyncopd.records import Heartbeat, WorkerStatus
from asyncopd.types import IndexRange, PolicyVersion
from flows.wiring import OpenRun, open_stored_run
from storage.maintain.audit import audit_run
from storage.maintain.quarantine import set_aside
from storage.records import to_json
from storage.run_log import StoredRunLog
from storage.stores.base import ObjectStore


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return asyncio.run(maintain_runs.finished_run(tmp_path_factory.mktemp("quarantine")))


@pytest.fixture
def log(finished: OpenRun, tmp_path: Path) -> StoredRunLog:
    """A copy of a run of 4 steps of 8 indices in shards of 4, with checkpoints after 2 and 4 steps."""
    return maintain_runs.copy_of(finished, tmp_path / "copy")


def resume(log: StoredRunLog) -> StoredRunLog:
    run = open_stored_run(log.store.url, log.run_id)
    # The stored configuration still names the root that the run was copied from.
    here = run.config.storage.model_copy(update={"root": log.store.url})
    asyncio.run(pipeline.run_all(replace(run, config=run.config.model_copy(update={"storage": here}))))
    return StoredRunLog(log.store, log.run_id)


def findings(store: ObjectStore) -> list[tuple[str, str]]:
    report = audit_run(store, maintain_runs.RUN_ID, grace_s=3600, recheck_s=0)
    return [(finding.problem, finding.key) for finding in report.findings]


def trained(log: StoredRunLog) -> list[int]:
    return [index for step in log.steps() for index in step.indices.indices]


def damage(log: StoredRunLog, key: str) -> None:
    body = log.store.get(key)
    log.store.put(key, body[:40] + bytes([body[40] ^ 4]) + body[41:])


def asyncopd(command: str) -> int:
    """Run a command that a message named."""
    program, *arguments = shlex.split(command)
    assert program == "asyncopd"
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


# -- the way from finding to mended -------------------------------------------------------------------------------
DAMAGE = {
    "trajectories manifest": r"trajectories/000000-000003\.json",
    "trajectories": r"trajectories/000024-000027\..*\.parquet",
    "scores manifest": r"scores/oracle/000008-000011\.json",
    "scores": r"scores/oracle/000024-000027\..*\.parquet",
    "policy manifest": r"policies/000001\.r0\.json",
    "policy": r"policies/000003/.*",
    "policy of a checkpoint": r"policies/000004/r2.*",
    "policy manifest of a checkpoint": r"policies/000002.r0.json",
    "checkpoint manifest": r"checkpoints/000004\.r2\.json",
    "checkpoint": r"checkpoints/000004\.r2.*/.*",
    "step": r"steps/000001\.r0\.json",
    "last step": r"steps/000003\.r2\.json",
    "evaluation": r"evals/000002\.r0\.json",
    "rewind": r"rewinds/0001\.json",
    "claim": r"claims/rollout/.*",
    "heartbeat": r"heartbeats/rollout.*",
    "spans": r"spans/.*",
    "failure": r"failures/.*",
    "architecture": r"architecture/.*",
}


@pytest.mark.parametrize("pattern", DAMAGE.values(), ids=DAMAGE.keys())
def test_following_the_audit_mends_the_run(log: StoredRunLog, pattern: str) -> None:
    key = next(k for k in log.store.list(log.layout.root) if re.fullmatch(f"{log.layout.root}/{pattern}", k))
    through = log.read_policy(PolicyVersion(4, 2)).safetensors
    damage(log, key)
    for _ in range(4):
        report = audit_run(log.store, log.run_id, recheck_s=0)
        for finding in report.findings:
            if finding.mend.startswith("asyncopd maintain quarantine"):
                assert asyncopd(finding.mend) == 0
        log = resume(log)
        if report.is_clean:
            break
    assert report.is_clean, report.findings
    assert trained(log) == list(range(32))
    latest = log.latest_policy()
    assert latest is not None
    assert latest.number == 4
    # One CPU thread: what was trained again gave the same weights.
    assert log.read_policy(latest).safetensors == through


def test_a_deleted_step_and_a_deleted_version_are_made_again(log: StoredRunLog) -> None:
    log.store.delete(log.layout.step(2, 2))
    log.store.delete(log.layout.key("policy", state=PolicyVersion(3, 2)))
    for _, key in findings(log.store):
        set_aside(log.store, key)
    log = resume(log)
    assert findings(log.store) == []
    assert trained(log) == list(range(32))


# -- trajectories -------------------------------------------------------------------------------------------------
async def test_an_untrained_shard_is_made_again_by_a_worker_that_joins(tmp_path: Path) -> None:
    # All shards are rolled out under version 0, so that a shard made again has the same tokens.
    config = pipeline.small_config(tmp_path, staleness__max_staleness=4, evaluate__every=0)
    run = pipeline.new_run(config)
    learning = asyncio.create_task(pipeline.train_steps(open_stored_run(str(tmp_path), run.log.run_id)))
    await pipeline.roll_out(run)
    shard = IndexRange(12, 16)
    before = run.log.read_trajectories(shard)
    done = set_aside(run.store, run.log.layout.shard_manifest(run.log.layout.trajectories, shard))
    assert "prefect deployment run rollout/worker" in done.consequences[-1]
    assert run.log.find_trajectories(shard) is None

    await pipeline.roll_out(run)
    tokens = [trajectory.response_ids.tolist() for trajectory in run.log.read_trajectories(shard)]
    assert tokens == [trajectory.response_ids.tolist() for trajectory in before]
    await pipeline.score_shards(run)
    await learning
    assert trained(run.log) == list(range(32))
    assert findings(run.store) == []


def test_scores_of_a_quarantined_shard_go_with_it(log: StoredRunLog) -> None:
    set_aside(log.store, log.layout.checkpoint_manifest(4, 2))
    shard = IndexRange(24, 28)
    done = set_aside(log.store, log.layout.shard_manifest(log.layout.trajectories, shard))
    assert log.find_trajectories(shard) is None
    assert log.find_scores("oracle", shard) is None
    assert any("rewind 3 takes the run back to the state after 2 steps" in line for line in done.consequences)
    assert trained(StoredRunLog(log.store, log.run_id)) == list(range(16)), "before it is made again it is untrained"
    log = resume(log)
    assert trained(log) == list(range(32))
    assert findings(log.store) == []


def test_a_shard_trained_before_the_checkpoint_is_not_made_again(log: StoredRunLog) -> None:
    shard = IndexRange(4, 8)
    key = log.layout.shard_manifest(log.layout.trajectories, shard)
    steps = log.steps()
    done = set_aside(log.store, key)
    assert "stay trained and are not made again" in done.consequences[-1]
    with pytest.raises(ObjectMissingError, match=rf"{key}: the data of this shard was removed \(quarantine\)"):
        log.read_trajectories(shard)
    with pytest.raises(ObjectMissingError, match=r"removed \(quarantine\)"):
        log.read_scores("oracle", shard)
    log = resume(log)
    manifest = log.find_trajectories(shard)
    assert manifest is not None
    assert manifest.facts.removed is not None
    assert log.steps() == steps
    report = audit_run(log.store, log.run_id, recheck_s=0)
    assert report.is_clean
    assert "1 shards of trajectories keep their manifest only (quarantine)" in report.notes[0]


def test_steps_are_not_taken_back_from_a_learner_that_is_alive(log: StoredRunLog) -> None:
    set_aside(log.store, log.layout.checkpoint_manifest(4, 2))
    log.heartbeat("learn-host-1", WorkerStatus(role="learn"))
    before = log.store.list(log.layout.root)
    with pytest.raises(StorageError, match=r"the learner learn-host-1 is alive.*Stop the run"):
        set_aside(log.store, log.layout.shard_manifest(log.layout.trajectories, IndexRange(24, 28)))
    assert log.store.list(log.layout.root) == before


def test_a_learner_whose_clock_is_an_hour_behind_is_alive_all_the_same(log: StoredRunLog) -> None:
    # Its own clock alone would count: its steps were then taken back while it went on.
    set_aside(log.store, log.layout.checkpoint_manifest(4, 2))
    beat = Heartbeat("learn-host-1", beaten=time.time() - 3600, retired=False, status=WorkerStatus(role="learn"))
    log.store.put(log.layout.key("heartbeat", worker=beat.worker), to_json(beat))
    with pytest.raises(StorageError, match="the learner learn-host-1 is alive"):
        set_aside(log.store, log.layout.shard_manifest(log.layout.trajectories, IndexRange(24, 28)))


# -- the rest -----------------------------------------------------------------------------------------------------
def test_a_version_is_published_again_from_the_checkpoint_of_its_state(log: StoredRunLog) -> None:
    version = PolicyVersion(4, 2)
    weights = log.read_policy(version)
    (key,) = [k for k in log.store.list(log.layout.folder("policy")) if "/000004/r2." in k]
    damage(log, key)
    done = set_aside(log.store, key)
    assert done.consequences == ["version 4 was published again from the checkpoint of the same state."]
    assert log.read_policy(version) == weights


def test_a_version_without_a_checkpoint_is_noted_as_lost(log: StoredRunLog) -> None:
    key = log.layout.key("policy", state=PolicyVersion(1))
    done = set_aside(log.store, key)
    assert "version 1 is lost" in done.consequences[0]
    assert findings(log.store) == []


def test_a_rewind_that_can_be_read_stays(log: StoredRunLog) -> None:
    with pytest.raises(StorageError, match="can be read, and nothing would count as it should without it"):
        set_aside(log.store, log.layout.key("rewind", number=1))


def test_a_runs_record_cannot_be_set_aside(log: StoredRunLog) -> None:
    with pytest.raises(StorageError, match="nothing can make this record again"):
        set_aside(log.store, log.layout.key("run"))


@pytest.mark.parametrize("key", ["runs/small-1/notes.txt", "models/x", "else/where.json"])
def test_other_keys_are_refused(log: StoredRunLog, key: str) -> None:
    with pytest.raises(StorageError, match=r"docs/storage.md"):
        set_aside(log.store, key)


def test_what_an_error_advises_can_be_done(log: StoredRunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    # Errors name `asyncopd maintain quarantine KEY` without --root, as for a run in ./runs.
    monkeypatch.chdir(Path(log.store.url).parent)
    Path(log.store.url).rename("runs")
    moved = type(log.store)("runs")
    relative = StoredRunLog(moved, log.run_id)
    shard = relative.trajectory_shards()[0]
    ((data_key, _),) = relative.find_trajectories(shard).objects.items()  # type: ignore[union-attr]
    damage(relative, data_key)
    with pytest.raises(StorageError) as raised:
        relative.read_trajectories(shard)
    (command,) = re.findall(r"`(asyncopd maintain quarantine [^`]*)`", str(raised.value))
    assert asyncopd(command) == 0
    assert findings(moved) == []
