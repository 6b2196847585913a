"""Page, terminal, report, SQL and audit say the same of one awkward run, and so does whoever watched it happen."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from service_world import client_of, settings_of
from synthetic_run import config_of, evaluation, new_log, publish_run, train_step, weights_of

from api.reader import RunReader
from asyncopd.cli.progress import ProgressWatch, plain_line
from asyncopd.errors import StorageError
from asyncopd.records import Heartbeat, WorkerStatus
from asyncopd.types import PolicyVersion
from flows.report import observe, summarise
from storage.catalog.notebook import open_run as open_to_query
from storage.history import STARTING_S, status_of
from storage.maintain.ledger import ledger_of
from storage.maintain.quarantine import set_aside
from storage.records import to_json
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.runs import LaunchLog
from storage.stores import open_store

CONFIG = config_of()
SURVIVING = [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 2)]
SUPERSEDED = [(3, 0), (4, 0), (4, 1), (5, 0)]
"""(step, rewind)."""


def retrain(log: StoredRunLog, step: int, rewind: int) -> None:
    version = PolicyVersion(step + 1, rewind)
    log.publish_step(train_step(step, rewind=rewind, version=version, indices=CONFIG.plan.step(step)))


@pytest.fixture
def log(tmp_path: Path) -> StoredRunLog:
    """Twice rewound; every worker retired but a learner that works and a sampler that fell silent; a role failed; and
    somebody has asked for a pause that has not happened yet."""
    log = new_log(open_store(str(tmp_path / "runs")), CONFIG, "awkward")
    log.record_state("running", by="flow")
    publish_run(log, CONFIG, num_steps=6)
    for rewind, (to_step, steps) in enumerate([(3, (3, 4)), (4, (4, 5))], start=1):
        assert log.record_rewind(to_step, worker="learn-2") == rewind
        for step in steps:
            retrain(log, step, rewind)
    log.publish_evaluation(replace(evaluation(4, 0.6), version=PolicyVersion(4, 1)))
    log.publish_failure("score", "score-2", "EngineError: no memory")
    log.heartbeat("learn-2", WorkerStatus(role="learn", busy=0.5))
    silent = Heartbeat("rollout-2", time.time() - 60, retired=False, status=WorkerStatus(role="rollout"))
    log.store.put(log.layout.key("heartbeat", worker="rollout-2"), to_json(silent))
    LaunchLog(log.store).record_request(log.run_id, "paused")
    return log


def test_everybody_counts_the_same_steps(log: StoredRunLog, tmp_path: Path) -> None:
    client, numbers = client_of(settings_of(log.store.url, tmp_path)), [step for step, _ in SURVIVING]
    run = client.get(f"/v1/runs/{log.run_id}").json()
    events = client.get(f"/v1/runs/{log.run_id}/events", params={"limit": 1000}).json()["data"]
    assert run["progress"]["steps"] == len(SURVIVING)
    assert client.get(f"/v1/runs/{log.run_id}/metrics").json()["steps"] == numbers
    assert [event["data"]["to_step"] for event in events if event["kind"] == "rewind"] == [3, 4]

    progress = ProgressWatch(RunView(log), CONFIG).look()
    seen = observe(RunView(log), CONFIG.teacher.name)
    audited = RunView.everything(log.store, log.run_id)
    for steps in (progress.history.steps, seen.steps, audited.steps(), log.steps()):
        assert [(step.step, step.rewind) for step in steps] == SURVIVING
    assert seen.num_rewinds == len(audited.rewinds) == 2
    assert summarise(log, CONFIG).num_steps == len(SURVIVING)

    stored = open_to_query(f"{log.store.url}/runs/{log.run_id}")
    for relation, expected in (("steps", SURVIVING), ("superseded_steps", SUPERSEDED)):
        rows = stored.sql(f"SELECT step, rewind FROM {relation} ORDER BY ALL").rows()
        assert [(row["step"], row["rewind"]) for row in rows] == expected
    trained = {index for step, _ in SURVIVING for index in CONFIG.plan.step(step).indices}
    assert set(ledger_of(log).indices("trained")) == trained


def test_everybody_shows_the_same_evaluations_and_figures(log: StoredRunLog, tmp_path: Path) -> None:
    client = client_of(settings_of(log.store.url, tmp_path))
    listed = client.get(f"/v1/runs/{log.run_id}/evals").json()["data"]
    latest = client.get(f"/v1/runs/{log.run_id}").json()["latest"]
    progress, seen = ProgressWatch(RunView(log), CONFIG).look(), observe(RunView(log), CONFIG.teacher.name)
    assert [e["version"] for e in listed] == [e.version.number for e in seen.evaluations] == [0, 4]
    assert latest["accuracy"] == progress.history.evaluations[-1].accuracy == seen.evaluations[-1].accuracy == 0.6
    # Fewer steps than the window of page and terminal: it is the whole run, as in the report.
    mean = summarise(log, CONFIG).staleness.mean_versions
    assert latest["staleness_mean_versions"] == progress.staleness.mean_versions == mean
    assert latest["tokens_per_s"] == progress.rates["learn"]


def test_everybody_says_the_same_of_a_first_shard_on_its_way(tmp_path: Path) -> None:
    log = new_log(open_store(str(tmp_path / "runs")), CONFIG, "young")
    log.record_state("running", by="flow")
    log.publish_policy(weights_of(0), worker="learn-1")
    sampling = WorkerStatus(role="rollout", version=0, num_begun=4, num_tokens_in_flight=512, tokens_per_s=17.0)
    log.heartbeat("rollout-1", replace(sampling, num_trajectories=4, num_tokens=400, doing="prefills 2 prompts"))
    log.heartbeat("score-1", WorkerStatus(role="score", doing="loads the teacher"))
    run = client_of(settings_of(log.store.url, tmp_path)).get("/v1/runs/young").json()
    progress = ProgressWatch(RunView(log), CONFIG).look()
    line = plain_line(progress, CONFIG)
    assert [worker["role"] for worker in run["workers"]] == ["rollout", "score"]
    for worker in run["workers"]:
        told = f"{worker['role']} {worker['activity']}"
        assert told in line
        assert told in run["phase"]
    assert "4 responses begun, 512 tokens in flight; 17 tokens/s" in run["phase"]
    assert run["eta_s"] == progress.eta_s is not None


def test_everybody_takes_the_same_workers_for_alive(log: StoredRunLog) -> None:
    page = RunReader(log.store).view(log.run_id)
    progress = ProgressWatch(RunView(log), CONFIG).look()
    audited = RunView.everything(log.store, log.run_id)
    shown = [worker.worker for worker in progress.workers if worker.worker not in progress.silent_s]
    assert page.alive_workers() == audited.alive_workers() == shown == ["learn-2"]
    assert [worker.worker for worker in progress.workers] == ["rollout-2", "learn-2"]
    with pytest.raises(StorageError, match="the learner learn-2 is alive"):
        set_aside(log.store, log.layout.step(5, 2))


def test_everybody_says_the_same_of_its_state(log: StoredRunLog, tmp_path: Path) -> None:
    client = client_of(settings_of(log.store.url, tmp_path))

    def told(now: float | None = None) -> set[str]:
        clock = time.time if now is None else lambda: now
        view = RunView(log).refresh()
        shown = {
            ProgressWatch(RunView(log), CONFIG, wall_clock=clock).look().status,
            status_of(view.history, CONFIG.learner.num_steps, LaunchLog(view.store).find_request(view.run_id), now),
        }
        return shown if now else {*shown, client.get(f"/v1/runs/{log.run_id}").json()["status"]}

    assert told() == {"pausing"}
    assert told(time.time() + 2 * STARTING_S) == {"paused"}  # its machine died with the request
    log.record_state("stopped", by="flow", reason="paused")
    time.sleep(0.3)
    assert told() == {"paused"}
    assert ProgressWatch(RunView(log), CONFIG).look().stopped == "paused"
    LaunchLog(log.store).record_request(log.run_id, "running")
    assert told() == {"queued"}
    log.record_state("running", by="another")
    log.record_state("failed", by="another", reason="EngineError: no memory")
    time.sleep(0.3)
    assert told() == {"failed"}
    assert ProgressWatch(RunView(log), CONFIG).look().stopped == "failed (EngineError: no memory)"


@pytest.mark.parametrize("seed", range(5))
def test_who_watched_a_run_has_seen_what_who_comes_late_reads(tmp_path: Path, seed: int) -> None:
    # The terminal used to cut steps by place, the page by number: after a rewind of a replay they differed.
    log, draw = new_log(open_store(f"memory://watched-{seed}"), CONFIG), random.Random(seed)
    watching, rewind, step = RunView(log), 0, draw.choice([0, 8])
    first = step
    for _ in range(40):
        if draw.random() < 0.2 and step > first:
            step = draw.randint(first, step)
            rewind = log.record_rewind(step, worker="learn")
        elif draw.random() < 0.2:
            log.publish_evaluation(replace(evaluation(step), version=PolicyVersion(step, rewind)))
        else:
            log.publish_step(replace(train_step(step, rewind=rewind), version=PolicyVersion(step + 1, rewind)))
            step += 1
        if draw.random() < 0.5:
            watching.refresh()
        late, seen = RunView(log).refresh().history, watching.refresh().history
        assert (seen.steps, seen.rewinds, seen.evaluations) == (late.steps, late.rewinds, late.evaluations)
        assert seen.columns.values("step").tolist() == [s.step for s in seen.steps] == list(range(first, step))


def test_a_record_is_read_once_and_a_look_without_news_reads_almost_nothing(
    log: StoredRunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    find = log.store.find
    monkeypatch.setattr(log.store, "find", lambda key: read.append(key) or find(key))
    view = RunView(log).refresh().read("scores", "trajectories", "claim", "policy")
    first = [key for key in read if "/heartbeats/" not in key]
    assert len(first) == len(set(first)) > 30
    read.clear()
    view.refresh().read("scores", "trajectories", "claim", "policy")
    probed = sorted(key.split("/")[2] for key in read)
    assert probed == [*["heartbeats"] * 6, "rewinds", "states", "steps"]


def test_the_events_of_a_rewound_run_are_those_of_its_records(log: StoredRunLog, tmp_path: Path) -> None:
    client = client_of(settings_of(log.store.url, tmp_path))
    page = client.get(f"/v1/runs/{log.run_id}/events", params={"limit": 1000}).json()
    steps = [e["data"]["step"] for e in page["data"] if e["kind"] == "step"]
    assert sorted(steps) == [step for step, _ in SURVIVING]
    assert [e["message"] for e in page["data"] if e["kind"] == "failure"] == ["score: EngineError: no memory"]
