"""Live events over a real server: what a client sees, and that it goes on where it left off after a restart."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_world import DONE, Prefect, client_of, make_root, prefect_stand_in, served, settings_of
from synthetic_run import config_of, new_log, publish_run, train_step

from api.main import create_app
from asyncopd.config import RunConfig
from storage.stores import open_store

ROOT = Path(__file__).parent.parent


def events(
    url: str, *, last_id: str | None = None, at_most: int = 1000
) -> list[tuple[str, str | None, dict[str, Any]]]:
    """(kind, id, data) of a stream, until it ends or `at_most` came."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    found = []
    with httpx.stream("GET", url, headers=headers, timeout=30) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-content-type-options"] == "nosniff"
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
                fields = {}
                if len(found) == at_most:
                    break
    return found


def test_the_stream_of_a_finished_run_is_its_list_and_an_end(tmp_path: Path) -> None:
    app = create_app(settings_of(make_root(tmp_path / "runs"), tmp_path))
    with served(app) as url:
        listed = httpx.get(f"{url}/v1/runs/{DONE}/events", params={"limit": 1000}, timeout=30).json()["data"]
        streamed = events(f"{url}/v1/runs/{DONE}/events/stream")
    assert [data for _, _, data in streamed[:-1]] == listed
    assert streamed[-1][0] == "end"
    assert streamed[-1][2]["data"] == {"status": "succeeded"}


def test_a_client_goes_on_after_a_restart_of_the_service_without_gap_or_repeat(tmp_path: Path) -> None:
    root = str(tmp_path / "runs")
    log = new_log(open_store(root), config_of(), "long")
    log.record_state("running", by="flow")
    for number in range(3):
        log.publish_step(train_step(number))
    with served(create_app(settings_of(root, tmp_path))) as url:
        seen = events(f"{url}/v1/runs/long/events/stream", at_most=3)
    for number in range(3, 6):
        log.publish_step(train_step(number))
    with served(create_app(settings_of(root, tmp_path))) as url:
        later = threading.Timer(0.5, lambda: (log.publish_step(train_step(6)), log.record_state("stopped", by="flow")))
        later.start()
        seen += events(f"{url}/v1/runs/long/events/stream", last_id=seen[-1][1])
        later.join()
    steps = [data["data"]["step"] for kind, _, data in seen if kind == "step"]
    assert steps == list(range(7))
    assert [kind for kind, _, _ in seen].count("state") == 2
    assert seen[-1][0] == "end"


def test_an_event_reaches_every_client_within_a_second_for_one_look_at_storage(tmp_path: Path) -> None:
    root = str(tmp_path / "runs")
    log = new_log(open_store(root), config_of(), "watched")
    log.record_state("running", by="flow")
    app = create_app(settings_of(root, tmp_path))
    arrived: list[float] = []

    def follow() -> None:
        events(f"{url}/v1/runs/watched/events/stream", at_most=2)
        arrived.append(time.monotonic())

    with served(app) as url:
        clients = [threading.Thread(target=follow) for _ in range(8)]
        for client in clients:
            client.start()
        time.sleep(1.5)
        published = time.monotonic()
        log.publish_step(train_step(0))
        for client in clients:
            client.join(10)
    assert len(arrived) == 8
    assert max(arrived) - published < 3


def test_a_stream_of_no_run_is_a_problem_not_an_empty_stream(tmp_path: Path) -> None:
    response = client_of(settings_of(make_root(tmp_path / "runs"), tmp_path)).get("/v1/runs/nobody/events/stream")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_nonsense_as_last_event_id_begins_at_the_beginning(tmp_path: Path) -> None:
    with served(create_app(settings_of(make_root(tmp_path / "runs"), tmp_path))) as url:
        streamed = events(f"{url}/v1/runs/{DONE}/events/stream", last_id="e9.nonsense")
    assert len(streamed) == 19  # 12 steps, 2 states, 4 evaluations, the end


def test_the_example_client_of_the_docs_launches_follows_and_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specification = importlib.util.spec_from_file_location("example_client", ROOT / "docs" / "example_client.py")
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    root = str(tmp_path / "runs")

    def as_a_worker_would(prefect: Prefect) -> None:
        while not prefect.flow_runs:
            time.sleep(0.05)
        (asked,) = prefect.flow_runs.values()
        config = RunConfig.model_validate(asked["parameters"]["config"])
        log = new_log(open_store(root), config, asked["parameters"]["run_id"])
        log.record_state("running", by="flow")
        publish_run(log, config)
        log.record_state("completed", by="flow")

    with prefect_stand_in() as prefect, served(create_app(settings_of(root, tmp_path))) as url:
        monkeypatch.setenv("PREFECT_API_URL", prefect.url)
        worker = threading.Thread(target=as_a_worker_would, args=(prefect,))
        worker.start()
        example.main(url, "quickstart", "learner.num_steps=2", "evaluate.every=2")
        worker.join()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("step 1 trained")]
    assert "succeeded" in printed
    assert printed[-3] == "version\taccuracy\tkl_nats"
    assert printed[-1].startswith("2\t0.")
