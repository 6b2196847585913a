"""Following a run in the terminal: from before it exists to its end, and its report afterwards."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import START, config_of, evaluation, new_log, publish_run, train_step, weights_of

from asyncopd.cli.progress import ProgressWatch, panel, plain_line
from asyncopd.cli.train import follow, show_report
from asyncopd.config import RunConfig
from asyncopd.errors import StorageError
from asyncopd.records import WorkerStatus
from flows.report import summarise
from storage.layout import parse_version
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.stores import open_store
from storage.stores.base import ObjectStore

ROLLOUT, LEARN = "rollout-host-1-aaaa", "learn-host-2-bbbb"


class Clock:
    """A clock the test moves."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "root"))


@pytest.fixture
def log(store: ObjectStore) -> StoredRunLog:
    return new_log(store, config_of())


def watch_of(log: StoredRunLog, clock: Callable[[], float] | None = None) -> ProgressWatch:
    return ProgressWatch(RunView(log), config_of(), clock=clock or Clock())


def terminal(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=150, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def follow_through(
    log: StoredRunLog, config: RunConfig, moments: Sequence[Callable[[], object]], *, is_terminal: bool = False
) -> str:
    """Follow a run to which `moments` happen one by one between looks; returns what was printed."""
    remaining = list(moments)
    console = terminal(is_terminal=is_terminal)

    def is_over() -> str | None:
        if not remaining:
            return "COMPLETED"
        remaining.pop(0)()
        return None

    assert follow(RunView(log), config, console=console, is_over=is_over, poll_s=0, plain_every_s=0) == "COMPLETED"
    return text_of(console)


# -- the fold -----------------------------------------------------------------------------------------------------
def test_totals_sum_over_workers_and_outlive_their_retirement(log: StoredRunLog) -> None:
    # A worker that died was replaced by one that counts from 0 again.
    watch = watch_of(log)
    log.heartbeat(ROLLOUT, WorkerStatus(role="rollout", num_tokens=500))
    assert watch.look().tokens["rollout"] == 500
    log.retire(ROLLOUT)
    log.heartbeat("rollout-host-9-cccc", WorkerStatus(role="rollout", num_tokens=20))
    progress = watch.look()
    assert progress.tokens["rollout"] == 520
    assert [role.worker for role in progress.workers] == ["rollout-host-9-cccc"]


def test_rates_are_those_that_living_workers_tell(log: StoredRunLog) -> None:
    log.heartbeat(ROLLOUT, WorkerStatus(role="rollout", num_tokens=0))
    assert watch_of(log).look().rates["rollout"] is None
    log.heartbeat(ROLLOUT, WorkerStatus(role="rollout", tokens_per_s=300.0))
    log.heartbeat("rollout-host-9-cccc", WorkerStatus(role="rollout", tokens_per_s=20.0))
    assert watch_of(log).look().rates["rollout"] == 320
    late = ProgressWatch(RunView(log), config_of(), wall_clock=lambda: time.time() + 60)
    assert late.look().rates["rollout"] is None


def test_each_step_is_read_once(log: StoredRunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    find = log.store.find
    monkeypatch.setattr(log.store, "find", lambda key: read.append(key) or find(key))
    watch = watch_of(log)
    for number in range(3):
        log.publish_step(train_step(number))
    assert len(watch.look().history.steps) == 3
    watch.look()
    steps = [parse_version(key) for key in read if "/steps/" in key]
    assert [step.number for step in steps if step] == [0, 1, 2, 3, 3]


def test_a_rewind_takes_steps_back(log: StoredRunLog) -> None:
    watch = watch_of(log)
    for number in range(4):
        log.publish_step(train_step(number, num_tokens=10))
    assert watch.look().tokens["learn"] == 40
    rewind = log.record_rewind(2, worker=LEARN)
    progress = watch.look()
    assert (len(progress.history.steps), progress.tokens["learn"], progress.rates["learn"]) == (2, 20, None)
    log.publish_step(train_step(2, num_tokens=10, rewind=rewind))
    assert len(watch.look().history.steps) == 3


def test_the_time_left_ignores_the_pause_before_a_resumption(log: StoredRunLog) -> None:
    for number, finished in enumerate([0, 2, 4, 10_000, 10_002, 10_004]):
        log.publish_step(train_step(number, finished=START + finished))
    log.heartbeat("learn-1", WorkerStatus(role="learn"))
    assert watch_of(log).look().eta_s == pytest.approx(6 * 2)


def test_the_time_left_is_known_from_the_first_finished_shard(log: StoredRunLog) -> None:
    # 12 steps of 8 responses of 100 tokens; 4 finished, 200 tokens of others made, 10 tokens/s.
    config = config_of(learner={"num_steps": 12, "batch_size": 8})
    sampling = WorkerStatus(role="rollout", num_begun=4, num_tokens_in_flight=200, tokens_per_s=10.0)
    log.heartbeat(ROLLOUT, sampling)
    assert ProgressWatch(RunView(log), config).look().eta_s is None
    log.heartbeat(ROLLOUT, replace(sampling, num_trajectories=4, num_tokens=400))
    assert ProgressWatch(RunView(log), config).look().eta_s == pytest.approx((12 * 8 * 100 - 600) / 10)
    # One that waits for the learner, because of the staleness bound, says nothing of its pace.
    log.heartbeat(ROLLOUT, replace(sampling, num_trajectories=4, num_tokens=400, tokens_per_s=0.1, busy=0.0))
    assert ProgressWatch(RunView(log), config).look().eta_s is None
    log.heartbeat(ROLLOUT, replace(sampling, num_trajectories=4, num_tokens=400, busy=1.0))
    # A teacher that is slower decides.
    log.heartbeat("score-1", WorkerStatus(role="score", num_trajectories=4, num_tokens=400, tokens_per_s=5.0))
    assert ProgressWatch(RunView(log), config).look().eta_s == pytest.approx((12 * 8 * 100 - 400) / 5)


def test_a_first_shard_on_its_way_is_seen_in_line_and_panel(log: StoredRunLog) -> None:
    # Half a minute of sampling looked as if nothing happened: 0 responses, 0 tokens/s.
    log.publish_policy(weights_of(0), worker=LEARN)
    sampling = WorkerStatus(role="rollout", version=0, num_trajectories=0, num_tokens=0, num_begun=4)
    now = replace(sampling, num_tokens_in_flight=512, tokens_per_s=0.4, doing="prefills 2 prompts")
    log.heartbeat(ROLLOUT, now)
    log.heartbeat("score-1", WorkerStatus(role="score", doing="loads the teacher"))
    log.heartbeat(LEARN, WorkerStatus(role="learn", step=0, num_steps=12, waiting_for="scores of 000000-000003"))
    progress = watch_of(log).look()
    console = terminal(is_terminal=False)
    console.width = 400
    console.print(panel(progress, "run", config_of()))
    for shown in (plain_line(progress, config_of()), text_of(console)):
        assert "rollout prefills 2 prompts; samples with version 0" in shown.replace(
            "rollout  prefills", "rollout prefills"
        )
        assert "4 responses begun, 512 tokens in flight; 0.4 tokens/s" in shown
        assert "loads the teacher" in shown
        assert "waits for scores of 000000-000003" in shown
        assert " 0 tokens/s" not in shown
    assert "time left not known yet" in plain_line(progress, config_of())


def test_a_step_of_a_minute_shows_its_micro_batches(log: StoredRunLog) -> None:
    log.publish_step(train_step(0))
    log.heartbeat(LEARN, WorkerStatus(role="learn", step=1, num_steps=12, doing="step 2: micro-batch 3 of 8"))
    assert "| learn step 2: micro-batch 3 of 8 |" in plain_line(watch_of(log).look(), config_of())


def test_staleness_is_that_of_the_last_steps_tokens(log: StoredRunLog) -> None:
    log.publish_step(train_step(0, staleness_tokens={0: 100}))
    log.publish_step(train_step(1, staleness_tokens={0: 50, 1: 50}))
    progress = watch_of(log).look()
    assert (progress.staleness.mean_versions, progress.staleness.max_versions) == (0.25, 1)


def test_a_worker_whose_heartbeat_stands_still_is_called_silent(log: StoredRunLog) -> None:
    log.heartbeat(ROLLOUT, WorkerStatus(role="rollout", num_tokens=0))
    beaten = log.heartbeats()[ROLLOUT].beaten
    for later_s, silent_s in ((2, 0), (60, 60)):
        watch = ProgressWatch(RunView(log), config_of(), clock=Clock(), wall_clock=Clock(beaten + later_s))
        assert watch.look().silent_s.get(ROLLOUT, 0) == pytest.approx(silent_s)


# -- what is shown ------------------------------------------------------------------------------------------------
def a_run(store: ObjectStore, config: RunConfig) -> list[Callable[[], object]]:
    """What happens, one thing after another, in a run that at first does not exist."""
    log = StoredRunLog(store, "late")
    pretraining = WorkerStatus(role="pretrain", model="student", step=120, num_steps=500, loss_nats=1.25)
    sampling = WorkerStatus(role="rollout", num_tokens=300, num_trajectories=24, version=0)
    learning = WorkerStatus(role="learn", step=1, num_steps=12, waiting_for="scores of 000008-000011")
    return [
        lambda: None,
        lambda: new_log(store, config, "late"),
        lambda: log.heartbeat("pretrain-host-1-aaaa", pretraining),
        lambda: log.retire("pretrain-host-1-aaaa"),
        lambda: log.publish_policy(weights_of(0), worker=LEARN),
        lambda: log.heartbeat(ROLLOUT, sampling),
        lambda: log.publish_evaluation(evaluation(0, 0.43)),
        lambda: log.publish_step(train_step(0, staleness_tokens={0: 100})),
        lambda: log.heartbeat(LEARN, learning),
        lambda: log.publish_failure("score", "score-host-1-aaaa", "EngineError: no memory"),
    ]


def test_a_log_gets_plain_lines_from_before_the_run_exists_to_its_end(store: ObjectStore) -> None:
    config = config_of()
    printed = follow_through(StoredRunLog(store, "late"), config, a_run(store, config))
    lines = printed.splitlines()
    assert "waiting for a worker to start the flow" in lines[0]
    assert any("pretrain student: step 120 of 500, loss 1.2500 nats" in line for line in lines)
    assert "step 1 of 12" in lines[-1]
    assert "loss 0.78" in lines[-1]
    assert "accuracy 43.0 %" in lines[-1]
    assert "staleness 0.00 mean, 0 max of 2 allowed" in lines[-1]
    assert [line for line in lines if line.startswith("failure")] == ["failure: score: EngineError: no memory"]
    assert "\x1b" not in printed


def test_a_terminal_gets_a_panel_with_what_every_role_does(store: ObjectStore) -> None:
    config = config_of()
    printed = follow_through(StoredRunLog(store, "late"), config, a_run(store, config), is_terminal=True)
    last = printed[printed.rindex("late ") :]
    assert "step 1 of 12" in last
    assert "samples with version 0, 24 responses" in last
    assert "next waits for scores of 000008-000011" in last
    assert "score: EngineError: no memory" in last


def test_plain_lines_come_at_their_interval_and_the_last_always(log: StoredRunLog) -> None:
    console = terminal(is_terminal=False)
    states = iter([None] * 20 + ["FAILED"])
    follow(RunView(log), config_of(), console=console, is_over=lambda: next(states), poll_s=0, plain_every_s=3600)
    assert len(text_of(console).splitlines()) == 2


def test_storage_that_does_not_answer_for_a_moment_does_not_end_the_following(
    log: StoredRunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        monkeypatch.setattr(log.store, "find", lambda key: (_ for _ in ()).throw(StorageError("503 slow down")))

    printed = follow_through(log, config_of(), [fail, monkeypatch.undo, lambda: log.publish_step(train_step(0))])
    assert "storage does not answer, trying again: 503 slow down" in printed
    assert "step 1 of 12" in printed.splitlines()[-1]


def test_what_a_name_contains_is_not_taken_for_markup(log: StoredRunLog) -> None:
    log.heartbeat(ROLLOUT, WorkerStatus(role="rollout", waiting_for="version [/bold] 3"))
    console = terminal(is_terminal=True)
    console.print(panel(watch_of(log).look(), "run", config_of()))
    assert "version [/bold] 3" in text_of(console)


# -- the report in the terminal -----------------------------------------------------------------------------------
def test_the_report_shows_quality_speed_and_where_the_files_are(log: StoredRunLog, tmp_path: Path) -> None:
    publish_run(log, config_of())
    summary = summarise(log, config_of())
    (tmp_path / "summary.json").write_text(summary.to_json())
    (tmp_path / "timeline.png").touch()
    console = terminal(is_terminal=False)
    show_report(tmp_path, console=console)
    printed = text_of(console)
    for shown in ("accuracy, noise 0.85", "KL to teacher", "throughput", "overlap", "orchestration", "staleness"):
        assert shown in printed
    assert f"{summary.overlap:.2f}" in printed
    assert str(tmp_path / "report.md") in printed
    assert "timeline.png" in printed


def test_a_missing_report_is_said_to_be_missing(tmp_path: Path) -> None:
    console = terminal(is_terminal=False)
    show_report(tmp_path / "nothing", console=console)
    assert "no report" in text_of(console)
