"""Launching and stopping runs over REST: idempotency, crashes between two writes, and what Prefect is told."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from service_world import DONE, LIVE, Prefect, client_of, make_root, prefect_stand_in, settings_of
from synthetic_run import config_of, new_log, weights_of

from api.reader import FRESH_S
from asyncopd.local import stack
from asyncopd.records import WorkerStatus
from flows.train import _requested_end
from storage.runs import LaunchLog, open_run
from storage.stores import open_store

BODY = {"config_name": "quickstart", "overrides": {"learner.num_steps": 3}}


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefect]:
    with prefect_stand_in() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        yield found


@pytest.fixture
def root(tmp_path: Path) -> str:
    found = make_root(tmp_path / "runs")
    # What its last step published: by it a replay knows how far there is to go.
    open_run(open_store(found), DONE).publish_policy(weights_of(12), worker="learn-0")
    return found


@pytest.fixture
def client(root: str, tmp_path: Path) -> TestClient:
    return client_of(settings_of(root, tmp_path))


def until_answers(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(url, timeout=5).status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def launch(client: TestClient, key: str | None = None, **body: Any) -> httpx.Response:
    return client.post("/v1/runs", json={**BODY, **body}, headers={"Idempotency-Key": key} if key else {})


def test_a_launch_starts_the_deployment_with_the_resolved_configuration(client: TestClient, prefect: Prefect) -> None:
    response = launch(client, run_id="mine")
    assert (response.status_code, response.headers["location"]) == (201, "/v1/runs/mine")
    assert response.json()["status"] == "queued"
    ((flow_run_id, asked),) = prefect.flow_runs.items()
    assert asked["deployment"] == "asyncopd-train"
    assert asked["parameters"]["config"]["learner"]["num_steps"] == 3
    assert asked["parameters"]["run_id"] == "mine"
    assert client.get("/v1/runs/mine").json()["flow_run_id"] == flow_run_id
    assert "mine" in [run["id"] for run in client.get("/v1/runs").json()["data"]]


def test_a_model_that_cannot_serve_is_refused_before_anything_is_stored(
    client: TestClient, prefect: Prefect, root: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 2)
    model = {"kind": "pretrained", "path": str(tmp_path)}
    task = {"kind": "text", "train_path": str(tmp_path / "train.jsonl"), "tokenizer": "student"}
    config = {"student": model, "teacher": {"engine": "hf", "model": model}, "task": task}
    refused = client.post("/v1/runs", json={"config": config, "run_id": "refused"})
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:asyncopd:problem:config-refused")
    assert "is of model_type 'mamba'" in refused.json()["detail"]
    assert not prefect.flow_runs
    assert LaunchLog(open_store(root)).find_launch("refused") is None


def test_a_repeat_with_the_key_launches_once_and_says_so(client: TestClient, prefect: Prefect) -> None:
    first, second = launch(client, "k1"), launch(client, "k1")
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.headers["idempotency-replayed"] == "true"
    assert first.json()["id"] == second.json()["id"]
    assert len(prefect.flow_runs) == 1


def test_a_key_is_not_used_for_another_body(client: TestClient, prefect: Prefect) -> None:
    launch(client, "k2")
    refused = launch(client, "k2", overrides={"learner.num_steps": 4})
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:asyncopd:problem:idempotency-key-reused")
    assert len(prefect.flow_runs) == 1


def test_twelve_concurrent_requests_with_one_key_launch_one_run(client: TestClient, prefect: Prefect) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: launch(client, "k3"), range(12)))
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert sorted(answer.status_code for answer in answers).count(201) == 1
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(prefect.flow_runs) == 1


def test_an_id_is_taken_once(client: TestClient, prefect: Prefect) -> None:
    assert launch(client, run_id=DONE).json()["type"] == "urn:asyncopd:problem:run-exists"
    assert launch(client, run_id="twice").status_code == 201
    assert launch(client, run_id="twice").status_code == 409
    assert len(prefect.flow_runs) == 1


def test_a_launch_while_prefect_is_down_is_stored_and_a_repeat_goes_on(
    client: TestClient, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"]["storage"]["ok"]
    assert "asyncopd up" in ready.json()["checks"]["prefect"]["detail"]
    refused = launch(client, "k4")
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:asyncopd:problem:prefect-away")
    (run_id,) = LaunchLog(open_store(root)).launches()
    stored = client.get(f"/v1/runs/{run_id}").json()
    assert stored["status"] == "queued"
    assert "Prefect has not heard of it" in stored["phase"]
    with prefect_stand_in() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        # Another process of the service: what was asked is in storage only.
        again = launch(client_of(settings_of(root, tmp_path)), "k4")
        assert (again.status_code, again.json()["id"]) == (200, run_id)
        assert [run["parameters"]["run_id"] for run in found.flow_runs.values()] == [run_id]


def test_a_launch_without_a_key_that_came_to_nothing_is_started_by_asking_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    refused = launch(client)
    assert refused.status_code == 503
    (run_id,) = re.findall(r'repeat the request with "run_id": "([^"]+)"', refused.json()["detail"])
    with prefect_stand_in() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        assert launch(client, run_id=run_id, overrides={"learner.num_steps": 4}).status_code == 409
        assert launch(client, run_id=run_id).status_code == 200
        assert launch(client, run_id=run_id).status_code == 409  # it is started now
        assert len(found.flow_runs) == 1


def test_a_service_killed_between_storing_and_starting_goes_on_with_the_repeat(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A Prefect that accepts the connection and never answers: the service hangs after it stored the launch.
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {
            "PREFECT_API_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/api",
            "ASYNCOPD_HOME": str(tmp_path / "home"),
        }
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "api.main",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--root",
                root,
                "--configs",
                str(Path(__file__).parent.parent / "configs"),
            ],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **environment},
        )
        try:
            until_answers(f"http://127.0.0.1:{port}/healthz")
            with ThreadPoolExecutor(1) as pool:
                lost = pool.submit(
                    httpx.post,
                    f"http://127.0.0.1:{port}/v1/runs",
                    json=BODY,
                    timeout=60,
                    headers={"Idempotency-Key": "k5"},
                )
                deadline = time.monotonic() + 60
                while not LaunchLog(open_store(root)).launches():
                    assert time.monotonic() < deadline
                    assert not lost.done()
                    time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                assert isinstance(lost.exception(), httpx.TransportError)
        finally:
            process.kill()
            process.wait()
    (run_id,) = LaunchLog(open_store(root)).launches()
    with prefect_stand_in() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        again = launch(client_of(settings_of(root, tmp_path)), "k5")
        assert (again.status_code, again.json()["id"]) == (200, run_id)
        assert [run["parameters"]["run_id"] for run in found.flow_runs.values()] == [run_id]


def test_cancel_and_pause_tell_prefect_and_resume_starts_again(client: TestClient, prefect: Prefect, root: str) -> None:
    run_id = launch(client, run_id="stopped").json()["id"]
    answer = client.post(f"/v1/runs/{run_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert len(prefect.cancelled) == 1
    assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 202  # harmless
    assert client.post(f"/v1/runs/{run_id}/pause").status_code == 409
    assert client.post(f"/v1/runs/{run_id}/resume").status_code == 202
    assert len(prefect.flow_runs) == 2
    assert client.post(f"/v1/runs/{LIVE}/pause").json()["status"] == "pausing"
    assert client.post(f"/v1/runs/{LIVE}/resume").status_code == 409
    assert client.post(f"/v1/runs/{DONE}/cancel").status_code == 409
    assert client.post("/v1/runs/nobody/resume").status_code == 404


def test_a_flow_records_what_was_meant_by_stopping_it(client: TestClient, prefect: Prefect, root: str) -> None:
    log = open_run(open_store(root), LIVE)
    log.record_state("running", by="flow-1")
    assert _requested_end(log) == "cancelled"  # by Prefect's own means: nothing was asked here
    client.post(f"/v1/runs/{LIVE}/pause")
    assert _requested_end(log) == "paused"
    log.record_state("running", by="flow-2")
    assert _requested_end(log) == "cancelled"  # the pause was of the flow before


def test_a_run_keeps_its_place_in_the_list_when_its_flow_creates_it(
    client: TestClient, prefect: Prefect, root: str
) -> None:
    launched = launch(client, run_id="mine").json()
    time.sleep(0.05)
    new_log(open_store(root), config_of(), "mine").record_state("running", by="flow-1")
    run = client.get("/v1/runs/mine").json()
    assert run["status"] == "running"
    assert run["created"] == launched["created"]


def test_a_resumed_run_is_queued_until_its_flow_begins(
    client: TestClient, prefect: Prefect, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It was still called cancelled, and a stream of its events ended at once.
    log = open_run(open_store(root), LIVE)
    client.post(f"/v1/runs/{LIVE}/cancel")
    log.record_state("stopped", by="flow-2", reason="cancelled")
    time.sleep(FRESH_S)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert client.post(f"/v1/runs/{LIVE}/resume").status_code == 503
    assert client.get(f"/v1/runs/{LIVE}").json()["status"] == "cancelled"  # nobody is on the way
    monkeypatch.setenv("PREFECT_API_URL", prefect.url)
    assert client.post(f"/v1/runs/{LIVE}/resume").json()["status"] == "queued"
    assert client.post(f"/v1/runs/{LIVE}/resume").status_code == 409
    log.record_state("running", by="flow-3")
    time.sleep(FRESH_S)
    assert client.get(f"/v1/runs/{LIVE}").json()["status"] == "running"


def test_a_run_whose_processes_are_gone_can_be_cancelled_and_resumed(
    client: TestClient, prefect: Prefect, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine that lost its power records nothing: such a run was cancelling for ever, and could not be resumed.
    open_run(open_store(root), LIVE).heartbeat("learn-host-2-bbbb", WorkerStatus(role="learn"))
    assert "training" in client.get(f"/v1/runs/{LIVE}").json()["phase"]
    assert client.post(f"/v1/runs/{LIVE}/resume").status_code == 409
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1000)
    assert "without a sign of life" in client.get(f"/v1/runs/{LIVE}").json()["phase"]
    assert client.post(f"/v1/runs/{LIVE}/cancel").json()["status"] == "cancelling"  # somebody may be there after all
    assert client.post(f"/v1/runs/{LIVE}/resume").status_code == 409
    monkeypatch.setattr(time, "time", lambda: now() + 2000)
    assert client.get(f"/v1/runs/{LIVE}").json()["status"] == "cancelled"
    assert client.post(f"/v1/runs/{LIVE}/resume").json()["status"] == "queued"
    assert client.post(f"/v1/runs/{LIVE}/resume").status_code == 409


def test_a_prefect_that_is_busy_for_a_moment_is_asked_again(
    client: TestClient, prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under load its SQLite is locked now and then, and every third launch was refused.
    monkeypatch.setattr(stack, "BUSY_PAUSES_S", (0.0, 0.0))
    prefect.num_busy = 2
    assert launch(client, run_id="patient").status_code == 201
    prefect.num_busy = 9
    refused = launch(client, run_id="refused")
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:asyncopd:problem:prefect-away")


def test_mistakes_in_a_configuration_are_refused_before_anything_is_stored(
    client: TestClient, prefect: Prefect, root: str
) -> None:
    for body, words in (
        ({"config_name": "quickstart", "overrides": {"learner.lrr": 1}}, "learner.lr"),
        ({"config_name": "nothing"}, "quickstart"),
        ({}, "exactly one"),
        ({"config": {"name": "x"}, "config_name": "quickstart"}, "exactly one"),
        ({"config_name": "quickstart", "overrides": {"storage.root": "/etc"}}, "storage.root"),
        ({"config": {"storage": {"root": "/etc"}, "learner": {"num_steps": "many"}}}, "num_steps"),
    ):
        response = client.post("/v1/runs", json=body)
        assert response.status_code == 422, response.text
        assert words in response.json()["detail"]
    assert (LaunchLog(open_store(root)).launches(), prefect.flow_runs) == ([], {})


def test_a_configuration_in_full_lands_in_the_services_root(client: TestClient, prefect: Prefect, root: str) -> None:
    response = client.post("/v1/runs", json={"config": {"name": "full", "storage": {"root": "/somewhere/else"}}})
    assert response.status_code == 201
    (asked,) = prefect.flow_runs.values()
    assert asked["parameters"]["config"]["storage"]["root"] == asked["parameters"]["root"] == root


def test_a_replay_starts_its_deployment_with_settings_that_arrive_as_sent(client: TestClient, prefect: Prefect) -> None:
    body = {"steps": ":4", "overrides": {"learner.lr": 1e-05, "loss.name": "cross_entropy"}}
    work = client.post(f"/v1/runs/{DONE}/replay", json=body, headers={"Idempotency-Key": "r"})
    assert work.status_code == 202, work.text
    assert client.post(f"/v1/runs/{DONE}/replay", json=body, headers={"Idempotency-Key": "r"}).json() == work.json()
    (asked,) = prefect.flow_runs.values()
    assert asked["deployment"] == "replay-run"
    assert asked["parameters"]["steps"] == ":4"
    assert asked["parameters"]["overrides"] == {"learner.lr": 1e-05, "loss.name": "cross_entropy"}
    assert work.json()["run_id"].startswith(f"{DONE}-replay-")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("replay", {"steps": "9:3"}, "FIRST < LAST"),
        ("replay", {"steps": ":13"}, "<= 12"),
        ("replay", {"overrides": {"rollout.shard_size": 2}}, "cannot be replayed"),
        ("replay", {"overrides": {"scores": "x"}}, f"run {DONE} has no scores x"),
        ("replay", {"overrides": {"learner.lr": 1}, "scores": {"oracle": 0}}, "weights above 0"),
        ("replay", {"overrides": {"learner.lr=1 x": 1}}, "no setting"),
        ("replay", {"compare": [{"loss.name": "reverse_kl"}]}, "at least two"),
        ("backfill", {}, "nothing to back-fill"),
        ("backfill", {"teacher": {"smoothing": 1e-4}}, "Give it a name"),
        ("backfill", {"teacher": {"smothing": 1e-4, "name": "x"}}, "smoothing"),
    ],
)
def test_what_a_replay_or_backfill_cannot_do_is_refused_at_once(
    client: TestClient, prefect: Prefect, path: str, body: dict[str, Any], words: str
) -> None:
    response = client.post(f"/v1/runs/{DONE}/{path}", json=body)
    assert response.status_code == 422, response.text
    assert words in response.json()["detail"]
    assert prefect.flow_runs == {}


def test_a_backfill_starts_its_deployment(client: TestClient, prefect: Prefect) -> None:
    body = {"teacher": {"name": "hard", "smoothing": 1e-4}, "candidates": {"head": 2, "num_draws": 3, "law": "tail"}}
    assert client.post(f"/v1/runs/{DONE}/backfill", json=body).status_code == 202
    (asked,) = prefect.flow_runs.values()
    assert asked["deployment"] == "backfill-run"
    assert asked["parameters"]["teacher"] == {"name": "hard", "smoothing": 0.0001}
    assert asked["parameters"]["candidates"] == {"head": 2, "num_draws": 3, "law": "tail"}
    assert asked["parameters"]["num_teacher_draws"] == 0
