"""Claims: one holder per shard, who loses it by dying or retiring; no clock but the observer's own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage_builders import STORE_KINDS, fresh_log, fresh_store

from asyncopd.records import WorkerStatus
from asyncopd.types import IndexRange
from storage.records import to_json
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.stores.base import ObjectStore

SHARD = IndexRange(0, 8)


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return fresh_store("memory", tmp_path)


def observer(store: ObjectStore) -> tuple[StoredRunLog, Clock]:
    """One process's view of the run, with its own clock."""
    clock = Clock()
    return StoredRunLog(store, "run", clock=clock), clock


def test_a_shard_has_one_holder(store: ObjectStore) -> None:
    (ours, _), (theirs, _) = observer(store), observer(store)
    assert ours.claim("rollout", SHARD, worker="a", lease_s=10)
    assert not theirs.claim("rollout", SHARD, worker="b", lease_s=10)
    assert ours.claim("rollout", SHARD, worker="a", lease_s=10), "a second call of the holder"
    assert theirs.claim("rollout", IndexRange(8, 16), worker="b", lease_s=10)
    assert theirs.claim("score.t", SHARD, worker="b", lease_s=10), "stages are claimed separately"


def test_a_heartbeat_that_stands_still_for_a_lease_frees_the_shard(store: ObjectStore) -> None:
    (ours, _), (theirs, clock) = observer(store), observer(store)
    assert ours.claim("rollout", SHARD, worker="a", lease_s=10)
    ours.heartbeat("a", WorkerStatus(step=1))
    assert not theirs.claim("rollout", SHARD, worker="b", lease_s=10)
    clock.now_s += 9.9
    assert not theirs.claim("rollout", SHARD, worker="b", lease_s=10)
    clock.now_s += 0.2
    assert theirs.claim("rollout", SHARD, worker="b", lease_s=10)
    assert [(claim.attempt, claim.worker) for claim in RunView(theirs).read("claim").claims()] == [(1, "a"), (2, "b")]


def test_a_beating_holder_keeps_its_shard(store: ObjectStore) -> None:
    (ours, _), (theirs, clock) = observer(store), observer(store)
    ours.claim("rollout", SHARD, worker="a", lease_s=10)
    for _ in range(20):
        ours.heartbeat("a", WorkerStatus(step=1))
        assert not theirs.claim("rollout", SHARD, worker="b", lease_s=10)
        clock.now_s += 9


def test_wrong_clocks_change_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # The holder's wall clock is a year behind; only changes count.
    (ours, _), (theirs, clock) = observer(store), observer(store)
    monkeypatch.setattr("storage.claims.time.time", lambda: 3.0)
    ours.claim("rollout", SHARD, worker="a", lease_s=10)
    for _ in range(3):
        clock.now_s += 9
        ours.heartbeat("a", WorkerStatus())
        assert not theirs.claim("rollout", SHARD, worker="b", lease_s=10)


def test_a_retired_worker_frees_its_shards_at_once(store: ObjectStore) -> None:
    (ours, _), (theirs, _) = observer(store), observer(store)
    ours.claim("rollout", SHARD, worker="a", lease_s=10)
    ours.retire("a")
    assert theirs.claim("rollout", SHARD, worker="b", lease_s=10)


def test_a_retired_name_can_work_again_in_another_process(store: ObjectStore) -> None:
    (ours, _), (restarted, _), (theirs, _) = observer(store), observer(store), observer(store)
    ours.heartbeat("a", WorkerStatus())
    ours.retire("a")
    assert restarted.claim("rollout", SHARD, worker="a", lease_s=10)
    assert not theirs.claim("rollout", SHARD, worker="b", lease_s=10)


def test_what_a_thread_still_does_after_retirement_does_not_revive_the_worker(store: ObjectStore) -> None:
    # A beat already handed to a thread used to land after `retire`: the next worker then waited a whole lease.
    (ours, _), (theirs, _) = observer(store), observer(store)
    ours.claim("rollout", SHARD, worker="a", lease_s=10)
    ours.retire("a")
    ours.heartbeat("a", WorkerStatus(step=2))
    assert not ours.claim("rollout", IndexRange(8, 16), worker="a", lease_s=10)
    assert theirs.heartbeats()["a"].retired
    assert theirs.claim("rollout", SHARD, worker="b", lease_s=10)


def test_of_beats_and_a_retirement_at_once_the_retirement_is_last(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    for round_number in range(20):
        name = f"a{round_number}"
        with ThreadPoolExecutor(5) as threads:
            for _ in range(8):
                threads.submit(log.heartbeat, name, WorkerStatus())
            threads.submit(log.retire, name)
            for _ in range(8):
                threads.submit(log.heartbeat, name, WorkerStatus())
        assert log.heartbeats()[name].retired


def test_a_parent_retires_the_child_it_reaped(store: ObjectStore) -> None:
    (child, _), (parent, _), (theirs, _) = observer(store), observer(store), observer(store)
    child.heartbeat("a", WorkerStatus(host="gpu-1", pid=7))
    child.claim("rollout", SHARD, worker="a", lease_s=10)
    child.heartbeat("b", WorkerStatus(host="gpu-2", pid=7))
    assert not theirs.claim("rollout", SHARD, worker="c", lease_s=10)
    assert parent.retire_process(host="gpu-1", pid=7) == ["a"]
    assert theirs.claim("rollout", SHARD, worker="c", lease_s=10)
    assert not theirs.heartbeats()["b"].retired
    assert parent.retire_process(host="gpu-1", pid=7) == []


def test_the_holder_is_the_last_claimant_that_lives(store: ObjectStore) -> None:
    (ours, _), (theirs, clock) = observer(store), observer(store)
    assert theirs.holder("learn", SHARD, lease_s=10) is None
    ours.claim("learn", SHARD, worker="a", lease_s=10)
    assert theirs.holder("learn", SHARD, lease_s=10) == "a"
    clock.now_s += 10
    assert theirs.holder("learn", SHARD, lease_s=10) is None
    ours.heartbeat("a", WorkerStatus())
    assert theirs.holder("learn", SHARD, lease_s=10) == "a"
    ours.retire("a")
    assert theirs.holder("learn", SHARD, lease_s=10) is None


def test_the_attempt_of_a_claim_tells_whether_there_was_a_holder_before(store: ObjectStore) -> None:
    (ours, _), (theirs, _) = observer(store), observer(store)
    assert ours.claim("learn", SHARD, worker="a", lease_s=10).attempt == 1
    assert theirs.claim("learn", SHARD, worker="b", lease_s=10) is None
    ours.retire("a")
    assert theirs.claim("learn", SHARD, worker="b", lease_s=10).attempt == 2


def test_a_holder_that_never_beats_counts_from_the_first_look(store: ObjectStore) -> None:
    ours, clock = observer(store)
    store.put(
        ours.layout.key("claim", stage="rollout", shard=SHARD, attempt=1), to_json({"worker": "ghost", "claimed": 0})
    )
    assert not ours.claim("rollout", SHARD, worker="b", lease_s=10)
    clock.now_s += 10
    assert ours.claim("rollout", SHARD, worker="b", lease_s=10)


def test_a_claim_emptied_by_a_power_cut_frees_after_a_lease(store: ObjectStore) -> None:
    ours, clock = observer(store)
    store.put(ours.layout.key("claim", stage="rollout", shard=SHARD, attempt=1), b"")
    assert not ours.claim("rollout", SHARD, worker="b", lease_s=10)
    clock.now_s += 10
    assert ours.claim("rollout", SHARD, worker="b", lease_s=10)


@pytest.mark.parametrize("body", [b"", bytes(100)])
def test_a_heartbeat_destroyed_by_a_power_cut_counts_as_standing_still(body: bytes, store: ObjectStore) -> None:
    (ours, _), (theirs, clock) = observer(store), observer(store)
    ours.claim("rollout", SHARD, worker="a", lease_s=10)
    store.put(ours.layout.key("heartbeat", worker="a"), body)
    assert theirs.heartbeats() == {}
    assert not theirs.claim("rollout", SHARD, worker="b", lease_s=10)
    clock.now_s += 10
    assert theirs.claim("rollout", SHARD, worker="b", lease_s=10)


def test_a_holder_that_was_taken_for_dead_learns_it(store: ObjectStore) -> None:
    (ours, _), (theirs, clock) = observer(store), observer(store)
    ours.claim("rollout", SHARD, worker="a", lease_s=10)
    theirs.claim("rollout", SHARD, worker="b", lease_s=10)
    clock.now_s += 10
    assert theirs.claim("rollout", SHARD, worker="b", lease_s=10)
    assert not ours.claim("rollout", SHARD, worker="a", lease_s=10)


def test_a_restarted_process_finds_its_own_claim(store: ObjectStore) -> None:
    (ours, _), (restarted, _) = observer(store), observer(store)
    ours.claim("rollout", SHARD, worker="a", lease_s=10)
    assert restarted.claim("rollout", SHARD, worker="a", lease_s=10)


@pytest.mark.parametrize("kind", STORE_KINDS)
@pytest.mark.parametrize("dead_holder", [False, True])
def test_of_eight_claimants_one_wins(kind: str, dead_holder: bool, tmp_path: Path) -> None:
    log = fresh_log(kind, tmp_path)
    if dead_holder:
        log.claim("rollout", SHARD, worker="dead", lease_s=10)
        log.retire("dead")
    barrier = threading.Barrier(8)

    def claim(number: int) -> bool:
        mine = StoredRunLog(log.store, "run")
        barrier.wait()
        return mine.claim("rollout", SHARD, worker=f"w{number}", lease_s=60) is not None

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(claim, range(8)))
    assert won.count(True) == 1
    claims = RunView(log).read("claim").claims()
    assert claims[-1].worker == f"w{won.index(True)}"
    assert claims[-1].attempt == 1 + dead_holder


def test_heartbeats_tell_what_workers_do(store: ObjectStore) -> None:
    ours, _ = observer(store)
    ours.heartbeat("rollout/0 on gpu.example", WorkerStatus(role="rollout", loss_nats=float("nan")))
    ours.heartbeat("b", WorkerStatus())
    ours.retire("b")
    beats = ours.heartbeats()
    assert sorted(beats) == ["b", "rollout/0 on gpu.example"]
    assert beats["rollout/0 on gpu.example"].status == WorkerStatus(role="rollout")
    assert [beats[worker].retired for worker in sorted(beats)] == [True, False]
