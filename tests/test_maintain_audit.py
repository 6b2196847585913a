"""What an audit finds in records that are whole, each by itself, and do not agree with each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from maintain_runs import new_log, train
from storage_builders import fresh_store, make_evaluation, make_scores, make_trajectories, make_weights

from asyncopd.types import IndexRange, PolicyVersion
from storage.maintain.audit import audit_run
from storage.records import to_json
from storage.run_log import StoredRunLog


@pytest.fixture
def log() -> StoredRunLog:
    """Four trained steps of 4 indices in shards of 2, with checkpoints after 2 and 4."""
    log = new_log(fresh_store("memory", Path()))
    train(log, 0, 4)
    assert found(log) == []
    return log


def found(log: StoredRunLog) -> list[tuple[str, str]]:
    """(problem, key without the run's folder) of every finding."""
    report = audit_run(log.store, log.run_id, grace_s=0, recheck_s=0)
    return [(finding.problem, finding.key.removeprefix(f"{log.layout.root}/")) for finding in report.findings]


# -- conservation -------------------------------------------------------------------------------------------------
def test_two_shards_for_one_index(log: StoredRunLog) -> None:
    shard = IndexRange(1, 3)
    log.publish_trajectories(shard, make_trajectories(shard), worker="w")
    assert ("overlap", "trajectories/000001-000002.json") in found(log)


def test_an_index_that_two_steps_trained(log: StoredRunLog) -> None:
    step = log.find_step(2)
    assert step is not None
    log.store.put(log.layout.step(2, 0), to_json(replace(step, indices=IndexRange(7, 11))))
    assert found(log).count(("overlap", "steps/000002.r0.json")) == 1


def test_a_step_that_did_not_train_its_own_range(log: StoredRunLog) -> None:
    step = log.find_step(3)
    assert step is not None
    log.store.put(log.layout.step(3, 0), to_json(replace(step, indices=IndexRange(12, 15))))
    assert found(log) == [("mismatch", "steps/000003.r0.json")]


def test_a_step_whose_tokens_are_not_those_of_its_shards(log: StoredRunLog) -> None:
    step = log.find_step(1)
    assert step is not None
    more = step.num_tokens + 1
    log.store.put(log.layout.step(1, 0), to_json(replace(step, num_tokens=more, staleness_tokens={0: more})))
    assert found(log) == [("mismatch", "steps/000001.r0.json")]


@pytest.mark.parametrize("staleness", [-1, 3])
def test_a_step_that_breaks_the_staleness_bound(log: StoredRunLog, staleness: int) -> None:
    step = log.find_step(1)
    assert step is not None
    ages = {0: step.num_tokens - 1, staleness: 1}
    log.store.put(log.layout.step(1, 0), to_json(replace(step, staleness_tokens=ages)))
    assert found(log) == [("mismatch", "steps/000001.r0.json")]


def test_scores_without_their_trajectories(log: StoredRunLog) -> None:
    shard = IndexRange(40, 42)
    log.publish_scores("oracle", shard, [make_scores(row) for row in make_trajectories(shard)], worker="w")
    assert found(log) == [("missing", "trajectories/000040-000041.json")]


def test_a_trained_index_without_scores(log: StoredRunLog) -> None:
    key = log.layout.shard_manifest(log.layout.scores("oracle"), IndexRange(4, 6))
    manifest = log.find_scores("oracle", IndexRange(4, 6))
    assert manifest is not None
    for gone in (key, *manifest.objects):
        log.store.delete(gone)
    assert found(log) == [("missing", "scores/oracle/000004-000005.json")]


def test_scores_of_another_teacher_under_the_same_name(log: StoredRunLog) -> None:
    shard = IndexRange(40, 42)
    rows = make_trajectories(shard)
    log.publish_trajectories(shard, rows, worker="w")
    other = [replace(make_scores(row), teacher_digest="d2") for row in rows]
    log.publish_scores("oracle", shard, other, worker="w")
    assert found(log) == [("mismatch", "scores/oracle/000040-000041.json")]


# -- lineage ------------------------------------------------------------------------------------------------------
def test_objects_of_a_rewind_that_is_not_recorded(log: StoredRunLog) -> None:
    log.publish_policy(make_weights(3, 1), worker="w")
    assert ("missing", "rewinds/0001.json") in found(log)


def test_a_gap_in_the_rewinds(log: StoredRunLog) -> None:
    log.record_rewind(4, worker="w")
    log.record_rewind(4, worker="w")
    log.store.delete(log.layout.key("rewind", number=1))
    assert found(log) == [("missing", "rewinds/0001.json")]


def test_a_checkpoint_with_other_weights_than_its_version(log: StoredRunLog) -> None:
    train(log, 4, 6, checkpoint_every=99)
    log.publish_checkpoint(6, 0, {"model.safetensors": b"other weights"}, worker="w")
    assert found(log) == [("mismatch", "checkpoints/000006.r0.json")]


def test_a_record_under_another_records_key(log: StoredRunLog) -> None:
    log.store.put(log.layout.step(1, 0), log.store.get(log.layout.step(2, 0)))
    assert ("mismatch", "steps/000001.r0.json") in found(log)
    log.store.put(log.layout.key("evaluation", state=PolicyVersion(2)), to_json({}))
    assert ("corrupt", "evals/000002.r0.json") in found(log)


def test_a_manifest_that_tells_other_tokens_than_its_rows(log: StoredRunLog) -> None:
    shard = IndexRange(0, 2)
    manifest = log.find_trajectories(shard)
    assert manifest is not None
    key = log.layout.shard_manifest(log.layout.trajectories, shard)
    log.store.put(key, to_json(replace(manifest, facts=replace(manifest.facts, num_tokens=99))))
    assert ("mismatch", "trajectories/000000-000001.json") in found(log)


def test_records_of_kinds_that_the_audit_does_not_know_are_checked_by_their_checksum(log: StoredRunLog) -> None:
    key = f"{log.layout.root}/later/000001.json"
    log.store.put(key, to_json({"number": 1}))
    log.store.put(f"{log.layout.root}/notes.json", b'{"by": "hand"}')
    assert found(log) == []
    log.store.put(key, log.store.get(key).replace(b'"number": 1', b'"number": 2'))
    assert found(log) == [("corrupt", "later/000001.json")]


# -- what is in progress ------------------------------------------------------------------------------------------
def test_a_version_whose_step_is_not_recorded_yet_is_in_progress(log: StoredRunLog) -> None:
    log.publish_policy(make_weights(5), worker="w")
    assert found(log) == []


def test_data_of_a_writer_that_has_not_come_to_its_manifest_is_no_orphan_yet(log: StoredRunLog) -> None:
    log.store.put(log.layout.shard_object(log.layout.trajectories, IndexRange(40, 42)), b"data")
    assert audit_run(log.store, log.run_id, recheck_s=0).is_clean
    assert [problem for problem, _ in found(log)] == ["orphan"]


def test_what_the_learner_went_back_over_is_not_held_against_the_run(log: StoredRunLog) -> None:
    log.publish_evaluation(make_evaluation(4))
    log.record_rewind(2, worker="w")
    assert found(log) == []
    train(log, 2, 5, rewind=1)
    assert found(log) == []
