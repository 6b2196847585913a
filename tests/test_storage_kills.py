"""SIGKILL inside publication, at every system call that matters; two processes at once; clocks that disagree."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from storage_builders import make_trajectories

from asyncopd.types import IndexRange
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores import open_store

ROOT = Path(__file__).parent.parent
SHARD = IndexRange(0, 4)

KILL_INSIDE_PUBLISH = """
import os, signal, sys
from storage.stores import open_store
from storage.run_log import StoredRunLog

def kill_at(call):  # the calls between which a publication can be cut, counted across all of them
    count = 0
    def counted(function):
        def wrapper(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return wrapper
    for name in ("open", "link", "replace", "unlink", "fsync", "close"):
        setattr(os, name, counted(getattr(os, name)))

call = 0
while True:
    call += 1
    child = os.fork()
    if child == 0:
        log = StoredRunLog(open_store(sys.argv[1]), "run")
        kill_at(call)
        bodies = {"model.safetensors": b"weights %d" % call, "learner.pt": bytes(5000)}
        log.publish_checkpoint(10 * call, 0, bodies, worker="learner")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    log = StoredRunLog(open_store(sys.argv[1]), "run")
    latest = log.latest_checkpoint()
    if latest is None:
        print(call, "none")
    else:  # reading verifies sizes and sha256 of every object
        bodies = log.read_checkpoint(*latest)
        assert sorted(bodies) == ["learner.pt", "model.safetensors"], bodies.keys()
        assert bodies["model.safetensors"] == b"weights %d" % (latest[0] // 10)
        print(call, latest[0])
    if status == 0:
        break
"""


def test_a_learner_killed_anywhere_inside_publication_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    create_run(open_store(str(tmp_path)), "run", {"config": {}, "config_hash": "a"})
    result = subprocess.run(
        [sys.executable, "-c", KILL_INSIDE_PUBLISH, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen = [line.split() for line in result.stdout.splitlines()]
    assert len(seen) > 10, "every call of a publication was a place to be killed"
    # Killed before its manifest was linked, a checkpoint does not exist; after, it is whole.
    assert seen[0][1] == "none"
    last_call = seen[-1][0]
    assert seen[-1][1] == str(10 * int(last_call)), "the one that nobody killed is the latest"
    visible = [int(call) for call, latest in seen if latest == str(10 * int(call))]
    assert visible == list(range(visible[0], int(last_call) + 1)), "from one call on, and for good"


PUBLISH_AT_ONCE = """
import sys, time
sys.path.insert(0, "tests")
from storage_builders import make_trajectories
from asyncopd.types import IndexRange
from storage.stores import open_store
from storage.run_log import StoredRunLog

log = StoredRunLog(open_store(sys.argv[1]), "run")
print("ready", flush=True)
sys.stdin.readline()
for start in range(0, 40, 4):
    shard = IndexRange(start, start + 4)
    print(log.publish_trajectories(shard, make_trajectories(shard), worker=sys.argv[2]), flush=True)
"""


def test_two_processes_that_finish_the_same_shards_leave_one_complete_shard_each(tmp_path: Path) -> None:
    create_run(open_store(str(tmp_path)), "run", {"config": {}, "config_hash": "a"})
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH_AT_ONCE, str(tmp_path), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    won = [process.communicate(timeout=30)[0].split() for process in pair]
    assert [sorted(both) for both in zip(*won, strict=True)] == [["False", "True"]] * 10
    log = StoredRunLog(open_store(str(tmp_path)), "run")
    for shard in log.trajectory_shards():
        assert [t.index for t in log.read_trajectories(shard)] == [t.index for t in make_trajectories(shard)]
    assert len(list((tmp_path / "runs/run/trajectories").glob("*.parquet"))) == 10, "the losers left nothing"


HOLD = """
import sys, time
real = time.time
time.time = lambda: real() + float(sys.argv[2])
from asyncopd.records import WorkerStatus
from asyncopd.types import IndexRange
from storage.stores import open_store
from storage.run_log import StoredRunLog

log = StoredRunLog(open_store(sys.argv[1]), "run")
assert log.claim("rollout", IndexRange(0, 4), worker="holder", lease_s=1)
print("held", flush=True)
while True:
    time.sleep(0.1)
    log.heartbeat("holder", WorkerStatus())
"""


@pytest.mark.parametrize("skew_s", [-1.0, 1.0, 86_400.0])
def test_clocks_that_disagree_by_a_lease_or_a_day_change_nothing(tmp_path: Path, skew_s: float) -> None:
    log = create_run(open_store(str(tmp_path)), "run", {"config": {}, "config_hash": "a"})
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), str(skew_s)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            assert not log.claim("rollout", SHARD, worker="other", lease_s=1), "the holder beats"
            time.sleep(0.05)
    finally:
        holder.kill()
        holder.wait()
    killed = time.monotonic()
    while not log.claim("rollout", SHARD, worker="other", lease_s=1):
        assert time.monotonic() - killed < 5
        time.sleep(0.02)
    # Counted from the last look that saw a new heartbeat, which was at most one beat and one look before the kill.
    assert 0.8 < time.monotonic() - killed < 2.5
