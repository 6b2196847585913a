"""Every resource of the service over a root of synthetic runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from service_world import DONE, LIVE, RUNS, client_of, make_root, settings_of
from synthetic_run import config_of, evaluation, new_log, publish_run, train_step

from api import runs
from api.observe import spread
from asyncopd.config import RunConfig, load_config
from asyncopd.types import Span
from storage.run_view import RunView
from storage.runs import create_run
from storage.stores import open_store


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder = tmp_path_factory.mktemp("service")
    return client_of(settings_of(make_root(folder / "runs"), folder))


def got(client: TestClient, path: str, expect: int = 200, **query: Any) -> Any:
    response = client.get(path, params=query)
    assert response.status_code == expect, response.text
    return response.json()


def test_runs_are_listed_newest_first_in_pages_without_gap_or_repeat(client: TestClient) -> None:
    whole = [run["id"] for run in got(client, "/v1/runs")["data"]]
    assert len(whole) == RUNS
    assert got(client, "/v1/runs")["next_cursor"] is None
    seen, cursor = [], None
    while True:
        page = got(client, "/v1/runs", limit=2, **({"after": cursor} if cursor else {}))
        seen += [run["id"] for run in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == whole


def test_runs_are_filtered_by_status_and_name(client: TestClient) -> None:
    assert {r["id"] for r in got(client, "/v1/runs", status="failed")["data"]} == {"old-1", "old-2", "old-3"}
    both = got(client, "/v1/runs", status=["running", "succeeded"])["data"]
    assert {r["id"] for r in both} == {LIVE, DONE, "old-0"}
    assert {r["id"] for r in got(client, "/v1/runs", name="walk-")["data"]} == {LIVE, DONE}
    page = got(client, "/v1/runs", status="failed", limit=2)
    rest = got(client, "/v1/runs", status="failed", limit=2, after=page["next_cursor"])
    assert len({r["id"] for r in [*page["data"], *rest["data"]]}) == 3


def test_a_run_says_how_far_it_is_and_why_it_failed(client: TestClient) -> None:
    live = got(client, f"/v1/runs/{LIVE}")
    assert (live["status"], live["progress"]["steps"], live["progress"]["total_steps"]) == ("running", 5, 12)
    assert live["latest"]["loss_nats"] > 0
    assert len(live["sparkline"]) == 5
    assert got(client, "/v1/runs/old-1")["error"] == "learn: it broke"
    assert got(client, f"/v1/runs/{LIVE}/config")["config"]["learner"]["batch_size"] == 8


def test_new_steps_are_seen_at_the_next_look(tmp_path: Path) -> None:
    store, config = open_store(str(tmp_path / "runs")), config_of(learner={"num_steps": 12, "batch_size": 8})
    log = new_log(store, config, "growing")
    log.record_state("running", by="flow")
    client = client_of(settings_of(str(tmp_path / "runs"), tmp_path))
    assert got(client, "/v1/runs/growing")["progress"]["steps"] == 0
    log.publish_step(train_step(0))
    log.publish_step(train_step(1))
    time.sleep(0.3)
    assert got(client, "/v1/runs/growing")["progress"]["steps"] == 2
    # The learner goes back to step 1 and trains it again: what it superseded is gone.
    rewind = log.record_rewind(1, worker="learn-0")
    log.publish_step(train_step(1, rewind=rewind, num_tokens=77))
    time.sleep(0.3)
    assert got(client, "/v1/runs/growing")["progress"] == {"steps": 2, "total_steps": 12, "tokens": 177}


def test_a_replay_shows_its_parents_trajectories_and_its_own_steps(tmp_path: Path) -> None:
    # Its steps have the parent's numbers; they used to be looked for at 0.
    store, config = open_store(str(tmp_path / "runs")), config_of()
    publish_run(new_log(store, config, "parent"), config)
    record = {
        "run_id": "parent",
        "first_version": 8,
        "last_version": 12,
        "start": "checkpoint",
        "settings": {},
        "scores": {"oracle": 1.0},
    }
    own = {"config": config.model_dump(mode="json"), "config_hash": "h", "parent": record}
    child = create_run(store, "child", own)
    child.publish_step(train_step(8))
    client = client_of(settings_of(str(tmp_path / "runs"), tmp_path))
    assert got(client, "/v1/runs/child")["progress"]["total_steps"] == 4
    child.publish_step(train_step(9))
    time.sleep(0.3)
    assert got(client, "/v1/runs/child")["progress"]["steps"] == 2
    assert got(client, "/v1/runs/child/metrics", from_step=9)["steps"] == [9.0]
    assert got(client, "/v1/runs/child/trajectories", limit=1)["data"][0]["index"] == 0
    # The parent's record was taken for its id: no query about runs or tokens worked beside a replay.
    answer = client.post("/v1/sql", json={"sql": "SELECT run, parent FROM runs ORDER BY run"})
    assert answer.json()["rows"] == [["child", "parent"], ["parent", ""]]


def test_events_come_in_pages_that_a_cursor_continues(client: TestClient) -> None:
    whole = got(client, f"/v1/runs/{DONE}/events", limit=1000)
    kinds = [event["kind"] for event in whole["data"]]
    assert (kinds.count("step"), kinds.count("state"), kinds.count("evaluation")) == (12, 2, 4)
    first = got(client, f"/v1/runs/{DONE}/events", limit=7)
    assert first["has_more"]
    second = got(client, f"/v1/runs/{DONE}/events", after=first["data"][-1]["id"], limit=1000)
    assert first["data"] + second["data"] == whole["data"]


def test_evaluations_that_end_out_of_order_are_each_told_once(tmp_path: Path) -> None:
    # Ordered by version, the slow evaluation of version 4 was skipped by whoever had seen that of version 8.
    store, config = open_store(str(tmp_path / "runs")), config_of()
    log = new_log(store, config, "two-evaluators")
    log.publish_evaluation(evaluation(8, finished=1_700_000_010.0))
    client = client_of(settings_of(str(tmp_path / "runs"), tmp_path))
    first = got(client, "/v1/runs/two-evaluators/events")["data"]
    log.publish_evaluation(evaluation(4, finished=1_700_000_020.0))
    time.sleep(0.3)
    later = got(client, "/v1/runs/two-evaluators/events", after=first[-1]["id"])["data"]
    assert [event["data"]["version"] for event in later] == [4]


def test_metrics_are_thinned_to_means_and_name_only_what_was_asked(client: TestClient) -> None:
    whole = got(client, f"/v1/runs/{DONE}/metrics", key="train/loss_nats")
    assert whole["steps"] == [float(step) for step in range(12)]
    assert list(whole["series"]) == ["train/loss_nats"]
    thin = got(client, f"/v1/runs/{DONE}/metrics", key="train/loss_nats", max_points=4)
    assert thin["steps"] == [1.0, 4.0, 7.0, 10.0]
    losses = whole["series"]["train/loss_nats"]
    assert thin["series"]["train/loss_nats"][0] == pytest.approx(sum(losses[:3]) / 3)
    assert thin["tokens"][-1] == whole["tokens"][-1] == got(client, f"/v1/runs/{DONE}")["progress"]["tokens"]
    part = got(client, f"/v1/runs/{DONE}/metrics", from_step=3, to_step=5)
    assert (part["steps"], part["tokens"]) == ([3.0, 4.0], whole["tokens"][3:5])


def test_a_window_without_steps_is_empty_not_an_error(client: TestClient) -> None:
    for path in ("metrics", "staleness"):
        for window in ({"from_step": 500}, {"from_step": 5, "to_step": 5}):
            found = got(client, f"/v1/runs/{DONE}/{path}", **window)
            assert (found["steps"], found["tokens"]) == ([], [])


def test_staleness_counts_every_trained_token(client: TestClient) -> None:
    found = got(client, f"/v1/runs/{DONE}/staleness")
    total = sum(map(sum, found["tokens"]))
    assert total == got(client, f"/v1/runs/{DONE}")["progress"]["tokens"]
    assert max(found["versions"]) <= found["max_staleness"]


def test_throughput_integrates_to_the_tokens_of_the_run(client: TestClient) -> None:
    found = got(client, f"/v1/runs/{DONE}/throughput", max_points=10)
    width = found["seconds"][1] - found["seconds"][0]
    tokens = got(client, f"/v1/runs/{DONE}")["progress"]["tokens"]
    assert sum(found["trained"]) * width == pytest.approx(tokens)


def test_a_shard_longer_than_a_stretch_is_no_burst_between_standstills() -> None:
    # Two shards of 600 tokens and 30 s, one after the other, and one of 90 tokens beside the second.
    rates = spread([(130.0, 30.0, 600), (160.0, 30.0, 600), (150.0, 9.0, 90)], np.linspace(100.0, 160.0, 7))
    assert rates.tolist() == pytest.approx([20, 20, 20, 20, 20 + 9, 20])
    assert spread([], np.linspace(0.0, 1.0, 3)).tolist() == [0, 0]


def test_policies_checkpoints_and_evaluations_are_the_surviving_ones(client: TestClient) -> None:
    evals = got(client, f"/v1/runs/{DONE}/evals")["data"]
    assert [e["version"] for e in evals] == [0, 4, 8, 12]
    assert got(client, f"/v1/runs/{LIVE}/checkpoints")["data"] == [{"step": 4, "rewind": 0}]
    # The synthetic run keeps no weights.
    assert got(client, f"/v1/runs/{DONE}/policies") == {"data": [], "superseded": [], "rewinds": []}


def test_the_timeline_has_a_lane_per_worker_and_grows_with_the_run(tmp_path: Path) -> None:
    store, config = open_store(str(tmp_path / "runs")), config_of()
    log = new_log(store, config, "timed")
    publish_run(log, config, num_steps=3)
    client = client_of(settings_of(str(tmp_path / "runs"), tmp_path))
    found = got(client, "/v1/runs/timed/timeline")
    assert {lane["role"] for lane in found["lanes"]} == {"rollout", "score", "learn", "evaluate"}
    for lane in found["lanes"]:
        assert len(lane["starts"]) == len(lane["ends"]) == len(lane["activities"]) == len(lane["details"]) > 0
        assert all(start <= end for start, end in zip(lane["starts"], lane["ends"], strict=True))
    spans = RunView(log).read("spans").spans()
    late = Span("learn", "learn-host-1-aaaa", "train", spans[-1].end, spans[-1].end + 100, "late")
    log.publish_spans("learn-host-1-aaaa", 2, [late])
    assert got(client, "/v1/runs/timed/timeline")["duration_s"] > found["duration_s"] + 50
    window = got(client, "/v1/runs/timed/timeline", start_s=1.0, stop_s=2.0)
    assert window["duration_s"] == 2.0


def test_trajectories_are_paged_and_filtered(client: TestClient) -> None:
    seen: list[dict[str, Any]] = []
    cursor: int | None = -1
    while cursor is not None:
        page = got(client, f"/v1/runs/{DONE}/trajectories", after=cursor, limit=13)
        seen += page["data"]
        cursor = page["next_cursor"]
    assert [t["index"] for t in seen] == list(range(96))
    long = got(client, f"/v1/runs/{DONE}/trajectories", min_tokens=20, limit=500)["data"]
    assert [t["index"] for t in long] == [t["index"] for t in seen if t["num_tokens"] >= 20]
    third = got(client, f"/v1/runs/{DONE}/trajectories", version=3, limit=500)["data"]
    assert {t["version_first"] for t in third} == {3}
    assert got(client, f"/v1/runs/{DONE}/trajectories", correct=False)["data"] == []


def test_a_trajectory_is_shown_token_by_token(client: TestClient) -> None:
    found = got(client, f"/v1/runs/{DONE}/trajectories/90")
    assert len(found["tokens"]) == found["summary"]["num_tokens"]
    assert found["trained_at_step"] == 11
    assert found["staleness"] == 11 - found["summary"]["version_first"]
    token = found["tokens"][0]
    assert (token["id"], token["behaviour_logprob"], token["teacher_logprob"]) == (5, -1.0, -1.0)
    assert "index 96" in got(client, f"/v1/runs/{DONE}/trajectories/96", expect=404)["detail"].lower()


def test_configurations_are_listed_with_the_schema_of_a_form(client: TestClient) -> None:
    found = got(client, "/v1/configs")
    quickstart = next(config for config in found["data"] if config["name"] == "quickstart")
    assert quickstart["config"]["learner"]["num_steps"] > 0
    assert quickstart["about"]
    assert "learner" in found["json_schema"]["properties"]


def test_configurations_are_resolved_again_only_when_a_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mine.yaml").write_text("name: mine\nlearner:\n  num_steps: 3\n")
    client = client_of(settings_of(str(tmp_path / "runs"), tmp_path, configs=folder))
    resolved: list[Path] = []

    def counted(path: Path) -> RunConfig:
        resolved.append(path)
        return load_config(path)

    monkeypatch.setattr(runs, "load_config", counted)

    def steps() -> list[int]:
        return [found["config"]["learner"]["num_steps"] for found in got(client, "/v1/configs")["data"]]

    assert [steps(), steps(), len(resolved)] == [[3], [3], 1]
    (folder / "mine.yaml").write_text("name: mine\nlearner:\n  num_steps: 4\n")
    (folder / "other.yaml").write_text("name: other\nlearner:\n  num_steps: 5\n")
    assert [steps(), steps(), len(resolved)] == [[4, 5], [4, 5], 3]


def test_sql_sees_the_runs_it_names_and_says_when_it_cuts_off(client: TestClient) -> None:
    def ask(sql: str, status: int = 200, **more: Any) -> Any:
        response = client.post("/v1/sql", json={"sql": sql, **more})
        assert response.status_code == status, response.text
        return response.json()

    both = ask("SELECT run, count(*) AS num FROM steps GROUP BY run ORDER BY run", runs=[DONE, LIVE])
    assert (both["columns"], both["rows"], both["truncated"]) == (["run", "num"], [[DONE, 12], [LIVE, 5]], False)
    cut = ask("SELECT step FROM steps ORDER BY ALL", runs=[DONE], limit=3)
    assert (cut["rows"], cut["truncated"]) == ([[0], [1], [2]], True)
    odd = ask(
        "SELECT 1 AS a, 2 AS a, 'NaN'::DOUBLE AS b, MAP {'x': 1} AS c, TIMESTAMP '2026-11-21' AS d, $n AS e",
        parameters={"n": 7},
    )
    assert odd["columns"] == ["a", "a", "b", "c", "d", "e"]
    assert odd["rows"] == [[1, 2, None, {"x": 1}, "2026-11-21T00:00:00", 7]]
    assert "nobody" in ask("SELECT 1", status=404, runs=["nobody"])["detail"]
    for refused in (
        "DROP TABLE steps",
        "SELECT * FROM read_text('/etc/passwd')",
        "COPY steps TO '/tmp/x'",
        "nonsense",
        "SELECT getenv('HOME')",
        "SELECT 1; SELECT 2",
    ):
        assert ask(refused, status=422)["type"] == "urn:asyncopd:problem:query-refused"


def test_every_stored_question_runs_as_it_is_listed(client: TestClient) -> None:
    questions = got(client, "/v1/sql/questions")["data"]
    assert len(questions) > 10
    assert not [question["name"] for question in questions if "$" in question["sql"]]
    # tests/test_catalog_queries.py runs every one of them; here it is the written-in defaults.
    for question in [question for question in questions if question["parameters"]][:3]:
        answer = client.post("/v1/sql", json={"sql": question["sql"], "runs": [DONE]})
        assert answer.status_code == 200, answer.text


def test_metrics_for_prometheus_count_runs_and_requests(client: TestClient) -> None:
    client.get(f"/v1/runs/{LIVE}")
    text = client.get("/metrics").text
    assert 'asyncopd_runs{status="failed"} 3.0' in text
    assert f'asyncopd_trained_steps{{run="{LIVE}"}} 5.0' in text
    assert 'asyncopd_http_requests_total{code="200",method="GET",route="/v1/runs/{run_id}"}' in text


def test_the_page_is_served_for_each_of_its_addresses(client: TestClient) -> None:
    for path in ("/", f"/runs/{DONE}", f"/runs/{DONE}/trajectories/3", "/compare", "/sql", "/launch"):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
    assert client.get("/static/app.js").status_code == 200
