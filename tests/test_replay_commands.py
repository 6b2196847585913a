"""`asyncopd replay` and its siblings as a user runs them: in a terminal's process group, with Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from offline_builders import make_run, weights

from asyncopd.config.requests import CounterfactualRequest
from flows.wiring import OpenRun, open_stored_run
from storage.runs import list_runs

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return make_run(tmp_path_factory.mktemp("commands"), learner__num_steps=40, learner__checkpoint_every=5)


def start(parent: OpenRun, home: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "asyncopd.cli", *arguments, "--root", parent.config.storage.root]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "ASYNCOPD_HOME": str(home), "COLUMNS": "200"},
        # A shell's background job ignores SIGINT and its children inherit that; a terminal's does not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_ctrl_c_stops_a_replay_and_the_same_command_goes_on(parent: OpenRun, tmp_path: Path) -> None:
    first = start(parent, tmp_path, "replay", "parent")
    deadline = time.monotonic() + 120
    child = None
    while child is None or child.log.find_step(8) is None:
        assert time.monotonic() < deadline, "the replay did not come to step 8"
        assert first.poll() is None, first.communicate()
        found = [run for run in list_runs(parent.store) if run.startswith("parent-replay-")]
        child = open_stored_run(parent.config.storage.root, found[0]) if found else None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)
    output, errors = first.communicate(timeout=30)
    assert first.returncode == 130, (output, errors)
    assert "The same command goes on." in output
    assert "Traceback" not in errors
    assert child.log.find_step(39) is None

    second = start(parent, tmp_path, "replay", "parent")
    output, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    assert "ends with the parent's weights, bit for bit" in output
    again = open_stored_run(parent.config.storage.root, child.log.run_id)
    assert weights(again) == weights(parent)
    assert [step.step for step in again.log.steps()] == list(range(40))


@pytest.mark.slow
def test_a_refusal_ends_with_status_2_and_its_reason(parent: OpenRun, tmp_path: Path) -> None:
    refused = start(parent, tmp_path, "replay", "parent", "--set", "loss.name=forward_kl")
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "asyncopd backfill parent --top-k 16" in errors
    assert "Traceback" not in errors


def test_a_flow_starts_the_child_with_the_command_lines_defaults() -> None:
    command = CounterfactualRequest(lag=3).command("x", "r", watch_parent=True)
    assert command[1:7] == ["-m", "flows.offline", "--watch-parent", "counterfactual", "x", "r"]
    assert '"staleness":[0,1,2,4,8,16,32,64]' in command[7]
    assert '"lag":3' in command[7]
    assert '"order":["index","arrival"]' in command[7]
