"""S3 in particular: ambiguous answers, races, large bodies, wrong settings and secrets, on real servers.

Faults come from a proxy before moto; a store without put-if-absent is `rclone serve s3`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs
from faulty_proxy import EVERY_FAULT, Fault, FaultyProxy
from s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, free_port, point_at, rclone_server, shared_moto, shared_radosgw

import storage.stores.s3
from asyncopd.errors import StorageError, StoreUnusableError
from storage.stores import open_store
from storage.stores.base import ObjectStore
from storage.stores.s3 import PART_BYTES

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _moto(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, shared_moto())
    monkeypatch.setattr(storage.stores.s3, "FIRST_PAUSE_S", 1e-3)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Before moto, without faults unless the test plans them; S3 stores of the test go through it."""
    with FaultyProxy(shared_moto()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def fresh() -> ObjectStore:
    return open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def kept_alive(store: ObjectStore) -> ObjectStore:
    """A store with an open connection, as a working role has: aiohttp repeats requests on those by itself."""
    store.put("warm", b"")
    return store


# -- ambiguous answers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("faults", [[fault] * 2 for fault in EVERY_FAULT] + [["lost", "500", "reset"]], ids=str)
def test_a_conditional_write_survives_a_passing_fault(proxy: FaultyProxy, faults: list[Fault]) -> None:
    store = kept_alive(fresh())
    proxy.plan = deque(("PUT", fault) for fault in faults)
    assert store.put_if_absent("a", b"ours")
    assert store.get("a") == b"ours"
    assert sum(proxy.injected.values()) == len(faults) - len(proxy.plan) >= 1
    assert not store.put_if_absent("a", b"ours")


def test_our_own_first_write_whose_answer_was_lost_is_ours(proxy: FaultyProxy) -> None:
    store = kept_alive(fresh())
    proxy.plan.append(("PUT", "lost"))
    before = proxy.requests["PUT"]
    assert store.put_if_absent("a", b"ours")
    assert (proxy.injected["lost"], proxy.requests["PUT"] - before) == (1, 2), "the retry met our own object"


def test_a_repeat_that_aiohttp_makes_unseen_is_recognised_too(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # aiohttp sends a PUT again when a kept-alive connection breaks: even the first answer we see may be a 412 from
    # our own write. One try only, so that nothing but aiohttp can have repeated it.
    monkeypatch.setattr(storage.stores.s3, "WORKING", storage.stores.s3.Patience(1, 3.0, 20.0))
    store = kept_alive(storage.stores.s3.S3Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", storage.stores.s3.WORKING))
    proxy.plan.append(("PUT", "lost"))
    assert store.put_if_absent("a", b"ours")
    assert proxy.injected["lost"] == 1


@pytest.mark.parametrize("body", [b"ours", b"theirs"])
def test_a_writer_who_came_between_two_tries_wins(proxy: FaultyProxy, body: bytes) -> None:
    # Also when both bodies are equal: comparing them would let two writers win.
    store = kept_alive(fresh())
    proxy.plan = deque([("PUT", "reset"), ("PUT", "reset"), ("PUT", "slow")])
    proxy.slow_s = 6.0  # the other writer needs less, also on a busy machine
    with ThreadPoolExecutor(1) as thread:
        ours = thread.submit(store.put_if_absent, "a", b"ours")
        while proxy.injected["slow"] == 0:
            time.sleep(0.01)
        os.environ["AWS_ENDPOINT_URL"] = shared_moto()
        assert open_store(store.url).put_if_absent("a", body)
        assert not ours.result()
    assert store.get("a") == body


def test_a_write_that_arrives_after_its_retry_is_still_one_write(proxy: FaultyProxy) -> None:
    store = kept_alive(
        storage.stores.s3.S3Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", storage.stores.s3.Patience(3, 3.0, 0.2))
    )
    proxy.plan.append(("PUT", "slow"))
    proxy.slow_s = 0.6
    assert store.put_if_absent("a", b"ours")
    before = proxy.requests.total()
    time.sleep(0.6)  # the first try reaches the server now
    assert proxy.requests.total() == before
    assert store.get("a") == b"ours"
    assert not store.put_if_absent("a", b"ours")


def test_every_race_through_the_proxy_has_one_winner(proxy: FaultyProxy) -> None:
    proxy.rate = 0.25
    proxy.plan.append(("PUT", "conflict"))
    _race(num_rounds=12)
    assert set(proxy.injected) == set(EVERY_FAULT), "every kind of fault must have happened"


@pytest.mark.radosgw
def test_every_race_on_radosgw_has_one_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(shared_radosgw(), rate=0.1, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        _race(num_rounds=40)
        assert proxy.injected["lost"] > 0


def _race(num_rounds: int) -> None:
    """Eight writers with stores of their own put equal bodies under one key, round after round."""
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    stores = [open_store(url) for _ in range(8)]
    barrier = threading.Barrier(len(stores), timeout=60)

    def write(store: ObjectStore) -> list[bool]:
        won = []
        for number in range(num_rounds):
            barrier.wait()
            won.append(store.put_if_absent(f"race/{number}", b"the same"))
        return won

    with ThreadPoolExecutor(len(stores)) as threads:
        results = list(threads.map(write, stores))
    assert [sum(round_) for round_ in zip(*results, strict=True)] == [1] * num_rounds


# -- other requests -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["lost", "500", "reset"])
def test_a_large_body_sends_only_the_part_again_that_failed(proxy: FaultyProxy, fault: Fault) -> None:
    store, body = kept_alive(fresh()), os.urandom(storage.stores.s3.MAX_SINGLE_BYTES + 1)
    parts = -(-len(body) // PART_BYTES)
    proxy.plan = deque([("POST", None), ("PUT", fault), ("PUT", None)])
    before = proxy.requests["PUT"]
    store.put("large", body)
    assert store.get("large") == body
    assert proxy.injected == {fault: 1}
    assert proxy.requests["PUT"] - before == parts + 1


@pytest.mark.parametrize("fault", ["lost", "503"])
def test_the_end_of_a_large_body_may_be_told_twice(proxy: FaultyProxy, fault: Fault) -> None:
    store, body = kept_alive(fresh()), os.urandom(storage.stores.s3.MAX_SINGLE_BYTES + 1)
    proxy.plan = deque([("POST", None), ("POST", fault)])
    store.put("large", body)
    assert proxy.injected == {fault: 1}
    assert store.get("large") == body


def test_a_large_body_that_cannot_be_finished_leaves_nothing(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = kept_alive(fresh())
    proxy.plan = deque([("POST", None), *[("POST", "500")] * 7])
    with pytest.raises(StorageError, match=r"could not write large in s3://.* after 7 tries: .*injected"):
        store.put("large", bytes(storage.stores.s3.MAX_SINGLE_BYTES + 1))
    assert not store.exists("large")
    uploads = s3fs.S3FileSystem(skip_instance_cache=True).call_s3("list_multipart_uploads", Bucket=BUCKET)
    assert "Uploads" not in uploads, "parts of an unfinished upload are paid for until it is aborted"


def test_conditional_bodies_must_fit_one_put() -> None:
    with pytest.raises(StorageError, match="too many for one conditional PUT"):
        fresh().put_if_absent("a", bytes(storage.stores.s3.MAX_SINGLE_BYTES + 1))


def test_a_listing_of_an_empty_folder_is_one_request(proxy: FaultyProxy) -> None:
    store = kept_alive(fresh())
    before = proxy.requests.total()
    assert store.folder("none").keys == store.list("none") == []
    assert proxy.requests.total() - before == 2


# -- what cannot work is said at once -----------------------------------------------------------------------------
def refusal(url: str = f"s3://{BUCKET}/x") -> str:
    """The message with which the start-up probe refuses `url`, which must come within seconds."""
    started = time.monotonic()
    with pytest.raises(StoreUnusableError) as refused:
        open_store(url).probe()
    assert time.monotonic() - started < 10
    shown = "".join(traceback.format_exception(refused.value))
    assert SECRET_KEY not in shown
    return str(refused.value)


def test_a_store_without_put_if_absent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rclone_server(tmp_path / "rclone") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        message = refusal()
        assert "has no working put-if-absent: of two writers of probe/" in message
        assert "the first got True, the second True" in message
        assert not list((tmp_path / "rclone").rglob("probe/*"))


def test_no_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{(port := free_port())}")
    assert f"no S3 server answers at http://127.0.0.1:{port}" in refusal()


def test_a_server_that_never_answers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.stores.s3, "PROBING", storage.stores.s3.Patience(2, 0.5, 0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "after 2 tries: ReadTimeoutError" in refusal()


def test_a_missing_bucket_is_refused() -> None:
    assert "has no bucket 'no-such-bucket'. Create the bucket, or correct the storage root" in refusal(
        "s3://no-such-bucket/x"
    )


def test_missing_credentials_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = refusal()
    assert "no AWS credentials were found. Expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message


def test_a_profile_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "AWS_PROFILE names 'nobody', which is no profile of the AWS configuration" in refusal()


@pytest.mark.radosgw
@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("AWS_ACCESS_KEY_ID", "somebody", "does not accept these credentials (InvalidAccessKeyId)"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "does not accept these credentials (SignatureDoesNotMatch)"),
    ],
)
def test_wrong_credentials_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    # moto accepts any; radosgw really checks signatures.
    point_at(monkeypatch, shared_radosgw())
    monkeypatch.setenv(variable, value)
    assert expected in refusal()


@pytest.mark.parametrize("root", ["s3://AKIA:hush@runs/x", "s3://runs/x?secret=hush"])
def test_credentials_in_the_root_are_refused_without_repeating_them(root: str) -> None:
    # The root is written into run records, logs and Prefect's database.
    with pytest.raises(StoreUnusableError, match="holds credentials or options") as refused:
        open_store(root)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("root", ["s3://", "s3:///x", "s3://a b/c"])
def test_a_root_without_a_bucket_is_refused(root: str) -> None:
    with pytest.raises(StoreUnusableError, match="names no bucket"):
        open_store(root)


# -- settings and secrets -----------------------------------------------------------------------------------------
def test_endpoint_region_and_credentials_come_from_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-3\nendpoint_url = {shared_moto()}\n")
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with FaultyProxy(shared_moto()) as proxy:
        (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-3\nendpoint_url = {proxy.url}\n")
        open_store(f"s3://{BUCKET}/x").probe()
        assert proxy.requests["PUT"] == 2
        assert proxy.signed_by == {(ACCESS_KEY, "eu-west-3")}


def test_a_failing_server_that_echoes_the_secret_does_not_get_it_into_the_log(
    proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="storage")
    proxy.message = f"you sent {SECRET_KEY}"
    proxy.plan = deque([("PUT", "500")] * 7)
    with pytest.raises(StorageError, match=r"you sent \*\*\*") as failed:
        fresh().put("a", b"x")
    assert SECRET_KEY not in str(failed.value)
    assert SECRET_KEY not in caplog.text


def test_a_lasting_fault_ends_in_an_explanation(proxy: FaultyProxy) -> None:
    proxy.rate, proxy.faults = 1.0, ["reset"]
    expected = rf"could not write a in s3://.* after 7 tries: .*Check the server at {re.escape(proxy.url)}"
    with pytest.raises(StorageError, match=expected):
        fresh().put_if_absent("a", b"x")


def test_importing_the_store_loads_neither_torch_nor_prefect() -> None:
    script = (
        "import json, sys, storage.stores; print(json.dumps([m for m in ('torch', 'prefect') if m in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == []
