"""The relations say what the run log says: same rows, same numbers, the same lineage, on every kind of store."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from catalog_builders import SIZE, ask, scored, written_log
from query_log import write_log
from storage_builders import (
    STORE_KINDS,
    fresh_log,
    fresh_store,
    make_evaluation,
    make_scores,
    make_step,
    make_trajectories,
    make_weights,
)

from asyncopd.errors import ObjectMissingError, StorageError
from asyncopd.records import Facts
from asyncopd.types import IndexRange, VersionRun
from storage.catalog import relations
from storage.catalog.relations import RECORDS, RELATIONS, closure, mentioned
from storage.catalog.rows import AsOf
from storage.catalog.snapshot import Catalog
from storage.manifests import publish, quarantine
from storage.parquet import encode_trajectories
from storage.run_log import StoredRunLog

FIRST, SECOND = IndexRange(0, 4), IndexRange(4, 8)


def publish_shard(log: StoredRunLog, shard: IndexRange) -> None:
    trajectories = make_trajectories(shard)
    log.publish_trajectories(shard, trajectories, worker="w")
    log.publish_scores("oracle", shard, [make_scores(t) for t in trajectories], worker="w")


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_every_column_of_every_relation_is_documented(relation) -> None:
    catalog = Catalog(written_log().store)
    described = ask(catalog, f"DESCRIBE {relation.name}")
    assert [row[0] for row in described] == [field.name for field in relation.fields]
    comments = ask(catalog, f"SELECT \"column\", meaning FROM documentation WHERE relation = '{relation.name}'")
    assert comments == [(field.name, field.doc) for field in relation.fields]
    assert all(len(doc) > 3 for _, doc in comments)


def test_every_line_of_the_records_file_is_read() -> None:
    # It is taken apart by its layout; a line of another layout would be a column that is silently not there.
    lines = (Path(relations.__file__).parent / "records.sql").read_text().splitlines()
    columns = [line.split()[0] for line in lines if line.startswith(" ")]
    own = [relation for relation in RECORDS if relation.name != "superseded_steps"]
    assert columns == [field.name for relation in own for field in relation.fields]
    assert sum(line.startswith("CREATE") for line in lines) == len(RECORDS)


def test_tokens_are_the_trajectories_taken_apart() -> None:
    log = written_log()
    columns = "index, position, token_id, version, behaviour_logprob, teacher_logprob, step, staleness"
    found = ask(Catalog(log.store), f"SELECT {columns} FROM tokens ORDER BY index, position")
    expected = []
    for pair in scored(log):
        t, s, step = pair.trajectory, pair.scores, pair.trajectory.index // SIZE.batch_size
        per_token = zip(t.response_ids, t.versions_T, t.behaviour_logprobs_T, s.sampled_logprobs_T, strict=True)
        for position, (token, version, student, teacher) in enumerate(per_token):
            row = (t.index, position, int(token), int(version), float(student), float(teacher), step)
            expected.append((*row, step - int(version)))
    assert found == expected
    assert len({row[3] for row in found}) > 3  # versions really differ, within responses too


def test_candidates_are_the_flat_lists_taken_apart() -> None:
    log = written_log()
    columns = "source, index, position, rank, token_id, student_logprob, teacher_logprob"
    found = ask(Catalog(log.store), f"SELECT {columns} FROM candidates ORDER BY source, index, position, rank")
    expected = []
    for pair in scored(log):
        c, s = pair.trajectory.candidates, pair.scores
        for source, ids, student, teacher in (
            ("head", c.head_ids_TK, c.head_logprobs_TK, s.head_logprobs_TK),
            ("draw", c.draw_ids_TN, c.draw_logprobs_TN, s.draw_logprobs_TN),
            ("topk", s.topk_ids_TK, None, s.topk_logprobs_TK),
        ):
            for (t, k), token in np.ndenumerate(ids):
                own = None if student is None else float(student[t, k])
                expected.append((source, pair.trajectory.index, t, k, int(token), own, float(teacher[t, k])))
    assert found == sorted(expected, key=lambda row: row[:4])


def test_a_new_shard_appears_without_opening_the_catalog_again(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    catalog = Catalog(log.store)
    assert ask(catalog, "SELECT count(*) FROM trajectories") == [(0,)]
    publish_shard(log, FIRST)
    assert ask(catalog, "SELECT count(*) FROM trajectories") == [(4,)]
    publish_shard(log, SECOND)
    assert ask(catalog, "SELECT count(*), count(teacher_logprob) > 0 FROM tokens JOIN trajectories USING (index)")
    assert ask(catalog, "SELECT count(DISTINCT index) FROM tokens WHERE teacher_logprob IS NOT NULL") == [(8,)]


def test_a_shard_without_its_manifest_is_not_there(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    publish_shard(log, FIRST)
    half = encode_trajectories(make_trajectories(SECOND), log.run_id)
    log.store.put(log.layout.shard_object(log.layout.trajectories, SECOND), half)
    catalog = Catalog(log.store)
    assert ask(catalog, "SELECT count(*), max(index) FROM trajectories") == [(4, 3)]
    quarantine(log.store, log.layout.shard_manifest(log.layout.trajectories, FIRST))
    assert ask(catalog, "SELECT count(*) FROM trajectories") == [(0,)]


@pytest.mark.parametrize("kind", STORE_KINDS)
def test_all_stores_give_the_same_answer(kind: str, tmp_path: Path) -> None:
    store = fresh_store(kind, tmp_path)
    write_log(store, "first", dataclasses.replace(SIZE, num_tokens=200), seed=3)
    catalog = Catalog(store)
    sql = "SELECT run, round(sum(kl_nats), 6), count(*), max(staleness) FROM tokens GROUP BY run"
    assert ask(catalog, sql) == ask(reference_catalog(tmp_path), sql)
    assert ask(catalog, "SELECT count(*) FROM claims, evals")[0][0] > 0


def reference_catalog(tmp_path: Path) -> Catalog:
    store = fresh_store("file", tmp_path / "reference")
    write_log(store, "first", dataclasses.replace(SIZE, num_tokens=200), seed=3)
    return Catalog(store)


def test_runs_of_one_root_are_told_apart(tmp_path: Path) -> None:
    store = fresh_store("file", tmp_path)
    for seed, name in enumerate(("one", "two")):
        write_log(store, name, dataclasses.replace(SIZE, num_tokens=100), seed=seed)
    sql = "SELECT run, count(*) FROM tokens GROUP BY run ORDER BY run"
    both = ask(Catalog(store), sql)
    assert [run for run, _ in both] == ["one", "two"]
    assert ask(Catalog(store, ["two"]), sql) == both[1:]
    with pytest.raises(ObjectMissingError, match="three"):
        Catalog(store, ["three"])


def test_files_of_the_previous_schema_are_read_beside_new_ones(tmp_path: Path) -> None:
    # Schema 0, as it might have been: no groups, no draws, candidates not yet stored; top-k in half precision.
    log = fresh_log("file", tmp_path)
    publish_previous_schema(log, FIRST)
    publish_shard(log, SECOND)
    catalog = Catalog(log.store)
    rows = ask(catalog, "SELECT index, prompt_group, draw_law, num_tokens FROM trajectories ORDER BY index")
    assert [row[:3] for row in rows[:4]] == [(i, None, None) for i in range(4)]
    assert [row[:3] for row in rows[4:]] == [(i, "easy", "tail") for i in range(4, 8)]
    sql = "SELECT sum(behaviour_logprob), sum(teacher_logprob) FROM tokens WHERE index < 4"
    student, teacher = ask(catalog, sql)[0]
    assert student == pytest.approx(sum(t.behaviour_logprobs_T.sum() for t in make_trajectories(FIRST)), abs=1e-4)
    assert teacher == pytest.approx(
        sum(make_scores(t).sampled_logprobs_T.sum() for t in make_trajectories(FIRST)), abs=1e-4
    )
    halves = ask(
        catalog, "SELECT index < 4, count(*), sum(teacher_logprob) FROM candidates WHERE source = 'topk' GROUP BY 1"
    )
    for is_old, count, total in halves:
        values = [make_scores(t).topk_logprobs_TK for t in make_trajectories(FIRST if is_old else SECOND)]
        assert count == sum(value.size for value in values)
        assert total == pytest.approx(sum(float(value.sum()) for value in values), abs=0.05)


def publish_previous_schema(log: StoredRunLog, shard: IndexRange) -> None:
    """What the writer of an older code version left: fewer columns, float16 top-k, no version in the facts."""
    gone = {
        "prompt_group",
        "head_k",
        "head_ids",
        "head_logprobs",
        "tail_logmass",
        "num_draws",
        "draw_ids",
        "draw_logprobs",
        "draw_law",
    }
    table = pq.read_table(pa.BufferReader(encode_trajectories(make_trajectories(shard), log.run_id)))
    old = table.drop_columns(sorted(gone)).replace_schema_metadata({"schema_version": "0", "kind": "trajectories"})
    trajectories = pa.BufferOutputStream()
    pq.write_table(old, trajectories)
    facts = Facts(num_rows=len(shard), index_range=(shard.start, shard.stop))
    folder = log.layout.trajectories
    objects = {log.layout.shard_object(folder, shard): bytes(trajectories.getvalue())}
    publish(
        log.store, log.layout.shard_manifest(folder, shard), objects, kind="trajectories", worker="old", facts=facts
    )
    halved = StoredRunLog(log.store, log.run_id, topk_precision="float16")
    rows = [make_scores(t) for t in make_trajectories(shard)]
    halved.publish_scores("oracle", shard, rows, worker="old")


def test_files_of_a_newer_schema_are_refused_by_name(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    folder, facts = log.layout.trajectories, Facts(num_rows=4, parquet_schema_version=99)
    body = encode_trajectories(make_trajectories(FIRST), log.run_id)
    key = log.layout.shard_manifest(folder, FIRST)
    publish(log.store, key, {log.layout.shard_object(folder, FIRST): body}, kind="trajectories", worker="", facts=facts)
    with pytest.raises(StorageError, match="version 99"):
        ask(Catalog(log.store), "SELECT count(*) FROM trajectories")
    assert ask(Catalog(log.store), "SELECT count(*) FROM runs") == [(1,)]


def test_steps_of_an_abandoned_lineage_are_kept_apart() -> None:
    log = fresh_log("memory", Path())
    for number in range(4):
        log.publish_step(make_step(number))
        log.publish_evaluation(make_evaluation(number + 1))
        log.publish_policy(make_weights(number + 1), worker="w")
    log.record_rewind(2, worker="w")
    log.publish_step(make_step(2, rewind=1, metrics={"train/seconds": 2.0}))
    log.publish_policy(make_weights(3, rewind=1, body=b"other"), worker="w")
    catalog = Catalog(log.store)
    assert ask(catalog, "SELECT step, rewind FROM steps ORDER BY 1") == [(0, 0), (1, 0), (2, 1)]
    assert ask(catalog, "SELECT step, rewind FROM superseded_steps ORDER BY 1") == [(2, 0), (3, 0)]
    assert ask(catalog, "SELECT version, rewind FROM policies ORDER BY 1") == [(1, 0), (2, 0), (3, 1)]
    assert ask(catalog, "SELECT version FROM evals ORDER BY 1") == [(1,), (2,)]
    assert ask(catalog, "SELECT rewind, to_step FROM rewinds") == [(1, 2)]


def test_a_dropped_index_counts_once_and_is_not_trained(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    kept = [t for t in make_trajectories(FIRST) if t.index not in (0, 1)]
    dropped = {0: "too long", 1: "no answer"}
    log.publish_trajectories(FIRST, kept, worker="w", facts=Facts(dropped=dropped))
    log.publish_scores("oracle", FIRST, [make_scores(kept[0])], worker="w", facts=Facts(dropped={3: "teacher refused"}))
    log.publish_step(dataclasses.replace(make_step(0), dropped={2: "held too long"}))
    catalog = Catalog(log.store)
    assert ask(catalog, "SELECT index, stage, reason FROM dropped ORDER BY index") == [
        (0, "rollout", "too long"),
        (1, "rollout", "no answer"),
        (2, "learn", "held too long"),
        (3, "score", "teacher refused"),
    ]
    assert ask(catalog, "SELECT index FROM trained_indices ORDER BY 1") == [(0,), (1,), (3,)]


def test_as_of_shows_the_log_as_it_was(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    log.publish_policy(make_weights(0), worker="w")
    publish_shard(log, FIRST)
    log.publish_policy(make_weights(1), worker="w")
    log.publish_step(dataclasses.replace(make_step(0), finished=time.time()))
    between = time.time()
    time.sleep(0.01)
    publish_shard(log, SECOND)
    log.publish_policy(make_weights(2), worker="w")
    log.publish_step(dataclasses.replace(make_step(1), finished=time.time()))
    catalog = Catalog(log.store)
    sql = (
        "SELECT (SELECT count(*) FROM trajectories), (SELECT count(*) FROM steps), (SELECT max(version) FROM policies)"
    )
    assert ask(catalog, sql) == [(8, 2, 2)]
    assert ask(catalog, sql, as_of=AsOf(version=1)) == [(4, 1, 1)]
    assert ask(catalog, sql, as_of=AsOf(time=between)) == [(4, 1, 1)]
    assert ask(catalog, sql, as_of=AsOf(version=0)) == [(0, 0, 0)]
    with pytest.raises(StorageError, match="version 9"):
        ask(catalog, sql, as_of=AsOf(version=9))
    with pytest.raises(StorageError, match="exactly one"):
        AsOf(version=1, time=2.0)


def test_scores_of_a_second_teacher_do_not_multiply_tokens(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    publish_shard(log, FIRST)
    other = [dataclasses.replace(make_scores(t), teacher="zweiter") for t in make_trajectories(FIRST)]
    log.publish_scores("zweiter", FIRST, other, worker="w")
    catalog = Catalog(log.store)
    num_tokens = sum(len(t.response_ids) for t in make_trajectories(FIRST))
    assert ask(catalog, "SELECT count(*) FROM tokens") == [(num_tokens,)]
    assert ask(catalog, "SELECT teacher, count(*) FROM scores GROUP BY 1 ORDER BY 1") == [("oracle", 4), ("zweiter", 4)]


def test_wider_scores_of_the_same_teacher_do_not_multiply_tokens_either(tmp_path: Path) -> None:
    # A back-fill of top-k or candidates keeps the teacher's name in its rows; `tokens` once had every token twice.
    log = fresh_log("file", tmp_path)
    publish_shard(log, FIRST)
    again = [make_scores(t) for t in make_trajectories(FIRST)]
    log.publish_scores("oracle@top8", FIRST, again, worker="w")
    log.publish_scores("oracle@head2", FIRST, again, worker="w", facts=Facts(candidates="head2"))
    catalog = Catalog(log.store)
    num_tokens = sum(len(t.response_ids) for t in make_trajectories(FIRST))
    assert ask(catalog, "SELECT count(*), count(teacher_logprob) FROM tokens") == [(num_tokens, num_tokens)]
    columns = "folder, origin, candidates_from, teacher, count(*)"
    assert ask(catalog, f"SELECT {columns} FROM scores GROUP BY ALL ORDER BY folder") == [
        ("oracle", "run", "trajectories", "oracle", 4),
        ("oracle@head2", "backfill", "head2", "oracle", 4),
        ("oracle@top8", "backfill", "trajectories", "oracle", 4),
    ]
    # Scores of back-filled candidates speak of other ids than those the trajectory has, so they are not paired.
    found = ask(catalog, "SELECT source, folder, count(*) FROM candidates GROUP BY ALL ORDER BY source, folder")
    assert {(source, folder) for source, folder, _ in found} == {
        ("draw", "oracle"),
        ("draw", "oracle@top8"),
        ("head", "oracle"),
        ("head", "oracle@top8"),
        ("teacher_draw", "oracle"),
        ("teacher_draw", "oracle@head2"),
        ("teacher_draw", "oracle@top8"),
        ("topk", "oracle"),
        ("topk", "oracle@head2"),
        ("topk", "oracle@top8"),
    }
    assert len({count for source, _, count in found if source == "head"}) == 1
    # What a question about the run's own scores does not need is not opened: here it is gone.
    (gone,) = log.find_scores("oracle@top8", FIRST).objects
    log.store.delete(gone)
    assert ask(catalog, "SELECT count(*), count(teacher_logprob) FROM tokens") == [(num_tokens, num_tokens)]


def test_each_token_has_its_own_version_however_often_weights_changed(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    trajectory = max(make_trajectories(FIRST), key=lambda t: len(t.response_ids))
    num_tokens = len(trajectory.response_ids)
    assert num_tokens >= 4
    runs = (VersionRun(3, 1), VersionRun(5, 1), VersionRun(6, num_tokens - 3), VersionRun(9, 1))
    dropped = {index: "test" for index in FIRST.indices if index != trajectory.index}
    replaced = dataclasses.replace(trajectory, version_runs=runs)
    log.publish_trajectories(FIRST, [replaced], worker="w", facts=Facts(dropped=dropped))
    found = ask(Catalog(log.store), "SELECT position, version, token_id, teacher_logprob FROM tokens ORDER BY position")
    versions = [3, 5, *[6] * (num_tokens - 3), 9]
    assert found == [(i, versions[i], int(trajectory.response_ids[i]), None) for i in range(num_tokens)]


def test_only_what_a_query_names_is_read() -> None:
    assert mentioned("select num_tokens from shards") == {"shards"}
    assert mentioned('SELECT * FROM "Tokens"') == closure(["tokens"])
    assert "trajectory_rows" in closure(["tokens"])
    snapshot = Catalog(written_log().store).snapshot(mentioned("select * from steps"))
    assert set(snapshot.tables) == {"steps"}
    assert snapshot.files == {}


def test_token_ids_read_as_the_tasks_own_tokenizer_shows_them() -> None:
    log = written_log()
    first = scored(log)[0].trajectory
    sql = "SELECT text_of(run, response_ids) FROM trajectories WHERE index = 0"
    words = dict(ask(Catalog(log.store), "SELECT token_id, text FROM vocabulary"))
    assert ask(Catalog(log.store), sql) == [(" ".join(words[int(i)] for i in first.response_ids),)]
    classes = dict(ask(Catalog(log.store), "SELECT text, class FROM vocabulary"))
    assert (classes["<eos>"], classes["+11"], classes["~0.35"], classes["30"]) == (
        "special",
        "operation",
        "noise",
        "state",
    )
