"""The command line, Prefect's server and worker, and the role processes, for real; and what they do when killed.

All tests share one stack in a temporary home on a port of its own, and one storage root, so that the tiny student is
pre-trained once. The last test kills the stack; keep it last.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pipeline
import psutil
import pytest
import yaml
from patience import stretched

from asyncopd.local.processes import STACK_HOME, ProcessRecord
from storage.run_log import StoredRunLog
from storage.stores import open_store

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
NUM_STEPS = 45
ROLES = ("learn-0", "rollout-0", "score-0")


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of `condition`."""
    began = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - began < stretched(seconds), f"waited {time.monotonic() - began:.0f} s for {what}"
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Stack:
    """A local stack of these tests' own, used as a user would: by its commands and Prefect's."""

    home: Path
    url: str
    root: Path
    config: Path
    service_url: str

    @property
    def environment(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "ASYNCOPD_"))}
        own = {"ASYNCOPD_HOME": str(self.home), "PREFECT_API_URL": self.url, "ASYNCOPD_SERVICE_URL": self.service_url}
        return inherited | own | {"OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str, module: str = "asyncopd.cli") -> subprocess.Popen[str]:
        # A proxy that knows nothing of this machine's ports, as companies have them. Prefect's own command minds it.
        proxies = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=self.environment | (proxies if module == "asyncopd.cli" else {}),
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A background job of a script inherits SIGINT ignored; a user at a terminal does not.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def call(self, *arguments: str, module: str = "asyncopd.cli", expect: int = 0, timeout_s: float = 300) -> str:
        """Output of a command that must end with status `expect`."""
        with self.start(*arguments, module=module) as process:
            output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == expect, f"status {process.returncode}, expected {expect}:\n{output}"
        return output

    def deploy_run(self, *arguments: str) -> str:
        """Output of Prefect's own `prefect deployment run asyncopd/train`."""
        return self.call("deployment", "run", "asyncopd/train", *arguments, module="prefect")

    def api(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        response = httpx.request(method, f"{self.url}{path}", json=body, timeout=30)
        response.raise_for_status()
        return response.json()

    def state(self, flow_run_id: str) -> dict[str, Any]:
        state: dict[str, Any] = self.api("GET", f"/flow_runs/{flow_run_id}")["state"]
        return state

    def log(self, run_id: str) -> StoredRunLog:
        return StoredRunLog(open_store(str(self.root)), run_id)

    def recorded(self) -> dict[str, psutil.Process]:
        """Processes on record that run, by name."""
        found = {}
        for path in (self.home / "processes").glob("*.json"):
            try:
                record = ProcessRecord(**json.loads(path.read_text()))
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            if (process := record.process()) is not None:
                found[record.name] = process
        return found

    def roles(self) -> set[str]:
        return set(self.recorded()) - {"server", "worker", "service", "flow"}

    def everything(self) -> list[psutil.Process]:
        """Whatever carries the mark of this stack, recorded or not."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(STACK_HOME) == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with socket.socket() as probe, socket.socket() as second:
        probe.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, service_port = probe.getsockname()[1], second.getsockname()[1]
    config = folder / "small.yaml"
    limits = pipeline.SMALL["limits"] | {"deadline_s": 60, "heartbeat_s": 0.5, "poll_s": 0.01}
    storage = {"root": str(folder / "runs"), "min_free_bytes": 1_000_000}
    config.write_text(yaml.safe_dump({**pipeline.SMALL, "storage": storage, "limits": limits}))
    stack = Stack(
        folder / "home", f"http://127.0.0.1:{port}/api", folder / "runs", config, f"http://127.0.0.1:{service_port}"
    )
    try:
        stack.call("up")
        yield stack
    finally:
        stack.call("down")
        left = stack.everything()
        for process in left:
            process.kill()
        assert left == []


def test_train_ends_with_a_report_and_status_0(stack: Stack) -> None:
    output = stack.call("train", str(stack.config), "--run-id", "whole")
    assert "$ prefect deployment run asyncopd/train -p run_id=whole" in output
    assert "Trained 4 of 4 steps" in output
    written = {path.name for path in (stack.home / "reports" / "whole").iterdir()}
    assert {"report.md", "summary.json", "quality.png", "timeline.png", "trace.json"} <= written
    assert [e.version.number for e in stack.log("whole").evaluations()] == [0, 4]

    (flow_run,) = stack.api("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": ["whole"]}}})
    artifacts = stack.api(
        "POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}, "sort": "CREATED_DESC"}
    )
    by_key = {artifact["key"]: artifact for artifact in reversed(artifacts)}
    assert {key: artifact["type"] for key, artifact in by_key.items()} == {
        "training-progress": "progress",
        "report": "markdown",
        "evaluations": "table",
        "run-folder": "markdown",
    }
    assert by_key["training-progress"]["data"] == 100.0
    assert len(json.loads(by_key["evaluations"]["data"])) == 2
    assert stack.roles() == set()


def test_up_finds_everything_running_and_status_shows_it(stack: Stack) -> None:
    before = {name: process.pid for name, process in stack.recorded().items() if name != "flow"}
    started = time.monotonic()
    assert f"up: {stack.url.removesuffix('/api')}" in stack.call("up")
    assert time.monotonic() - started < 10
    assert before == {name: stack.recorded()[name].pid for name in ("server", "worker", "service")}
    shown = stack.call("status")
    assert "worker: online" in shown
    assert f"service: {stack.service_url}" in shown
    ready = httpx.get(f"{stack.service_url}/readyz", timeout=30)
    assert ready.status_code == 200, ready.text
    assert "step 4 of 4" in stack.call("status", "whole", "--root", str(stack.root))


def test_a_run_whose_failure_would_repeat_itself_ends_at_once(stack: Stack) -> None:
    # The service answers, but is no teacher. The score role used to be started four times to find that out.
    settings = ("engine=openai", "name=served", "model=m", f"urls=[{stack.service_url}]", "compare_text=false")
    overrides = [part for setting in settings for part in ("--set", f"teacher.{setting}")]
    output = stack.call(
        "train", str(stack.config), "--run-id", "unfit", "--set", "evaluate.every=0", *overrides, expect=1
    )
    assert re.search(r"FAILED.*: score-0 ended with exit status 78: EngineError: teacher served: ", output)
    assert f"{stack.service_url}/v1/models: status 404" in output
    assert len(stack.log("unfit").failures()) == 1


def test_a_run_that_fails_ends_with_status_1_and_the_roles_reason(stack: Stack) -> None:
    # Valid on paper: only a role finds out that nothing can be published within a millisecond. The reason shown used to
    # be "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)".
    settings = ("limits.deadline_s=0.001", "limits.max_restarts=0", "evaluate.every=0")
    overrides = [part for setting in settings for part in ("--set", setting)]
    output = stack.call("train", str(stack.config), "--run-id", "late", *overrides, expect=1)
    assert re.search(
        r"FAILED.*RoleFailedError: \w+-0 ended with exit status 1: DeadlineError: .* waited 0 s for ", output
    )
    assert f"Logs of its roles: {stack.home}/logs/late/" in output
    assert f"Go on with: asyncopd train --run-id late --root {stack.root}" in output
    until(lambda: not stack.roles(), 10, "the other roles to end")


def test_a_run_goes_on_after_whatever_stopped_it(stack: Stack) -> None:
    log = stack.log("story")
    resume = ("--run-id", "story", "--root", str(stack.root))

    def num_steps() -> int:
        return len(log.steps())

    def until_steps(number: int) -> None:
        until(lambda: num_steps() >= number, 120, f"step {number}; there are {num_steps()}")

    def until_no_roles() -> None:
        until(lambda: not stack.roles(), 10, "every role to end")

    # A role is killed: it is started again, and training goes on. At τ = 0 a step waits for three looks at storage, so
    # poll_s holds the pace below four steps per second, on any machine.
    slowly = {
        "staleness.max_staleness": 0,
        "limits.poll_s": 0.1,
        "evaluate.every": 0,
        "learner.num_steps": NUM_STEPS,
        "learner.checkpoint_every": 7,
    }
    output = stack.deploy_run(
        "-p", f"config={stack.config}", "-p", f"overrides={json.dumps(slowly)}", "-p", "run_id=story"
    )
    flow_run_id = re.findall(r"UUID: (\S+)", output)[0]
    until_steps(2)
    killed = stack.recorded()["score-0"]
    killed.kill()
    until(lambda: stack.recorded().get("score-0", killed) != killed, 10, "the scorer to be started again")
    until_steps(num_steps() + 3)

    # Prefect cancels.
    stack.api("POST", f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    until_no_roles()
    until(lambda: stack.state(flow_run_id)["type"] == "CANCELLED", 30, "the flow to be cancelled")
    # Workers that joined from elsewhere learn of it here: the flow cannot reach them.
    assert (log.run_state().state, log.run_state().reason) == ("stopped", "cancelled")
    published = _published(stack.root / "runs" / "story")

    # Ctrl-C. The learner first goes back to its checkpoint, so the steps after it are counted again.
    before = num_steps()
    with stack.start("train", *resume) as following:
        until_steps(before + 2)
        following.send_signal(signal.SIGINT)
        until_no_roles()
        output, _ = following.communicate(timeout=30)
    assert following.returncode == 130
    assert "stopped after" in output
    assert f"Go on with: asyncopd train --run-id story --root {stack.root}" in output

    # The flow is killed: its roles end by themselves.
    before = num_steps()
    with stack.start("train", *resume) as following:
        until_steps(before + 2)
        stack.recorded()["flow"].kill()
        until_no_roles()
        output, _ = following.communicate(timeout=60)
    assert following.returncode == 1
    assert "CRASHED" in output
    assert "Go on with: asyncopd train --run-id story" in output

    # To the end, by Prefect's own command.
    assert num_steps() < NUM_STEPS
    output = stack.deploy_run("-p", "run_id=story", "-p", f"root={stack.root}", "--watch")
    assert "Flow run finished successfully" in output
    assert stack.log("story").run_state().state == "completed"
    steps = log.steps()
    assert [index for step in steps for index in step.indices.indices] == list(range(8 * NUM_STEPS))
    assert all(set(step.staleness_tokens) == {0} for step in steps)
    assert len(log.rewinds()) >= 1
    now = _published(stack.root / "runs" / "story")
    assert published.items() <= now.items()


def test_down_leaves_nothing_after_server_worker_and_flow_were_killed(stack: Stack) -> None:
    stack.deploy_run("-p", f"config={stack.config}", "-p", "run_id=orphan")
    until(lambda: set(ROLES) <= stack.roles(), 60, "the roles to start")
    processes = stack.recorded()
    for name in ("worker", "server", "flow"):
        processes[name].kill()
    output = stack.call("status", expect=3)
    assert "server: none" in output
    stack.call("down")
    assert stack.everything() == []
    assert stack.recorded() == {}
    assert all(_is_gone(processes[name]) for name in ROLES)


def _is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # an orphan whose new parent has not looked yet
    except psutil.NoSuchProcess:
        return True


def _published(run: Path) -> dict[str, bytes]:
    """Every object of the run's trajectories and scores, by path."""
    return {str(path): path.read_bytes() for kind in ("trajectories", "scores") for path in _files(run / kind)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
