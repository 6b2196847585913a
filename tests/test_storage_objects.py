"""The object store contract, the same over memory, local files and S3, and what is special about each."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from s3_servers import BUCKET, point_at, shared_moto, shared_radosgw
from storage_builders import STORE_KINDS, fresh_store

import storage.stores.s3
from asyncopd.errors import ObjectMissingError, StorageError, StoreUnusableError
from storage.stores import open_store
from storage.stores.base import MemoryStore, ObjectStore
from storage.stores.local import LocalStore

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[*STORE_KINDS, "faulty s3", pytest.param("radosgw", marks=pytest.mark.radosgw)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The same contract on every kind of store, and on S3 through a proxy that fails every sixth request."""
    if request.param in STORE_KINDS:
        yield fresh_store(request.param, tmp_path)
    elif request.param == "radosgw":
        point_at(monkeypatch, shared_radosgw())
        yield open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    else:
        monkeypatch.setattr(storage.stores.s3, "FIRST_PAUSE_S", 1e-3)
        with FaultyProxy(shared_moto(), rate=0.17, seed=5) as proxy:
            point_at(monkeypatch, proxy.url)
            yield open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")


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


def test_empty_and_large_bodies_come_back(store: ObjectStore) -> None:
    large = os.urandom(50 * 2**20 + 1)  # on S3 in parts
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
    store.delete("no/such")


def test_a_folder_is_not_an_object(store: ObjectStore) -> None:
    store.put("a/b/c", b"x")
    assert not store.exists("a/b")
    assert store.exists("a/b/c")


def test_list_descends_and_folder_does_not(store: ObjectStore) -> None:
    for key in ("a/2", "a/1", "a/b/3", "a/c.d/e/4", "ab/5"):
        store.put(key, b"x")
    assert store.list("a") == store.list("a/") == ["a/1", "a/2", "a/b/3", "a/c.d/e/4"]
    assert store.list("a/1") == [], "an object is not a folder"
    assert store.folder("a").keys == ["a/1", "a/2"]
    assert store.folder("a/").folders == ["b", "c.d"]


def test_list_sees_what_was_just_written_and_deleted(store: ObjectStore) -> None:
    assert store.list("a") == []
    store.put("a/1", b"x")
    assert store.list("a") == ["a/1"]
    store.delete("a/1")
    assert store.list("a") == []


def test_listings_are_complete_beyond_one_page(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.stores.s3, "PAGE_KEYS", 10)
    keys = [f"a/{number:04d}" for number in range(25)]
    for key in keys:
        store.put(key, b"", durable=False)
        store.put(f"b/{key}", b"", durable=False)
    assert store.list("a") == store.folder("a").keys == keys
    assert store.list("b") == [f"b/{key}" for key in keys]


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
    if isinstance(store, LocalStore):
        assert not (store.root / "probe").exists()


# Not through the proxy: a forked child would inherit, and so keep open, the connections that the proxy breaks.
@pytest.mark.parametrize("store", [*STORE_KINDS, pytest.param("radosgw", marks=pytest.mark.radosgw)], indirect=True)
def test_a_store_works_after_a_fork(store: ObjectStore) -> None:
    # s3fs runs an event loop in a thread, which a fork does not copy.
    store.put("a", b"parent")
    started = time.monotonic()
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
    # On radosgw this took 20 s: the child had closed the parent's connection, and with it its place in their epoll.
    assert time.monotonic() - started < 10


# -- local files --------------------------------------------------------------------------------------------------
RACER = """
import sys, time
from storage.stores.local import LocalStore
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
from storage.stores.local import LocalStore
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


def test_a_root_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    probe = (
        "import sys, os; from storage.stores.local import LocalStore as S; os.seteuid(65534); S(sys.argv[1]).probe()"
    )
    if os.geteuid() != 0:
        (tmp_path / "others").chmod(0o555)
        probe = probe.replace("os.seteuid(65534);", "")
    output = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "others")], cwd=ROOT, capture_output=True, text=True
    ).stderr
    assert re.search(r"StoreUnusableError: .*/others cannot be used as storage root: could not write probe/", output)
    assert "Permission denied" in output
    assert "Expected a directory that this user may write to" in output


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


def _python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
