"""The report of a run, from what its roles left in storage."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from synthetic_run import START, config_of, evaluation, new_log, publish_run, scores_of, train_step, trajectory

from asyncopd.records import WorkerStatus
from asyncopd.report.measure import STANDSTILL_S
from asyncopd.report.summary import Summary
from asyncopd.report.text import to_markdown
from asyncopd.report.write import Report
from asyncopd.types import IndexRange, Span
from flows.report import report_run, summarise
from storage.run_log import StoredRunLog
from storage.stores import open_store

PLOTS = ("quality.png", "timeline.png", "training.png", "staleness.png", "lengths.png")


@pytest.fixture
def log(tmp_path: Path) -> StoredRunLog:
    """A new run without anything in it."""
    return new_log(open_store(str(tmp_path / "root")), config_of())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a complete run of 12 steps."""
    config = config_of()
    folder = tmp_path_factory.mktemp("report")
    complete = new_log(open_store(str(folder / "root")), config)
    publish_run(complete, config)
    return report_run(complete, config, folder / "report")


def spans_of(role: str, *spans: tuple[str, float, float], worker: str = "") -> list[Span]:
    worker = worker or f"{role}-host-1-aaaa"
    return [Span(role, worker, activity, START + start, START + end) for activity, start, end in spans]


def publish_spans(log: StoredRunLog, *groups: list[Span]) -> None:
    for spans in groups:
        log.publish_spans(spans[0].worker, 1, spans)


def test_every_metric_and_activity_in_the_code_is_documented() -> None:
    root = Path(__file__).parent.parent
    documented = (root / "docs" / "metrics.md").read_text()
    pattern = re.compile(r"""["']((?:train|rollout|loss)/[a-z0-9_]+|orchestrate:[a-z]+)["']""")
    sources = [path.read_text() for folder in ("asyncopd", "flows") for path in (root / folder).rglob("*.py")]
    keys = {key for source in sources for key in pattern.findall(source)}
    assert len(keys) > 20
    assert sorted(key for key in keys if f"`{key}`" not in documented) == []


# -- the files ----------------------------------------------------------------------------------------------------
def test_a_report_has_every_file_and_its_pictures_are_named_in_the_markdown(report: Report) -> None:
    text = (report.folder / "report.md").read_text()
    for name in PLOTS:
        assert (report.folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert text.startswith(report.markdown.rstrip("\n"))


def test_the_summary_survives_the_round_trip_through_its_file(report: Report) -> None:
    assert Summary.from_json((report.folder / "summary.json").read_bytes()) == report.summary


def test_the_markdown_gives_before_and_after_overall_and_per_noise_level(report: Report) -> None:
    lines = [" ".join(line.split()) for line in report.markdown.splitlines()]
    first, last = report.summary.first, report.summary.last
    assert first is not None
    assert last is not None
    assert f"accuracy 43.0 % -> **{100 * last.accuracy:.1f} %**" in report.markdown
    assert any(line.startswith("| accuracy, noise 0.85 | 13.0 % |") for line in lines)
    assert any(line.startswith("| KL to teacher, nats/token | 0.4700 ± 0.0200 |") for line in lines)


def test_the_table_has_one_row_per_evaluation_with_json_values(report: Report) -> None:
    assert [row["version"] for row in report.table] == [0, 4, 8, 12]
    assert report.table[0]["accuracy %"] == pytest.approx(43.0)
    assert report.table[0]["wall s"] == 0.0
    json.dumps(report.table, allow_nan=False)


def test_every_step_counts_once_in_tokens_and_staleness(report: Report) -> None:
    tokens, staleness = report.summary.tokens, report.summary.staleness
    assert tokens.generated == tokens.scored == tokens.trained == sum(staleness.tokens.values())
    assert staleness.max_versions == 2
    assert report.summary.lengths.num_responses == 12 * 8


# -- figures ------------------------------------------------------------------------------------------------------
def test_overlap_is_busy_time_over_wall_time_and_counts_one_worker_once(log: StoredRunLog) -> None:
    publish_spans(
        log,
        # Two lanes of one worker overlap from 2 to 4: six busy seconds, not eight.
        spans_of("rollout", ("sample", 0, 4), ("sample", 2, 6)),
        spans_of("score", ("score", 4, 5), ("wait:shard", 0, 4)),
        spans_of("learn", ("train", 5, 10)),
        # Evaluation is not part of the pipeline whose overlap is measured.
        spans_of("evaluate", ("evaluate", 0, 30)),
    )
    summary = summarise(log, config_of())
    assert summary.wall_s == pytest.approx(10)
    assert summary.overlap == pytest.approx((6 + 1 + 5) / 10)
    assert summary.roles["rollout"].busy_share == pytest.approx(0.6)
    assert list(summary.roles) == ["rollout", "score", "learn", "evaluate"]


def test_two_busy_workers_of_one_role_add_up(log: StoredRunLog) -> None:
    both = [spans_of("rollout", ("sample", 0, 10), worker=f"rollout-host-{pid}-aaaa") for pid in (1, 2)]
    publish_spans(log, *both)
    assert summarise(log, config_of()).overlap == pytest.approx(2)


def test_waiting_counts_only_while_the_worker_is_not_busy(log: StoredRunLog) -> None:
    # The next batch is waited for from 0 to 6, while a step is trained from 0 to 4.
    publish_spans(log, spans_of("learn", ("train", 0, 4), ("wait:scores", 0, 6), ("train", 6, 8)))
    assert summarise(log, config_of()).roles["learn"].waiting_s == {"scores": pytest.approx(2)}


def test_orchestration_is_a_share_of_the_roles_lifetimes_and_says_what_was_exposed(log: StoredRunLog) -> None:
    publish_spans(
        log,
        spans_of("rollout", ("sample", 0, 8), ("orchestrate:prefect", 7, 10)),
        spans_of("learn", ("train", 0, 9), ("orchestrate:publish", 9, 10)),
    )
    overhead = summarise(log, config_of()).orchestration
    assert overhead.share == pytest.approx((3 + 1) / 20)
    assert overhead.share_by_kind == {"prefect": pytest.approx(3 / 20), "publish": pytest.approx(1 / 20)}
    assert overhead.exposed_share == pytest.approx((2 + 1) / 20)


def test_throughput_is_trained_tokens_over_wall_time(log: StoredRunLog) -> None:
    publish_spans(log, spans_of("learn", ("train", 0, 4)))
    for number in range(2):
        log.publish_step(train_step(number, num_tokens=100))
    assert summarise(log, config_of()).tokens.trained_per_s == pytest.approx(50)


def test_staleness_is_weighted_by_tokens(log: StoredRunLog) -> None:
    log.publish_step(train_step(0, staleness_tokens={0: 90, 2: 10}))
    log.publish_step(train_step(1, staleness_tokens={1: 100}))
    staleness = summarise(log, config_of()).staleness
    assert staleness.tokens == {0: 90, 1: 100, 2: 10}
    assert (staleness.mean_versions, staleness.max_versions) == (pytest.approx(0.6), 2)


def test_a_step_trained_again_after_a_rewind_counts_once(log: StoredRunLog) -> None:
    log.publish_step(train_step(0, num_tokens=70))
    log.publish_step(train_step(1, num_tokens=80))
    rewind = log.record_rewind(1, worker="learn-host-2-bbbb")
    log.publish_step(train_step(1, num_tokens=80, rewind=rewind))
    summary = summarise(log, config_of())
    assert (summary.num_steps, summary.tokens.trained, summary.incidents.num_rewinds) == (2, 150, 1)


def test_failures_restarts_and_dropped_trajectories_are_incidents(log: StoredRunLog) -> None:
    for worker in ("rollout-host-1-aaaa", "rollout-host-2-bbbb", "learn-host-3-cccc"):
        log.heartbeat(worker, WorkerStatus())
        log.retire(worker)
    log.publish_failure("rollout", "rollout-host-1-aaaa", "EngineError: out of memory")
    log.publish_step(train_step(0, dropped={3: "too long", 5: "too long"}))
    incidents = summarise(log, config_of()).incidents
    assert incidents.failures == ("rollout: EngineError: out of memory",)
    assert incidents.num_extra_workers == 1
    assert incidents.dropped == {"too long": 2}


def test_lengths_of_a_big_run_come_from_shards_spread_evenly(
    log: StoredRunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.report.MAX_SHARDS_READ", 3)
    for number in range(9):
        shard = IndexRange(4 * number, 4 * number + 4)
        rows = [trajectory(index, num_tokens=number + 1, stopped=number < 8) for index in shard.indices]
        log.publish_trajectories(shard, rows, worker="w")
        if number < 2:
            log.publish_scores("oracle", shard, [scores_of(row) for row in rows], worker="w")
    summary = summarise(log, config_of())
    lengths = summary.lengths
    assert (lengths.num_shards_read, lengths.num_shards, lengths.num_responses) == (3, 9, 12)
    assert (lengths.mean_tokens, lengths.max_tokens) == (pytest.approx((1 + 5 + 9) / 3), 9)
    assert lengths.stopped_fraction == pytest.approx(2 / 3)
    # Token counts do not need the shards' data, only their manifests.
    assert (summary.tokens.generated, summary.tokens.scored) == (4 * 45, 4 * 3)
    assert any("3 of 9 shards" in note for note in summary.notes)


def test_a_damaged_shard_is_named_and_costs_only_itself(log: StoredRunLog) -> None:
    for start in (0, 4):
        shard = IndexRange(start, start + 4)
        log.publish_trajectories(shard, [trajectory(index, 5) for index in shard.indices], worker="w")
    damaged = next(key for key in log.store.list(log.layout.trajectories) if "000004" in key and "parquet" in key)
    log.store.put(damaged, b"not what was written")
    summary = summarise(log, config_of())
    assert summary.lengths.num_responses == 4
    assert any("could not be read" in note and "000004-000007" in note for note in summary.notes)


# -- what is missing ----------------------------------------------------------------------------------------------
def test_a_run_that_did_nothing_yet_still_has_a_report(log: StoredRunLog, tmp_path: Path) -> None:
    report = report_run(log, config_of(), tmp_path / "report")
    assert "Trained 0 of 12 steps" in report.markdown
    assert report.summary.overlap is None
    assert all((tmp_path / "report" / name).exists() for name in PLOTS)
    assert json.loads((tmp_path / "report" / "trace.json").read_text())["traceEvents"] == []
    assert list(report.table[0]) == ["evaluations", "reason"]


def test_a_run_without_evaluations_says_so(log: StoredRunLog, tmp_path: Path) -> None:
    config = config_of(evaluate={"every": 0})
    publish_run(log, config)
    report = report_run(log, config, tmp_path / "report")
    assert "no evaluations (evaluate.every is 0)" in report.markdown
    assert "## Quality" not in report.markdown


def test_a_cancelled_run_reports_what_was_done_and_how_to_go_on(log: StoredRunLog) -> None:
    publish_run(log, config_of(), num_steps=5)
    markdown = to_markdown(summarise(log, config_of()), "reports/synthetic")
    assert "stopped after 5 of 12 steps" in markdown
    assert "-p run_id=synthetic` goes on" in markdown
    assert "last evaluated version is 4, not 12" in markdown


def test_groups_and_accuracy_may_be_missing(log: StoredRunLog, tmp_path: Path) -> None:
    log.publish_step(train_step(0, metrics={"train/loss_nats": 1.0}))
    for version in (0, 1):
        log.publish_evaluation(evaluation(version, math.nan, accuracy_by_group={}, kl_nats=0.5 - 0.1 * version))
    report = report_run(log, config_of(), tmp_path / "report")
    assert "no verifier" in report.markdown
    assert "0.500 -> **0.400** nats" in report.markdown
    assert report.table[0]["accuracy %"] is None


def test_a_pause_of_the_run_is_pointed_out(log: StoredRunLog) -> None:
    # Pre-training long before is no pause: wall time begins with the pipeline.
    resumed = STANDSTILL_S + 100
    publish_spans(
        log,
        spans_of("pretrain", ("pretrain", -500, -400)),
        spans_of("learn", ("train", 0, 10), ("train", resumed, resumed + 10)),
    )
    (note,) = [note for note in summarise(log, config_of()).notes if "pauses" in note]
    assert f"{resumed - 10:.0f} s" in note
