"""Collection and retention: garbage goes, and whatever is kept can be resumed and replayed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maintain_runs import new_log, train
from storage_builders import STORE_KINDS, fresh_store, make_evaluation, make_weights, reopened

from asyncopd.config.schema import KeepCheckpoints, KeepPolicies, KeepShards, Retention
from asyncopd.errors import AsyncOPDError, ObjectMissingError, StorageError
from asyncopd.types import IndexRange, PolicyVersion
from storage.maintain.audit import audit_run
from storage.maintain.collect import collect_run, what_to_keep
from storage.run_log import StoredRunLog
from storage.stores.local import LocalStore

LATER = 7200.0
"""Seconds after now, at which everything a test made is older than the grace."""


def memory_log(checkpoint_every: int = 2) -> StoredRunLog:
    return new_log(fresh_store("memory", Path()), checkpoint_every=checkpoint_every)


def policy(
    *, checkpoints: int | None = None, every: int = 1, last: int = 1, steps: int | None = None, superseded: bool = True
) -> Retention:
    return Retention(
        checkpoints=KeepCheckpoints(keep_last=checkpoints),
        policies=KeepPolicies(keep_every=every, keep_last=last),
        shards=KeepShards(keep_last_steps=steps),
        superseded=superseded,
    )


def collect(log: StoredRunLog, retention: Retention, **options: object) -> list[str]:
    report = collect_run(log.store, log.run_id, retention=retention, now=time.time() + LATER, **options)  # type: ignore[arg-type]
    return [garbage.key for garbage in report.removed]


# -- garbage ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", STORE_KINDS)
def test_data_without_a_manifest_goes_once_it_is_old(kind: str, tmp_path: Path) -> None:
    log = new_log(fresh_store(kind, tmp_path))
    train(log, 0, 2)
    orphan = log.layout.shard_object(log.layout.trajectories, IndexRange(8, 10))
    log.store.put(orphan, b"from a writer that was killed")
    everything = log.store.list("runs")
    assert collect_run(log.store, log.run_id).removed == (), "it is young: its writer may come to its manifest yet"
    assert collect(log, policy(), dry_run=True) == [orphan]
    assert log.store.list("runs") == everything
    assert collect(log, policy()) == [orphan]
    kept = [key for key in log.store.list("runs") if key.startswith(log.layout.folder("removal"))]
    assert log.store.list("runs") == sorted({*everything, *kept} - {orphan})
    assert collect(log, policy()) == []


def test_temporary_files_of_killed_writers_go(tmp_path: Path) -> None:
    log = new_log(fresh_store("file", tmp_path))
    assert isinstance(log.store, LocalStore)
    half = log.store.root / ".tmp" / "1-half"
    half.write_bytes(b"half")
    (found,) = audit_run(log.store, log.run_id, grace_s=0, recheck_s=0).findings
    assert (found.problem, found.key) == ("temporary", ".tmp/1-half")
    assert collect(log, policy(), grace_s=LATER + 3600) == []
    assert collect(log, policy()) == [".tmp/1-half"]
    assert not half.exists()


def test_a_quarantined_shards_data_stays_for_its_own_time(tmp_path: Path) -> None:
    log = new_log(fresh_store("file", tmp_path))
    train(log, 0, 1)
    shard = IndexRange(0, 2)
    ((data_key, _),) = log.find_trajectories(shard).objects.items()  # type: ignore[union-attr]
    moved = f"{log.layout.root}/quarantine/1/trajectories/000000-000001.json"
    key = log.layout.shard_manifest(log.layout.trajectories, shard)
    log.store.put(moved, log.store.get(key))
    log.store.delete(key)
    assert data_key not in collect(log, policy())
    assert data_key in collect(log, policy().model_copy(update={"quarantine_s": LATER / 2}))


def test_nothing_is_collected_when_a_record_cannot_be_read() -> None:
    log = memory_log()
    train(log, 0, 2)
    log.store.put(log.layout.shard_manifest(log.layout.trajectories, IndexRange(0, 2)), b"{")
    with pytest.raises(StorageError, match=r"nothing was collected: without runs/run/trajectories/000000-000001.json"):
        collect(log, policy())


def test_nothing_is_let_go_while_the_newest_checkpoint_is_corrupt() -> None:
    log = memory_log()
    train(log, 0, 6)
    before = log.store.list("runs")
    (key,) = [key for key in before if "/checkpoints/000006.r0." in key and not key.endswith(".json")]
    log.store.put(key, b"?")
    with pytest.raises(StorageError, match=f"{key}: sha256"):
        collect(log, policy(checkpoints=1))
    assert log.store.list("runs") == before


# -- retention ----------------------------------------------------------------------------------------------------
def test_retention_keeps_what_it_says() -> None:
    log = memory_log()
    train(log, 0, 10)
    for number in (0, 5, 10):
        log.publish_evaluation(make_evaluation(number))
    collect(log, policy(checkpoints=2, every=4, last=2, steps=3))
    assert log.checkpoints() == [(6, 0), (8, 0), (10, 0)], "the last two, and the start of a replay of step 7"
    assert [version.number for version in log.policies()] == [0, 4, 6, 8, 9, 10]
    assert [step.step for step in log.steps()] == list(range(10)), "records stay"
    for shard in log.trajectory_shards():
        if shard.start >= 6 * 4:
            log.read_trajectories(shard)
            log.read_scores("oracle", shard)
        else:
            with pytest.raises(ObjectMissingError, match=r"was removed \(retention\).*keep_last_steps"):
                log.read_trajectories(shard)
    assert len(log.trajectory_shards()) == 20, "manifests stay, so that nobody makes the shards again"


def test_every_deletion_is_on_record_and_the_audit_knows_it() -> None:
    log = memory_log()
    train(log, 0, 8)
    removed = collect(log, policy(checkpoints=1, every=3, last=1, steps=2))
    recorded = [
        key
        for record in log.store.list(log.layout.folder("removal"))
        for key in removed
        if key.encode() in log.store.get(record)
    ]
    assert sorted(recorded) == sorted(removed)
    assert log.layout.key("policy", state=PolicyVersion(4)) in removed
    report = audit_run(log.store, log.run_id, grace_s=0, recheck_s=0)
    assert report.is_clean
    assert "shards of trajectories keep their manifest only (retention)" in report.notes[0]


def test_what_the_learner_went_back_over_goes_unless_it_is_kept() -> None:
    log = memory_log()
    train(log, 0, 6)
    log.record_rewind(2, worker="w")
    train(log, 2, 4, rewind=1)
    assert collect(log, policy(superseded=True)) == []
    removed = collect(log, policy(superseded=False))
    assert {key for key in removed if key.endswith(".json")} == {
        *(log.layout.key("policy", state=PolicyVersion(number)) for number in (3, 4, 5, 6)),
        *(log.layout.checkpoint_manifest(number, 0) for number in (4, 6)),
    }
    assert reopened(log).latest_policy() == PolicyVersion(4, 1)


def test_a_removed_version_does_not_uncover_an_older_one_of_its_number() -> None:
    # Killed between checkpoint 2 and version 2: rewind 1 publishes version 2 again, and both count.
    log = memory_log()
    train(log, 0, 2)
    log.record_rewind(2, worker="w")
    log.publish_policy(make_weights(2, 1), worker="w")
    train(log, 2, 6, rewind=1)
    collect(log, policy(checkpoints=1, every=0, last=1))
    assert log.find_policy(2) is None


def test_versions_that_an_evaluation_waits_for_are_kept() -> None:
    kept = what_to_keep(
        policy(every=0, last=1), checkpoints=[], policies=[PolicyVersion(n) for n in range(9)], num_steps=8, wanted={5}
    )
    assert sorted(version.number for version in kept.policies) == [0, 5, 8]


def test_weights_that_others_are_a_difference_to_are_kept() -> None:
    versions = [PolicyVersion(n) for n in range(9)]
    kept = what_to_keep(
        policy(every=0, last=1),
        checkpoints=[],
        policies=versions,
        num_steps=8,
        base_of=lambda version: None if version.number in (0, 1, 5) else PolicyVersion(version.number - 1),
    )
    assert sorted(version.number for version in kept.policies) == [0, 5, 6, 7, 8]


def test_young_things_stay_whatever_the_policy() -> None:
    log = memory_log()
    train(log, 0, 8)
    before = log.store.list("runs")
    assert collect_run(log.store, log.run_id, retention=policy(checkpoints=1, every=0, steps=1)).removed == ()
    assert log.store.list("runs") == before


histories = st.lists(
    # (steps the learner gets on before it stops, how many checkpoints it then goes back)
    st.tuples(st.integers(1, 7), st.integers(0, 3)),
    min_size=1,
    max_size=4,
)
policies = st.builds(
    policy,
    checkpoints=st.none() | st.integers(1, 4),
    every=st.integers(0, 4),
    last=st.integers(1, 4),
    steps=st.none() | st.integers(1, 9),
    superseded=st.booleans(),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories, st.integers(1, 4), st.lists(policies, min_size=1, max_size=2))
def test_what_is_kept_can_always_be_resumed_and_replayed(
    history: list[tuple[int, int]], checkpoint_every: int, retentions: list[Retention]
) -> None:
    log = memory_log(checkpoint_every)
    state = 0
    for rewind, (num_steps, back) in enumerate(history):
        train(log, state, state + num_steps, rewind=rewind, checkpoint_every=checkpoint_every)
        starts = [0, *(step for step, _ in log.checkpoints())]
        state = starts[max(0, len(starts) - 1 - back)]
        log.record_rewind(state, worker="w")
    train(log, state, state + 3, rewind=len(history), checkpoint_every=checkpoint_every)
    num_steps = state + 3
    latest = log.latest_policy()
    for retention in retentions:
        collect(log, retention)

    log = reopened(log)
    assert log.latest_policy() == latest
    assert len(log.steps()) == num_steps
    checkpoint = log.latest_checkpoint()
    start = 0
    if checkpoint is not None:
        assert log.read_checkpoint(*checkpoint)
        start = checkpoint[0]
        found = log.find_policy(start)
        assert found is not None, "samplers load the version of the state that a resume starts at"
        assert log.read_policy(found)
    whole = {step for step in range(num_steps) if is_whole(log, step)}
    for step in range(start, num_steps):
        assert step in whole, f"a resume from state {start} trains step {step}"
    keeps = [r.shards.keep_last_steps for r in retentions if r.shards.keep_last_steps is not None]
    for step in range(max(0, num_steps - min(keeps)) if keeps else 0, num_steps):
        # Version 0 is always there; other starts are checkpoints.
        starts = [0, *(s for s, rewind in log.checkpoints() if s <= step and log.read_checkpoint(s, rewind))]
        assert any(whole.issuperset(range(s, step + 1)) for s in starts), f"replay of {step}"
    assert log.find_policy(0) is not None
    assert audit_run(log.store, log.run_id, grace_s=0, recheck_s=0).is_clean


def is_whole(log: StoredRunLog, step: int) -> bool:
    try:
        for start in (4 * step, 4 * step + 2):
            shard = IndexRange(start, start + 2)
            assert len(log.read_trajectories(shard)) == len(log.read_scores("oracle", shard)) == 2
    except AsyncOPDError:
        return False
    return log.find_step(step) is not None
