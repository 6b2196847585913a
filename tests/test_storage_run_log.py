"""Shards of a run: first complete manifest wins, readers verify, and the three kinds of store behave alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage_builders import (
    STORE_KINDS,
    assert_same,
    fresh_log,
    make_evaluation,
    make_scores,
    make_step,
    make_trajectories,
    make_trajectory,
    make_weights,
    memory_log,
    reopened,
)

from asyncopd.errors import ObjectMissingError, ShapeError, ShardCorruptError
from asyncopd.ports import RunLog
from asyncopd.records import Facts
from asyncopd.types import IndexRange, PolicyVersion
from storage.manifests import quarantine
from storage.records import to_json
from storage.run_log import StoredRunLog

SHARD = IndexRange(8, 12)


def published(log: StoredRunLog) -> tuple[str, str]:
    """Publish trajectories of SHARD; returns the keys of manifest and data."""
    assert log.publish_trajectories(SHARD, make_trajectories(SHARD), worker="w")
    manifest = log.find_trajectories(SHARD)
    assert manifest is not None
    (data_key,) = manifest.objects
    return log.layout.shard_manifest(log.layout.trajectories, SHARD), data_key


@pytest.mark.parametrize("kind", STORE_KINDS)
def test_a_run_reads_the_same_from_every_kind_of_store(kind: str, tmp_path: Path) -> None:
    log: RunLog = fresh_log(kind, tmp_path)
    assert isinstance(log, StoredRunLog)
    assert log.find_trajectories(SHARD) is None
    assert log.latest_policy() is None
    rows = make_trajectories(SHARD)
    scores = [make_scores(row) for row in rows]
    log.publish_policy(make_weights(0), worker="learner")
    assert log.claim("rollout", SHARD, worker="w", lease_s=9)
    assert log.publish_trajectories(SHARD, rows[::-1], worker="w", facts=Facts(seconds=1.5))
    assert log.publish_scores("oracle", SHARD, scores, worker="t")
    log.publish_step(make_step(0))
    log.publish_policy(make_weights(1), worker="learner")
    log.publish_checkpoint(1, 0, {"model.safetensors": b"m", "optimizer.pt": b"o"}, worker="learner")
    log.publish_evaluation(make_evaluation(1))

    other = reopened(log)
    assert_same(other.read_trajectories(SHARD), rows)
    assert_same(other.read_scores("oracle", SHARD), scores)
    assert other.latest_policy() == PolicyVersion(1, 0)
    assert other.read_policy(PolicyVersion(1, 0)) == make_weights(1)
    assert other.find_step(0) == make_step(0)
    assert other.latest_checkpoint() == (1, 0)
    assert other.read_checkpoint(1, 0) == {"model.safetensors": b"m", "optimizer.pt": b"o"}
    assert other.evaluations() == [make_evaluation(1)]
    assert not other.claim("rollout", SHARD, worker="other", lease_s=9)
    assert other.trajectory_shards() == other.score_shards("oracle") == [SHARD]
    assert other.teachers() == ["oracle"]


def test_a_manifest_tells_what_its_shard_holds() -> None:
    log = memory_log()
    rows = [make_trajectory(index, num_tokens=2, version=index) for index in SHARD.indices]
    log.publish_trajectories(SHARD, rows, worker="w", facts=Facts(seconds=2.5, num_rows=1_000))  # not its to say
    manifest = log.find_trajectories(SHARD)
    assert manifest is not None
    assert (manifest.kind, manifest.worker) == ("trajectories", "w")
    assert manifest.facts == Facts(
        seconds=2.5,
        num_rows=4,
        num_tokens=8,
        index_range=(8, 12),
        version_first=8,
        version_last=12,
        parquet_schema_version=1,
    )


# -- races --------------------------------------------------------------------------------------------------------
def test_the_second_publisher_leaves_nothing_behind() -> None:
    log = memory_log()
    published(log)
    before = log.store.list("runs")
    other = [make_trajectory(index, num_tokens=9) for index in SHARD.indices]
    assert not reopened(log).publish_trajectories(SHARD, other, worker="late")
    assert log.store.list("runs") == before
    assert_same(log.read_trajectories(SHARD), make_trajectories(SHARD))


@pytest.mark.parametrize("kind", STORE_KINDS)
def test_of_concurrent_publishers_one_wins_and_the_rest_clean_up(kind: str, tmp_path: Path) -> None:
    log = fresh_log(kind, tmp_path)
    barrier = threading.Barrier(6)

    def publish(number: int) -> bool:
        rows = [make_trajectory(index, num_tokens=1 + number) for index in SHARD.indices]
        mine = reopened(log)
        barrier.wait()
        return mine.publish_trajectories(SHARD, rows, worker=f"w{number}")

    with ThreadPoolExecutor(6) as threads:
        won = list(threads.map(publish, range(6)))
    assert won.count(True) == 1
    assert len(log.store.list(log.layout.trajectories)) == 2
    assert {len(row.response_ids) for row in log.read_trajectories(SHARD)} == {1 + won.index(True)}


def test_data_without_a_manifest_is_invisible() -> None:
    # What a writer killed before its last line leaves.
    log = memory_log()
    manifest_key, _ = published(log)
    log.store.delete(manifest_key)
    assert log.find_trajectories(SHARD) is None
    assert log.trajectory_shards() == []
    with pytest.raises(ObjectMissingError, match=r"trajectories/000008-000011.json does not exist"):
        log.read_trajectories(SHARD)
    published(log)


# -- dropped indices ----------------------------------------------------------------------------------------------
def test_dropped_indices_have_a_reason_instead_of_a_row() -> None:
    log = memory_log()
    rows = [make_trajectory(8), make_trajectory(11)]
    dropped = {9: "ifd above 1", 10: "too long"}
    log.publish_trajectories(SHARD, rows, worker="w", facts=Facts(dropped=dropped))
    manifest = reopened(log).find_trajectories(SHARD)
    assert manifest is not None
    assert manifest.facts.dropped == dropped
    assert [row.index for row in log.read_trajectories(SHARD)] == [8, 11]


def test_scores_follow_the_trajectories_that_were_dropped() -> None:
    log = memory_log()
    rows = [make_trajectory(8), make_trajectory(11)]
    log.publish_trajectories(SHARD, rows, worker="w", facts=Facts(dropped={9: "a", 10: "b"}))
    log.publish_scores("oracle", SHARD, [make_scores(row) for row in rows], worker="t")
    manifest = log.find_scores("oracle", SHARD)
    assert manifest is not None
    assert manifest.facts.dropped == {9: "a", 10: "b"}
    assert [row.index for row in log.read_scores("oracle", SHARD)] == [8, 11]


def test_a_scorer_may_drop_more() -> None:
    log = memory_log()
    rows = [make_trajectory(8), make_trajectory(10), make_trajectory(11)]
    log.publish_trajectories(SHARD, rows, worker="w", facts=Facts(dropped={9: "a"}))
    log.publish_scores("oracle", SHARD, [make_scores(rows[0])], worker="t", facts=Facts(dropped={10: "b", 11: "c"}))
    manifest = log.find_scores("oracle", SHARD)
    assert manifest is not None
    assert manifest.facts.dropped == {9: "a", 10: "b", 11: "c"}


def test_a_shard_may_be_dropped_as_a_whole() -> None:
    log = memory_log()
    log.publish_trajectories(SHARD, [], worker="w", facts=Facts(dropped=dict.fromkeys(SHARD.indices, "no")))
    assert log.read_trajectories(SHARD) == []


@pytest.mark.parametrize(
    ("indices", "dropped"), [([8, 9, 10], {}), ([8, 9, 10, 11], {11: "x"}), ([8, 9, 10, 12], {}), ([8, 8, 9, 10], {})]
)
def test_rows_and_dropped_indices_must_add_up(indices: list[int], dropped: dict[int, str]) -> None:
    log = memory_log()
    rows = [make_trajectory(index) for index in indices]
    with pytest.raises(ShapeError, match=r"shard 000008-000011: rows for.*do not add up"):
        log.publish_trajectories(SHARD, rows, worker="w", facts=Facts(dropped=dropped))
    with pytest.raises(ShapeError, match="do not add up"):
        log.publish_scores("t", SHARD, [make_scores(row) for row in rows], worker="w", facts=Facts(dropped=dropped))


# -- damage -------------------------------------------------------------------------------------------------------
def _flip(body: bytes) -> bytes:
    return body[:100] + bytes([body[100] ^ 1]) + body[101:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, r"sha256 \w{12} does not match the manifest's \w{12}"),
        (lambda body: body[:-1], r"found \d+ bytes, the manifest expects \d+"),
        (lambda body: b"", r"found 0 bytes, the manifest expects \d+"),
    ],
)
def test_damaged_data_is_named_and_explained(damage: Callable[[bytes], bytes], message: str) -> None:
    log = memory_log()
    manifest_key, data_key = published(log)
    log.store.put(data_key, damage(log.store.get(data_key)))
    with pytest.raises(ShardCorruptError, match=f"{data_key}: {message}.*maintain quarantine {manifest_key}"):
        log.read_trajectories(SHARD)


def test_deleted_data_is_named_and_explained() -> None:
    log = memory_log()
    manifest_key, data_key = published(log)
    log.store.delete(data_key)
    with pytest.raises(ObjectMissingError, match=rf"{data_key} does not exist.*manifest {manifest_key} promises \d+"):
        log.read_trajectories(SHARD)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"schema_version": 1}'])
def test_a_damaged_manifest_is_named(body: bytes) -> None:
    log = memory_log()
    manifest_key, _ = published(log)
    log.store.put(manifest_key, body)
    with pytest.raises(ShardCorruptError, match=f"{manifest_key} is not a readable record"):
        log.find_trajectories(SHARD)


def test_a_manifest_of_another_shard_is_noticed() -> None:
    log = memory_log()
    manifest_key, _ = published(log)
    elsewhere = IndexRange(12, 16)
    log.store.put(log.layout.shard_manifest(log.layout.trajectories, elsewhere), log.store.get(manifest_key))
    with pytest.raises(ShardCorruptError, match=r"found 4 rows for indices \[8, 9, 10, 11\]"):
        log.read_trajectories(elsewhere)


def test_a_manifest_that_does_not_cover_its_range_is_noticed() -> None:
    log = memory_log()
    manifest_key, _ = published(log)
    fields = json.loads(log.store.get(manifest_key))
    fields["facts"]["dropped"] = {"8": "dropped and present"}
    log.store.put(manifest_key, to_json(fields))
    with pytest.raises(ShardCorruptError, match=r"without dropped \[8\]"):
        log.read_trajectories(SHARD)


def test_a_quarantined_shard_can_be_published_again() -> None:
    log = memory_log()
    manifest_key, data_key = published(log)
    log.store.put(data_key, b"damaged")
    moved = quarantine(log.store, manifest_key)
    assert log.find_trajectories(SHARD) is None
    assert log.store.exists(moved)
    published(log)
    assert_same(log.read_trajectories(SHARD), make_trajectories(SHARD))
    assert log.trajectory_shards() == [SHARD]


@pytest.mark.parametrize("noun", ["policy", "checkpoint"])
def test_damaged_weights_are_named(noun: str) -> None:
    log = memory_log()
    log.publish_policy(make_weights(3), worker="w")
    log.publish_checkpoint(3, 0, {"model": b"weights"}, worker="w")
    folder = log.layout.folder("policy") if noun == "policy" else log.layout.folder("checkpoint")
    (key,) = [key for key in log.store.list(folder) if not key.endswith(".json")]
    log.store.put(key, b"w" * len(log.store.get(key)))
    with pytest.raises(ShardCorruptError, match=f"{key}: sha256"):
        log.read_policy(PolicyVersion(3)) if noun == "policy" else log.read_checkpoint(3, 0)
