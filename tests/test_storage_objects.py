"""The object store contract, the same over memory, local files and S3, and what is special about each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage_builders import STORE_KINDS, fresh_store, s3_bucket

import storage.s3
from asyncopd.errors import ObjectMissingError, StorageError, StoreUnusableError
from storage.local import LocalStore
from storage.objects import MemoryStore, ObjectStore
from storage.open import open_store
from storage.s3 import S3Store

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=STORE_KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return fresh_store(request.param, tmp_path)


# -- the contract -------------------------------------------------------------------------------------------------
def test_put_if_absent_keeps_the_first_body(store: ObjectStore) -> None:
    assert store.put_if_absent("a/b.json", b"first")
    assert not store.put_if_absent("a/b.json", b"second")
    assert not store.put_if_absent("a/b.json", b"first"), "an equal body of another writer is still not the first"
    assert store.get("a/b.json") == b"first"


def test_put_replaces(store: ObjectStore) -> None:
    store.put("a/b", b"old")
    store.put("a/b", b"newer", durable=False)
    assert store.get("a/b") == b"newer"
    assert store.size("a/b") == 5


def test_empty_and_large_bodies_come_back(store: ObjectStore) -> None:
    large = os.urandom(6 * 2**20)
    store.put("empty", b"")
    store.put("large", large)
    assert store.get("empty") == b""
    assert store.get("large") == large


def test_missing_keys(store: ObjectStore) -> None:
    assert store.find("no/such") is None
    assert not store.exists("no/such")
    assert store.list("no") == []
    assert store.folder("no").keys == []
    assert store.folder("no").folders == []
    with pytest.raises(ObjectMissingError, match="no/such does not exist"):
        store.get("no/such")
    with pytest.raises(ObjectMissingError, match="no/such does not exist"):
        store.size("no/such")
    store.delete("no/such")


def test_a_folder_is_not_an_object(store: ObjectStore) -> None:
    store.put("a/b/c", b"x")
    assert not store.exists("a/b")
    assert store.exists("a/b/c")


def test_list_descends_and_folder_does_not(store: ObjectStore) -> None:
    for key in ("a/2", "a/1", "a/b/3", "a/c.d/e/4", "ab/5"):
        store.put(key, b"x")
    assert store.list("a") == store.list("a/") == ["a/1", "a/2", "a/b/3", "a/c.d/e/4"]
    assert store.folder("a").keys == ["a/1", "a/2"]
    assert store.folder("a/").folders == ["b", "c.d"]


def test_list_sees_what_was_just_written_and_deleted(store: ObjectStore) -> None:
    assert store.list("a") == []
    store.put("a/1", b"x")
    assert store.list("a") == ["a/1"]
    store.delete("a/1")
    assert store.list("a") == []


def test_listings_are_complete_beyond_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # of the server, which is a thread of this process
    store = fresh_store("s3", tmp_path)
    keys = [f"a/{number:04d}" for number in range(25)]
    for key in keys:
        store.put(key, b"")
    assert store.list("a") == store.folder("a").keys == keys


def test_names_with_odd_characters_are_kept(store: ObjectStore) -> None:
    keys = sorted(["a/Qwen%2Fx.json", "a/with space", "a/ünï", "a/+plus&and=eq"])
    for key in keys:
        store.put(key, key.encode())
    assert store.list("a") == keys
    assert [store.get(key).decode() for key in keys] == keys


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", ".", "a/", ".tmp/x"])
def test_keys_that_could_leave_the_root_are_refused(store: ObjectStore, key: str) -> None:
    with pytest.raises(StorageError, match="is not a key"):
        store.put_if_absent(key, b"x")


def test_of_eight_threads_one_wins(store: ObjectStore) -> None:
    for race in range(3):
        barrier = threading.Barrier(8)

        def write(number: int, race: int = race, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return store.put_if_absent(f"race/{race}", b"%d" % number)

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(write, range(8)))
        assert won.count(True) == 1
        assert store.get(f"race/{race}") == b"%d" % won.index(True)


def test_a_probed_store_is_left_as_it_was(store: ObjectStore) -> None:
    store.probe()
    assert store.list("probe") == []


def test_a_store_works_after_a_fork(store: ObjectStore) -> None:
    # s3fs runs an event loop in a thread, which a fork does not copy.
    store.put("a", b"parent")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            store.put("b", store.get("a") + b" and child")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    if not isinstance(store, MemoryStore):
        assert store.get("b") == b"parent and child"


# -- local files --------------------------------------------------------------------------------------------------
RACER = """
import sys, time
from storage.local import LocalStore
store = LocalStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(sum(store.put_if_absent(f"race/{number}", sys.argv[2].encode()) for number in range(50)))
"""


def test_of_eight_processes_one_wins(tmp_path: Path) -> None:
    racers = [_python(RACER, str(tmp_path), str(number)) for number in range(8)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    outputs = [racer.communicate("go\n")[0] for racer in racers]
    store = open_store(str(tmp_path))
    assert sum(int(output) for output in outputs) == len(store.list("race")) == 50
    winners = [store.get(key) for key in store.list("race")]
    assert [int(output) for output in outputs] == [winners.count(b"%d" % number) for number in range(8)]


WRITER = """
import sys
from storage.local import LocalStore
store = LocalStore(sys.argv[1])
print("ready", flush=True)
for number in range(10**6):
    body = bytes([number % 256]) * 2**21
    store.put_if_absent(f"new/{sys.argv[2]}-{number}", body)
    store.put("same", body)
"""


def test_a_killed_writer_leaves_no_partial_object(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for round_number in range(4):
        writer = _python(WRITER, str(tmp_path), str(round_number))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.037 * round_number)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    keys = [*store.list("new"), "same"]
    assert len(keys) > 2
    for key in keys:
        body = store.get(key)
        assert body == body[:1] * 2**21, f"{key} is partial"
    store.discard_temporary(older_than_s=0)
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_the_temporary_files_of_living_writers_are_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a", b"x")
    (tmp_path / ".tmp" / "half").write_bytes(b"x")
    assert store.discard_temporary(older_than_s=60) == 0
    assert store.discard_temporary(older_than_s=-1) == 1


def test_file_urls_and_paths_are_the_same_store(tmp_path: Path) -> None:
    open_store(str(tmp_path)).put("a", b"x")
    assert open_store(f"file://{tmp_path}").get("a") == b"x"


def test_a_file_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("not a directory")
    for root in (tmp_path / "root", tmp_path / "root" / "below"):
        with pytest.raises(StoreUnusableError, match=r"root is a file, expected a directory"):
            open_store(str(root)).probe()


def test_a_read_only_file_system_is_refused() -> None:
    # Root may write everywhere but in the kernel's own file systems.
    with pytest.raises(StoreUnusableError, match=r"cannot be used as storage root.*could not write probe/"):
        open_store("/proc/asyncopd").probe()


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    store = LocalStore(str(tmp_path))
    (tmp_path / ".tmp").mkdir()
    with pytest.raises(StorageError, match=r"No space left on device.*free some space"):
        store.put("a", b"x")
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_too_little_free_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusableError, match="MiB free, expected at least"):
        open_store(str(tmp_path)).probe(min_free_bytes=2**60)


# -- stores that cannot be used -----------------------------------------------------------------------------------
class _LastWriterWins(MemoryStore):
    """Ignores the condition, as `rclone serve s3` does."""

    def put_if_absent(self, key: str, body: bytes, *, durable: bool = True) -> bool:
        self.put(key, body)
        return True


def test_a_store_that_accepts_both_writers_is_refused() -> None:
    with pytest.raises(StoreUnusableError, match="no working put-if-absent"):
        _LastWriterWins("memory://careless").probe()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StoreUnusableError, match="gopher:// is not supported"):
        open_store("gopher://somewhere")


# -- S3: retries --------------------------------------------------------------------------------------------------
@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.s3, "FIRST_PAUSE_S", 1e-4)


def _s3_error(number: int, code: str) -> OSError:
    """What s3fs raises when the server answers with `code`."""

    class ClientError(Exception):
        response = {"Error": {"Code": code}}  # noqa: RUF012

    error = OSError(number, code)
    error.__cause__ = ClientError(code)
    return error


class _FaultyS3(S3Store):
    """Raises the given errors on the first conditional PUTs, before or after the server stored the body."""

    def __init__(self, errors: list[Exception], *, store_first: bool = False) -> None:
        super().__init__(f"s3://{s3_bucket()}/{os.urandom(8).hex()}")
        self.errors = errors
        self.store_first = store_first

    def _put_new(self, key: str, body: bytes) -> None:
        if not self.errors:
            super()._put_new(key, body)
            return
        if self.store_first:
            super()._put_new(key, body)
        raise self.errors.pop(0)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    "error",
    [
        _s3_error(16, "ConditionalRequestConflict"),
        _s3_error(16, "SlowDown"),
        _s3_error(121, "InternalError"),
        ConnectionResetError("peer"),
        TimeoutError(),
    ],
    ids=str,
)
def test_a_passing_fault_is_retried(error: Exception) -> None:
    store = _FaultyS3([error, error])
    assert store.put_if_absent("a", b"x")
    assert store.get("a") == b"x"


@pytest.mark.usefixtures("no_pauses")
def test_our_own_first_try_is_not_another_writer() -> None:
    # The server stored the body, the answer was lost, and the retry meets our own object.
    store = _FaultyS3([ConnectionResetError("peer")], store_first=True)
    assert store.put_if_absent("a", b"ours")


@pytest.mark.usefixtures("no_pauses")
def test_another_writer_between_two_tries_wins() -> None:
    store = _FaultyS3([ConnectionResetError("peer")])
    store.put("a", b"theirs")
    assert not store.put_if_absent("a", b"ours")
    assert store.get("a") == b"theirs"


def test_a_refusal_without_detail_is_a_lost_race() -> None:
    # Ceph's 412 has no <Condition>, so s3fs raises EINVAL instead of FileExistsError.
    assert not _FaultyS3([_s3_error(22, "PreconditionFailed")]).put_if_absent("a", b"x")


@pytest.mark.usefixtures("no_pauses")
def test_a_lasting_fault_ends_in_an_explanation() -> None:
    store = _FaultyS3([ConnectionResetError("peer")] * 100)
    with pytest.raises(StorageError, match=r"could not write a in s3://.*after 7 tries.*Check AWS_ENDPOINT_URL"):
        store.put_if_absent("a", b"x")


def test_a_refusal_of_access_is_not_retried() -> None:
    store = _FaultyS3([PermissionError("Access Denied")])
    with pytest.raises(StorageError, match=r"after 1 tries.*AWS_ACCESS_KEY_ID"):
        store.put_if_absent("a", b"x")


def test_a_missing_bucket_is_refused() -> None:
    s3_bucket()
    with pytest.raises(StoreUnusableError, match="Create the bucket"):
        open_store("s3://no-such-bucket/x").probe()


@pytest.mark.usefixtures("no_pauses")
def test_a_server_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnusableError, match="after 7 tries"):
        open_store("s3://runs/x").probe()


def test_conditional_bodies_must_fit_one_put() -> None:
    store = S3Store(f"s3://{s3_bucket()}/x")
    with pytest.raises(StorageError, match="too many for one conditional PUT"):
        store.put_if_absent("a", bytes(storage.s3.MAX_CONDITIONAL_BYTES + 1))


def _python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
