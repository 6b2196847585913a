"""Runs, shared models, architecture files, observations, and the records they are kept in."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from storage_builders import STORE_KINDS, fresh_store, make_evaluation, memory_log, reopened

from asyncopd.errors import ObjectMissingError, ShardCorruptError, StorageError
from asyncopd.records import Facts, WorkerStatus
from asyncopd.types import Evaluation, IndexRange, PolicyVersion, Span
from storage.layout import RunLayout, encode_name, parse, parse_shard, parse_version
from storage.records import from_json, to_json
from storage.run_view import RunView
from storage.runs import create_run, find_model, list_runs, open_run, publish_model, read_model
from storage.stores.base import ObjectStore

RECORD = {"config": {"seed": 1}, "config_hash": "c1", "code_version": "0.1", "created": 5.0, "parent": None}


@pytest.fixture(params=STORE_KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return fresh_store(request.param, tmp_path)


def test_a_created_run_can_be_opened_and_listed(store: ObjectStore) -> None:
    assert list_runs(store) == []
    create_run(store, "walk-2", RECORD)
    create_run(store, "walk-1", RECORD).heartbeat("w", WorkerStatus())
    assert list_runs(store) == ["walk-1", "walk-2"]
    record = open_run(store, "walk-1").record
    assert {name: record[name] for name in RECORD} == RECORD


def test_a_run_is_created_again_only_with_its_own_config(store: ObjectStore) -> None:
    create_run(store, "walk", RECORD)
    again = create_run(store, "walk", {**RECORD, "created": 9.0})
    assert again.record["created"] == 5.0
    with pytest.raises(StorageError, match=r"run walk exists.*with config hash c1, not c2. Choose another run id"):
        create_run(store, "walk", {**RECORD, "config_hash": "c2"})


def test_a_run_that_does_not_exist_cannot_be_opened(store: ObjectStore) -> None:
    with pytest.raises(ObjectMissingError, match=r"there is no run nowhere in .*Existing runs: none"):
        open_run(store, "nowhere")


@pytest.mark.parametrize("run_id", ["", "a/b", ".hidden", "..", "ü", "a" * 101, "a b"])
def test_run_ids_that_cannot_be_a_folder_are_refused(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"run id .* cannot be used"):
        create_run(fresh_store("memory", tmp_path), run_id, RECORD)


def test_a_model_is_shared_by_digest(store: ObjectStore) -> None:
    assert find_model(store, "abc123") is None
    assert publish_model(store, "abc123", {"config.json": b"{}", "model.safetensors": b"w"}, Facts(loss_nats=0.5))
    assert not publish_model(store, "abc123", {"config.json": b"[]"})
    manifest = find_model(store, "abc123")
    assert manifest is not None
    assert (manifest.kind, manifest.facts) == ("model", Facts(loss_nats=0.5))
    assert read_model(store, "abc123") == {"config.json": b"{}", "model.safetensors": b"w"}
    with pytest.raises(ObjectMissingError, match=r"models/other.json does not exist"):
        read_model(store, "other")
    assert list_runs(store) == []


def test_architecture_files_come_back_by_name(store: ObjectStore) -> None:
    log = create_run(store, "walk", RECORD)
    assert log.publish_architecture({"config.json": b"{}", "tokenizer.json": b"[]"})
    assert not log.publish_architecture({"config.json": b"other"})
    assert reopened(log).read_architecture() == {"config.json": b"{}", "tokenizer.json": b"[]"}


def test_object_names_are_plain_file_names() -> None:
    for name in ("../x", "a/b", ".hidden", ""):
        with pytest.raises(StorageError, match=r"object name .* cannot be used"):
            memory_log().publish_architecture({name: b""})


# -- observations -------------------------------------------------------------------------------------------------
def test_an_evaluation_keeps_its_missing_numbers() -> None:
    log = memory_log()
    log.publish_evaluation(
        Evaluation(PolicyVersion(3), 4, math.nan, {"easy": math.nan, "hard": 0.5}, 0.25, 0.01, 11.0, 1000.0)
    )
    (found,) = log.evaluations()
    assert math.isnan(found.accuracy)
    assert math.isnan(found.accuracy_by_group["easy"])
    assert (found.accuracy_by_group["hard"], found.kl_nats, found.version) == (0.5, 0.25, PolicyVersion(3))


def test_the_first_evaluation_of_a_version_is_kept() -> None:
    log = memory_log()
    log.publish_evaluation(make_evaluation(3))
    log.publish_evaluation(Evaluation(PolicyVersion(3), 4, 0.9, {}, 0.25, 0.01, 11.0, 1000.0))
    assert log.evaluations() == [make_evaluation(3)]


def test_spans_of_all_workers_are_read_by_start() -> None:
    log = memory_log()
    spans = [Span("rollout", "w.1/x", "sample", start, start + 1.0, "000000-000007") for start in (3.0, 1.0)]
    log.publish_spans("w.1/x", 0, spans)
    log.publish_spans("w2", 0, [Span("score", "w2", "wait:shard", 2.0, 2.5)])
    log.publish_spans("w2", 0, [Span("score", "w2", "wait:shard", 2.0, 2.5)])
    stored = RunView(log).read("spans").spans()
    assert [span.start for span in stored] == [1.0, 2.0, 3.0]
    assert stored[2] == spans[0]


def test_failures_are_read_oldest_first() -> None:
    log = memory_log()
    for reason in ("first: ü", "second"):
        log.publish_failure("learner", "w/0", reason)
    assert sorted(failure.reason for failure in log.failures()) == ["first: ü", "second"]
    assert log.failures() == sorted(log.failures(), key=lambda failure: int(failure.failed * 1000))
    assert {(failure.role, failure.worker) for failure in log.failures()} == {("learner", "w/0")}


# -- records and keys ---------------------------------------------------------------------------------------------
def test_records_hold_numpy_numbers_and_no_nan() -> None:
    numbers = {"a": np.float32(0.5), "b": np.int64(3), "c": np.array([1, 2])}
    body = to_json({**numbers, "d": [math.nan, -math.inf], "e": (1,)})
    fields = from_json(body, "key", dict)
    assert fields == {"schema_version": 2, "a": 0.5, "b": 3, "c": [1, 2], "d": [None, "-Infinity"], "e": [1]}
    with pytest.raises(StorageError, match=r"a object .* cannot be stored as JSON"):
        to_json({"a": object()})


def test_records_of_a_newer_version_are_refused() -> None:
    with pytest.raises(StorageError, match="key has schema version 3, this code reads up to 2"):
        from_json(b'{"schema_version": 3}', "key", dict)
    with pytest.raises(ShardCorruptError, match="key is not a readable record"):
        from_json(b'{"schema_version": "x"}', "key", dict)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "..", "a.b c", "ü", "%2E"])
def test_names_survive_being_part_of_a_key(name: str) -> None:
    part = encode_name(name)
    assert not set(part) & set("/. ")
    assert unquote(part) == name


def test_empty_names_are_refused() -> None:
    with pytest.raises(StorageError, match="empty name"):
        encode_name("")


def test_keys_are_taken_apart_as_they_were_built() -> None:
    layout = RunLayout("run")
    shard, version = IndexRange(1_000_000, 2_000_000), PolicyVersion(1_234_567, 12)
    assert parse_shard(layout.shard_manifest(layout.trajectories, shard)) == shard
    assert parse_shard(layout.shard_object(layout.trajectories, shard)) is None
    assert parse_version(layout.key("policy", state=version)) == version
    assert parse_version(layout.key("policy.data", number=1_234_567, rewind=12, coding="delta")) is None
    assert parse(layout.key("claim", stage="score.a/b", shard=shard, attempt=3)).fields == {
        "stage": "score.a/b",
        "shard": shard,
        "attempt": 3,
    }
