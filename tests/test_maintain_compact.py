"""Compaction: fewer objects, the same indices, and readers that never notice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import maintain_runs
import pytest
from storage_builders import (
    STORE_KINDS,
    assert_same,
    fresh_log,
    fresh_store,
    make_scores,
    make_step,
    make_trajectories,
    make_trajectory,
    reopened,
)

from asyncopd.types import IndexRange
from flows.wiring import OpenRun
from storage.compact import compact_run
from storage.maintain.audit import audit_run
from storage.maintain.collect import collect_run
from storage.manifests import ROW_GROUP
from storage.run_log import StoredRunLog
from storage.stores import open_store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return asyncio.run(maintain_runs.finished_run(tmp_path_factory.mktemp("compact")))


def trained_log(kind: str, folder: Path, num_steps: int = 6) -> StoredRunLog:
    """Steps of 4 indices in shards of 2, with one checkpoint, after the last step but one."""
    log = maintain_runs.new_log(fresh_store(kind, folder))
    maintain_runs.train(log, 0, num_steps, checkpoint_every=num_steps - 1)
    return log


def data_keys(log: StoredRunLog) -> list[str]:
    return [key for key in log.store.list(log.layout.root) if key.endswith(".parquet")]


@pytest.mark.parametrize("kind", STORE_KINDS)
def test_every_shard_reads_the_same_after_compaction_and_after_its_old_object_is_gone(
    kind: str, tmp_path: Path
) -> None:
    log = trained_log(kind, tmp_path)
    before = data_keys(log)
    report = compact_run(log.store, log.run_id, max_rows=8)
    # Steps 0 to 4 lie before the checkpoint: 10 shards of trajectories and of scores, four to an object.
    assert (report.num_shards, report.num_objects) == (20, 6)
    assert log.trajectory_shards() == log.score_shards("oracle") == [IndexRange(i, i + 2) for i in range(0, 24, 2)]
    for grace_s in (3600.0, 0.0):
        collect_run(log.store, log.run_id, grace_s=grace_s, now=time.time() + 1)
        assert set(before) <= set(data_keys(log)) or grace_s == 0
        other = reopened(log)
        for shard in other.trajectory_shards():
            assert_same(other.read_trajectories(shard), make_trajectories(shard))
            assert_same(other.read_scores("oracle", shard), [make_scores(row) for row in make_trajectories(shard)])
    assert len(data_keys(log)) == 6 + 4
    assert not compact_run(log.store, log.run_id, max_rows=8).num_objects, "what is compacted stays as it is"


def test_a_reader_with_an_old_manifest_in_its_hand_reads_the_new_one(tmp_path: Path) -> None:
    log = trained_log("file", tmp_path)
    shard = IndexRange(0, 2)
    key = log.layout.shard_manifest(log.layout.trajectories, shard)
    old = log.store.get(key)
    compact_run(log.store, log.run_id)
    collect_run(log.store, log.run_id, grace_s=0, now=time.time() + 1)
    new = log.store.get(key)

    class LateStore(type(log.store)):  # type: ignore[misc]
        """Answers the first read of the manifest with what it was before."""

        asked = 0

        def find(self, asked_key: str) -> bytes | None:
            if asked_key == key:
                self.asked += 1
                return old if self.asked == 1 else new
            return super().find(asked_key)

    late = StoredRunLog(LateStore(log.store.url), log.run_id)
    assert_same(late.read_trajectories(shard), make_trajectories(shard))


def test_shards_without_rows_or_with_dropped_indices_keep_their_meaning(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    for start, dropped in ((0, {}), (2, {2: "too long"}), (4, {4: "a", 5: "b"}), (6, {})):
        shard = IndexRange(start, start + 2)
        rows = [make_trajectory(index) for index in shard.indices if index not in dropped]
        log.publish_trajectories(shard, rows, worker="w", facts={"dropped": dropped} if dropped else {})
    for step in range(2):
        log.publish_step(make_step(step))
    log.publish_checkpoint(2, 0, {"model": b"m"}, worker="w")
    compact_run(log.store, log.run_id)
    rows_of = [[row.index for row in log.read_trajectories(IndexRange(s, s + 2))] for s in (0, 2, 4, 6)]
    assert rows_of == [[0, 1], [3], [], [6, 7]]
    manifest = log.find_trajectories(IndexRange(2, 4))
    assert manifest is not None
    assert (manifest.facts[ROW_GROUP], manifest.facts["dropped"]) == (1, {2: "too long"})


def test_what_a_resume_would_read_is_left_alone(tmp_path: Path) -> None:
    log = trained_log("file", tmp_path)
    compact_run(log.store, log.run_id)
    late = log.find_trajectories(IndexRange(20, 22))
    assert late is not None
    assert ROW_GROUP not in late.facts


def test_a_compacted_run_is_audited_as_clean(run: OpenRun, tmp_path: Path) -> None:
    log = maintain_runs.copy_of(run, tmp_path / "copy")
    assert compact_run(log.store, log.run_id).num_shards == 16
    assert audit_run(log.store, log.run_id, recheck_s=0).is_clean
    collect_run(log.store, log.run_id, grace_s=0, now=time.time() + 1)
    assert audit_run(log.store, log.run_id, recheck_s=0, grace_s=0).is_clean
    ((data_key, _),) = log.find_trajectories(IndexRange(0, 4)).objects.items()  # type: ignore[union-attr]
    log.store.put(data_key, b"x")
    assert len(audit_run(log.store, log.run_id, recheck_s=0).findings) == 8, "one for each shard it held"


def test_a_reader_in_another_process_finds_every_range_at_every_moment(tmp_path: Path) -> None:
    log = trained_log("file", tmp_path, num_steps=30)
    script = """
import sys, time
from storage.maintain.collect import collect_run
from storage.compact import compact_run
from storage.stores import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for max_rows in (8, 16, 64):
    compact_run(store, "run", max_rows=max_rows)
    collect_run(store, "run", grace_s=0, now=time.time() + 1)  # no grace at all: the hardest case
print("done", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, log.store.url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    before = set(data_keys(log))
    expected = {shard: make_trajectories(shard) for shard in log.trajectory_shards()}
    process.stdin.write("go\n")
    process.stdin.flush()
    num_rounds = 0
    while process.poll() is None or num_rounds == 0:
        reader = StoredRunLog(open_store(log.store.url), "run")
        assert reader.trajectory_shards() == list(expected)
        for shard, rows in expected.items():
            assert_same(reader.read_trajectories(shard), rows)
            assert_same(reader.read_scores("oracle", shard), [make_scores(row) for row in rows])
        num_rounds += 1
    assert process.wait() == 0
    assert process.stdout.read() == "done\n"
    process.stdin.close()
    process.stdout.close()
    assert len(data_keys(log)) < len(before) / 2
