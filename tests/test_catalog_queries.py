"""Every stored question is answered, its header is true, and its numbers are those a slow way of counting gives."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalog_builders import SIZE, scored, written_log
from query_log import write_log
from storage_builders import fresh_log, fresh_store, make_step, make_trajectories

from asyncopd.errors import QueryError
from asyncopd.records import Facts
from asyncopd.types import IndexRange, Span
from storage.catalog.notebook import OpenedRun
from storage.catalog.stored_queries import find_query, stored_queries
from storage.run_log import StoredRunLog


def answers(name: str, log: StoredRunLog | None = None, **parameters: Any) -> list[dict[str, Any]]:
    return OpenedRun(log or written_log()).sql(name, parameters).rows()


@pytest.mark.parametrize("name", stored_queries())
def test_a_stored_query_answers_with_the_columns_its_header_promises(name: str) -> None:
    query = stored_queries()[name]
    table = OpenedRun(written_log()).sql(name).arrow()
    assert table.column_names == list(query.columns)
    assert table.num_rows > 0 or name == "cost_of_lost_work"  # nothing is lost in this log
    assert query.question.endswith("?")
    assert all(f"${parameter.name}" in query.sql for parameter in query.parameters)


def test_there_are_at_least_twelve_and_unknown_parameters_are_named() -> None:
    assert len(stored_queries()) >= 12
    assert find_query("kl-by-position") is stored_queries()["kl_by_position"]
    with pytest.raises(QueryError, match="no parameter widht; it has width"):
        answers("kl_by_position", widht=3)


def test_staleness_counts_every_trained_token_once() -> None:
    expected: Counter[int] = Counter()
    for step in written_log().steps():
        expected.update(step.staleness_tokens)
    rows = answers("staleness_by_step", every=10**6)
    assert {row["staleness"]: row["num_tokens"] for row in rows} == expected
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_kl_by_position_class_version_and_length_agree_with_numpy() -> None:
    by: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    words = {row["token_id"]: row["class"] for row in OpenedRun(written_log()).table("vocabulary").rows()}
    for pair in scored(written_log()):
        t = pair.trajectory
        kl_T = t.behaviour_logprobs_T - pair.scores.sampled_logprobs_T
        for position, (kl, token, version) in enumerate(zip(kl_T, t.response_ids, t.versions_T, strict=True)):
            by["position"][position // 8 * 8].append(kl)
            by["class"][words[int(token)]].append(kl)
            by["version"][int(version) // 10 * 10].append(kl)
            by["tokens_from"][2 ** int(np.log2(len(kl_T)))].append(kl)
    for name, key in (
        ("position", "position"),
        ("token_class", "class"),
        ("version", "version"),
        ("length", "tokens_from"),
    ):
        found = {row[key]: row["kl_nats"] for row in answers(f"kl_by_{name}")}
        assert found == pytest.approx({k: np.mean(v) for k, v in by[key].items()}, abs=1e-5), name


def test_covered_masses_agree_with_numpy() -> None:
    pairs = scored(written_log())
    topk_TK = np.concatenate([np.exp(pair.scores.topk_logprobs_TK) for pair in pairs])
    found = [row["mass"] for row in answers("teacher_mass_in_topk")]
    assert found == pytest.approx(topk_TK.cumsum(1).mean(0).tolist(), abs=1e-5)
    (row,) = answers("student_mass_in_head")
    student = np.concatenate([np.exp(pair.trajectory.candidates.head_logprobs_TK).sum(1) for pair in pairs])
    teacher = np.concatenate([np.exp(pair.scores.head_logprobs_TK).sum(1) for pair in pairs])
    assert (row["student_mass"], row["teacher_mass"]) == pytest.approx((student.mean(), teacher.mean()), abs=1e-5)
    assert row["num_tokens"] == len(student)


def test_a_back_fill_changes_no_answer_about_the_runs_own_teacher(tmp_path: Path) -> None:
    log = write_log(fresh_store("file", tmp_path), "first", SIZE, seed=1)
    asked = ("kl_by_position", "kl_by_length", "kl_by_version", "student_mass_in_head", "largest_disagreements")
    before = {name: answers(name, log) for name in asked}
    masses, own = answers("teacher_mass_in_topk", log), scored(log)
    for shard in log.trajectory_shards():
        rows = [pair.scores for pair in own if pair.trajectory.index in shard.indices]
        wider = [dataclasses.replace(row, sampled_logprobs_T=row.sampled_logprobs_T - 1) for row in rows]
        log.publish_scores("oracle@top8", shard, wider, worker="w")
    again = answers("teacher_mass_in_topk", log)
    after = {name: answers(name, log) for name in asked}
    after["masses"], before["masses"] = [row for row in again if row["folder"] == "oracle"], masses
    for name, rows in before.items():
        for row, found in zip(rows, after[name], strict=True):
            # Threads add in any order, so sums differ in their last bits; a second count would differ in the first.
            for column, value in row.items():
                is_real = isinstance(value, float)
                assert found[column] == (pytest.approx(value, rel=1e-9) if is_real else value), (name, column)
    assert {row["folder"] for row in again} == {"oracle", "oracle@top8"}


def test_the_largest_disagreement_is_shown_with_the_text_around_it() -> None:
    worst = max(
        scored(written_log()), key=lambda p: (p.trajectory.behaviour_logprobs_T - p.scores.sampled_logprobs_T).max()
    )
    kl_T = worst.trajectory.behaviour_logprobs_T - worst.scores.sampled_logprobs_T
    row = answers("largest_disagreements", num=3, before=2)[0]
    position = int(kl_T.argmax())
    assert (row["index"], row["position"]) == (worst.trajectory.index, position)
    assert row["kl_nats"] == pytest.approx(float(kl_T.max()))
    words = {r["token_id"]: r["text"] for r in OpenedRun(written_log()).table("vocabulary").rows()}
    texts = [words[int(token)] for token in worst.trajectory.response_ids]
    assert row["token"] == texts[position]
    assert row["context"] == " ".join(texts[max(0, position - 2) : position])


def test_the_indices_of_a_version_are_its_steps_and_say_what_was_dropped(tmp_path: Path) -> None:
    rows = answers("made_version", version=3)
    assert [row["index"] for row in rows] == list(range(2 * SIZE.batch_size, 3 * SIZE.batch_size))
    log = fresh_log("file", tmp_path)
    log.publish_trajectories(IndexRange(0, 4), make_trajectories(IndexRange(0, 4)), worker="w")
    log.publish_step(make_step(0))
    assert [row["dropped"] for row in answers("made_version", log)] == ["too long", None, None, None]


def test_lost_work_is_priced(tmp_path: Path) -> None:
    shard = IndexRange(0, 4)
    log = fresh_log("file", tmp_path)
    trajectories = make_trajectories(shard)
    log.claim("rollout", shard, worker="a", lease_s=60)
    log.retire("a")
    time.sleep(0.02)
    assert log.claim("rollout", shard, worker="b", lease_s=60)
    log.publish_trajectories(shard, trajectories, worker="b", facts=Facts(seconds=10.0))
    for number in range(2):
        log.publish_step(dataclasses.replace(make_step(number), metrics={"train/seconds": 3.0}))
    log.record_rewind(1, worker="w")
    log.publish_step(make_step(1, rewind=1))
    rows = {row["kind"]: row for row in answers("cost_of_lost_work", log)}
    tokens = [len(t.response_ids) for t in trajectories]
    dropped = rows["dropped learn: too long"]  # index 0 of step 0, and one index of step 1 that has no trajectory
    assert (dropped["num"], dropped["num_tokens"]) == (2, tokens[0])
    assert dropped["seconds"] == pytest.approx(10.0 * tokens[0] / sum(tokens))
    assert (rows["superseded steps"]["num"], rows["superseded steps"]["seconds"]) == (1, 3.0)
    taken = rows["claims taken over: rollout"]
    assert taken["num"] == 1
    assert 0.01 < taken["seconds"] < 30


def test_seconds_and_tokens_by_stage(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    log.publish_trajectories(IndexRange(0, 4), make_trajectories(IndexRange(0, 4)), worker="w")
    log.publish_spans(
        "w", 1, [Span("rollout", "w", "sample", 1.0, 3.0), Span("rollout", "w", "wait:version", 3.0, 8.0)]
    )
    rows = {row["activity"]: row for row in answers("seconds_by_stage", log)}
    num_tokens = sum(len(t.response_ids) for t in make_trajectories(IndexRange(0, 4)))
    assert rows["sample"]["tokens_per_second"] == pytest.approx(num_tokens / 2)
    assert (rows["wait:version"]["seconds"], rows["wait:version"]["num_tokens"]) == (5.0, None)


def test_accuracy_lengths_and_repeats_agree_with_a_plain_count() -> None:
    trajectories = [pair.trajectory for pair in scored(written_log())]
    rows = answers("accuracy_by_difficulty", every=10**6)
    for row in rows:
        group = [t.correct for t in trajectories if t.group == row["prompt_group"]]
        assert (row["num_responses"], row["accuracy"]) == (len(group), pytest.approx(np.mean(group)))
    assert len(rows) == 4
    (lengths,) = answers("length_growth", every=10**6)
    sizes = [len(t.response_ids) for t in trajectories]
    assert (lengths["mean_tokens"], lengths["longest"]) == (pytest.approx(np.mean(sizes)), max(sizes))
    asked = Counter(t.prompt_id for t in trajectories)
    assert answers("questions_seen_again")[0]["num_responses"] == len(asked)


def test_mismatch_looks_at_steps_without_staleness_only() -> None:
    steps = written_log().steps()
    fresh = [step for step in steps if max(step.staleness_tokens) == 0]
    (mismatch,) = answers("engine_mismatch", every=10**6)
    assert 0 < len(fresh) < len(steps)
    assert mismatch["num_steps"] == len(fresh)
    assert mismatch["ratio_max"] == max(step.metrics["train/ratio_max"] for step in fresh)
    (size,) = answers("effective_sample_size", every=10**6)
    assert size["worst_ess_fraction"] == min(step.metrics["train/ess_fraction"] for step in steps)


def test_the_slowest_shard_comes_first_with_its_longest_response() -> None:
    log = written_log()
    slowest = max(log.trajectory_shards(), key=lambda shard: log.find_trajectories(shard).facts.seconds)
    row = answers("slowest_shards")[0]
    assert (row["stage"], row["shard"], row["attempts"]) == ("rollout", slowest.name, 1)
    assert row["longest"] == max(len(t.response_ids) for t in log.read_trajectories(slowest))
