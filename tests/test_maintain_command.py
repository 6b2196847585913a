"""`asyncopd maintain`: what it prints and its exit status, on files and on a run that goes on; and the Prefect flow."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pipeline
import pytest
from maintain_runs import new_log, train
from storage_builders import fresh_store

from asyncopd.cli import main
from asyncopd.types import IndexRange, PolicyVersion
from flows.wiring import open_stored_run
from storage.maintain.audit import audit_run
from storage.run_log import StoredRunLog


@pytest.fixture
def log(tmp_path: Path) -> StoredRunLog:
    log = new_log(fresh_store("file", tmp_path))
    train(log, 0, 4)
    return log


def maintain(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit status, what was printed, errors included)."""
    with pytest.raises(SystemExit) as ended:
        main(["maintain", *arguments])
    printed = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, printed.out + printed.err


def test_an_audit_ends_with_status_0_when_all_is_well(log: StoredRunLog, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = maintain(capsys, "audit", "run", "--root", log.store.url)
    assert status == 0
    assert "data objects verified" in text
    assert text.rstrip().endswith("clean")


def test_an_audit_ends_with_status_1_and_says_how_to_mend(
    log: StoredRunLog, capsys: pytest.CaptureFixture[str]
) -> None:
    key = log.layout.shard_manifest(log.layout.trajectories, IndexRange(0, 2))
    log.store.put(key, b"{}")
    with pytest.raises(SystemExit) as ended:
        main(["maintain", "audit", "run", "--root", log.store.url, "--json"])
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["clean"] is False
    (finding,) = [finding for finding in report["findings"] if finding["key"] == key]
    assert finding["problem"] == "corrupt"
    assert finding["mend"] == f"asyncopd maintain quarantine {key} --root {log.store.url}"


def test_a_run_that_is_not_there_is_named(log: StoredRunLog, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = maintain(capsys, "audit", "nowhere", "--root", log.store.url)
    assert status == 2
    assert "there is no run nowhere" in text


def test_collect_prints_bytes_and_removes_nothing_in_a_dry_run(
    log: StoredRunLog, capsys: pytest.CaptureFixture[str]
) -> None:
    orphan = log.layout.shard_object(log.layout.trajectories, IndexRange(40, 42))
    log.store.put(orphan, b"12345")
    options = ("run", "--root", log.store.url, "--grace-s", "0")
    status, text = maintain(capsys, "collect", *options, "--dry-run")
    assert (status, log.store.exists(orphan)) == (0, True)
    assert "would remove" in text
    assert f"{5:>12,} bytes  {orphan}" in text
    status, text = maintain(capsys, "collect", *options)
    assert (status, log.store.exists(orphan)) == (0, False)
    status, text = maintain(capsys, "collect", *options)
    assert "removed 0 objects, 0 bytes" in text


def test_quarantine_says_what_follows(log: StoredRunLog, capsys: pytest.CaptureFixture[str]) -> None:
    key = log.layout.checkpoint_manifest(4, 0)
    status, text = maintain(capsys, "quarantine", key, "--root", log.store.url)
    assert status == 0
    assert "a resume starts after step 1 now." in text
    assert log.latest_checkpoint() == (2, 0)


async def test_a_run_that_goes_on_can_be_audited_at_any_moment(tmp_path: Path) -> None:
    config = pipeline.small_config(tmp_path, learner__num_steps=24, learner__checkpoint_every=3, evaluate__every=10)
    run = pipeline.new_run(config)
    running = asyncio.create_task(pipeline.run_all(run))
    num_audits = 0
    while not running.done():
        report = await asyncio.to_thread(
            audit_run, open_stored_run(str(tmp_path), run.log.run_id).store, run.log.run_id, grace_s=60, recheck_s=0.2
        )
        assert report.is_clean, report.findings
        num_audits += 1
    await running
    assert num_audits >= 3
    assert audit_run(run.store, run.log.run_id, grace_s=0, recheck_s=0).is_clean


@pytest.mark.slow
def test_the_flow_fails_when_an_audit_finds_something(log: StoredRunLog, tmp_path: Path) -> None:
    # In a child: Prefect's temporary server belongs to a process of its own.
    # An evaluation: without a step's record collection would rightly refuse.
    broken = log.layout.key("evaluation", state=PolicyVersion(0))
    log.store.put(broken, b"{}")
    script = """
import asyncio, sys
from prefect.testing.utilities import prefect_test_harness
from flows.requests import maintain
with prefect_test_harness():
    state = asyncio.run(maintain("audit", "run", sys.argv[1], return_state=True))
    print(state.type.value, state.message)
    state = asyncio.run(maintain("collect", "run", sys.argv[1], return_state=True))
    print(state.type.value)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, log.store.url],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "FAILED" in ended.stdout, ended.stderr[-3000:]
    assert f"maintain quarantine {broken}" in ended.stdout
    assert ended.stdout.rstrip().endswith("COMPLETED")
