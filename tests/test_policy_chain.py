"""Versions published as deltas: whoever reads one gets its weights bit for bit, or an error, never other weights."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_builders import STORE_KINDS, fresh_log, memory_log, reopened

from asyncopd.errors import ObjectMissingError, ShardCorruptError, StorageError
from asyncopd.records import Facts
from asyncopd.types import PolicyVersion, PolicyWeights
from storage.records import to_json
from storage.run_log import StoredRunLog
from storage.stores.base import MemoryStore


def weights_after(number: int, rewind: int = 0) -> PolicyWeights:
    """Weights of which a few elements change with every step."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 50)).astype(np.float32)
    for step in range(number):
        rng = np.random.default_rng((rewind, step))
        matrix.ravel()[rng.integers(0, matrix.size, 9)] += np.float32(1e-3)
    return PolicyWeights(PolicyVersion(number, rewind), safetensors.numpy.save({"w": matrix, "step": np.array(number)}))


def learner(log: StoredRunLog, full_every: int = 4) -> StoredRunLog:
    """A learner's view of the run, in a process of its own."""
    view = reopened(log)
    view.publish_deltas(full_every=full_every)
    return view


def train(log: StoredRunLog, first: int, last: int, rewind: int = 0) -> None:
    for number in range(first, last + 1):
        log.publish_policy(weights_after(number, rewind), worker="learner", facts=Facts(step=number))


def manifest_of(log: StoredRunLog, number: int, rewind: int = 0) -> dict[str, Any]:
    body = log.store.get(log.layout.key("policy", state=PolicyVersion(number, rewind)))
    manifest: dict[str, Any] = json.loads(body)
    return manifest


def key_of(log: StoredRunLog, number: int, what: str, rewind: int = 0) -> str:
    """Key of the `delta` or `full` object of a version."""
    key: str = manifest_of(log, number, rewind)["facts"]["chain"][what]
    return key


def corrupt(log: StoredRunLog, key: str) -> None:
    body = bytearray(log.store.get(key))
    body[-1] ^= 1
    log.store.put(key, bytes(body))


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The data objects, without manifests, that are read in the body."""
    seen: list[str] = []
    original = MemoryStore.find

    def find(self: MemoryStore, key: str) -> bytes | None:
        if not key.endswith(".json"):
            seen.append(key)
        return original(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "find", find)
        yield seen


# -- reading ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", STORE_KINDS)
def test_every_version_is_read_as_it_was_published(kind: str, tmp_path: Path) -> None:
    log = fresh_log(kind, tmp_path)
    train(learner(log), 0, 9)
    sampler = reopened(log)
    for number in (0, 1, 2, 9, 3, 4, 8):
        assert sampler.read_policy(PolicyVersion(number)) == weights_after(number)
    assert sampler.latest_policy() == PolicyVersion(9)
    assert manifest_of(sampler, 9)["facts"]["step"] == 9


def test_deltas_are_what_is_stored_between_full_versions() -> None:
    log = memory_log()
    train(learner(log, full_every=4), 0, 9)
    objects = {
        number: sorted(key.rsplit(".", 1)[1] for key in manifest_of(log, number)["objects"]) for number in range(10)
    }
    assert objects == {
        number: ["safetensors"] if number == 0 else ["delta", "safetensors"] if number % 4 == 0 else ["delta"]
        for number in range(10)
    }
    assert 8 < manifest_of(log, 9)["facts"]["chain"]["num_changed"] <= 10
    assert len(log.store.get(key_of(log, 9, "delta"))) < 0.1 * len(log.store.get(key_of(log, 8, "full")))


def test_who_is_up_to_date_reads_one_delta_and_who_joins_starts_at_the_last_full_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = memory_log()
    train(learner(log, full_every=4), 0, 7)
    sampler = reopened(log)
    with reads(monkeypatch) as joining:
        sampler.read_policy(PolicyVersion(6))
    assert joining == [key_of(log, 4, "full"), key_of(log, 5, "delta"), key_of(log, 6, "delta")]
    with reads(monkeypatch) as following:
        sampler.read_policy(PolicyVersion(7))
    assert following == [key_of(log, 7, "delta")]
    train(learner(log, full_every=4), 8, 8)
    with reads(monkeypatch) as again:
        sampler.read_policy(PolicyVersion(7))
    assert again == []


def test_a_worker_that_missed_versions_takes_the_shorter_of_chain_and_full_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = memory_log()
    train(learner(log, full_every=60), 0, 62)
    near, far = reopened(log), reopened(log)
    near.read_policy(PolicyVersion(57))
    with reads(monkeypatch) as of_near:
        assert near.read_policy(PolicyVersion(62)) == weights_after(62)
    # Through the full version 60, whose delta is shorter than its weights.
    assert of_near == [key_of(log, number, "delta") for number in range(58, 63)]
    far.read_policy(PolicyVersion(2))
    chain = sum(len(log.store.get(key_of(log, number, "delta"))) for number in range(3, 61))
    assert chain > len(log.store.get(key_of(log, 60, "full")))
    with reads(monkeypatch) as of_far:
        assert far.read_policy(PolicyVersion(62)) == weights_after(62)
    assert of_far == [key_of(log, 60, "full"), key_of(log, 61, "delta"), key_of(log, 62, "delta")]


def test_weights_that_change_all_over_are_published_in_full() -> None:
    log = memory_log()
    publisher = learner(log, full_every=100)
    rng = np.random.default_rng(0)
    for number in range(3):
        body = safetensors.numpy.save({"w": rng.integers(0, 2**32, 1000, dtype=np.uint32)})
        publisher.publish_policy(PolicyWeights(PolicyVersion(number), body), worker="l")
        assert [key.rsplit(".", 1)[1] for key in manifest_of(log, number)["objects"]] == ["safetensors"]
        assert log.read_policy(PolicyVersion(number)).safetensors == body


# -- publishing ---------------------------------------------------------------------------------------------------
def test_publishing_again_keeps_the_first_and_refuses_other_weights() -> None:
    log = memory_log()
    publisher = learner(log)
    train(publisher, 0, 3)
    before = log.store.list("runs")
    train(learner(log), 3, 3)
    assert log.store.list("runs") == before
    with pytest.raises(StorageError, match=r"000003.r0.json was published by learner with sha256"):
        publisher.publish_policy(PolicyWeights(PolicyVersion(3), weights_after(9).safetensors), worker="other")
    train(publisher, 4, 5)
    assert reopened(log).read_policy(PolicyVersion(5)) == weights_after(5)


def test_a_learner_that_starts_again_starts_a_new_chain() -> None:
    log = memory_log()
    train(learner(log, full_every=100), 0, 3)
    train(learner(log, full_every=100), 4, 6)
    assert key_of(log, 4, "full")
    assert reopened(log).read_policy(PolicyVersion(6)) == weights_after(6)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_policy_chain import learner, train, weights_after
from storage.stores.local import LocalStore
from storage.stores import open_store
from storage.runs import open_run

publisher = learner(open_run(open_store({root!r}), "run"))
train(publisher, 0, 2)
original = LocalStore.put_if_absent

def put_if_absent(self, key, body, **options):
    if key.endswith("policies/000003.r0.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, key, body, **options)

LocalStore.put_if_absent = put_if_absent
train(publisher, 3, 3)
"""


def test_a_learner_killed_between_delta_and_manifest_leaves_the_version_before(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    code = KILLED.format(tests=str(Path(__file__).parent), root=log.store.url)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    orphans = [key for key in log.store.list("runs") if "policies/000003/" in key]
    assert [key.rsplit(".", 1)[1] for key in orphans] == ["delta"]
    assert log.latest_policy() == PolicyVersion(2)
    train(learner(log), 3, 4)
    sampler = reopened(log)
    assert sampler.latest_policy() == PolicyVersion(4)
    assert sampler.read_policy(PolicyVersion(4)) == weights_after(4)


# -- rewinds ------------------------------------------------------------------------------------------------------
def test_a_rewound_learner_and_the_superseded_one_have_chains_of_their_own() -> None:
    log = memory_log()
    sampler = reopened(log)
    old = learner(log, full_every=100)
    train(old, 0, 6)
    assert sampler.read_policy(PolicyVersion(6)) == weights_after(6)
    log.record_rewind(3, worker="w")
    train(learner(log, full_every=100), 4, 7, rewind=1)
    train(old, 7, 8)  # it has not noticed yet
    assert sampler.latest_policy() == PolicyVersion(7, 1)
    # The sampler holds version 6 of the superseded lineage: same number, other weights.
    assert sampler.read_policy(PolicyVersion(6, 1)) == weights_after(6, 1)
    assert sampler.read_policy(PolicyVersion(7, 1)) == weights_after(7, 1)
    assert sampler.read_policy(PolicyVersion(8)) == weights_after(8), "superseded weights stay readable"
    assert manifest_of(log, 7, 1)["facts"]["chain"]["base"]["rewind"] == 1


# -- broken chains ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_a_broken_delta_is_gone_around_where_a_full_version_is(
    damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = memory_log()
    train(learner(log, full_every=4), 0, 9)
    sampler = reopened(log)
    sampler.read_policy(PolicyVersion(6))
    broken = key_of(log, 7, "delta")
    log.store.delete(broken) if damage == "missing" else corrupt(log, broken)
    with caplog.at_level(logging.WARNING), reads(monkeypatch) as seen:
        assert sampler.read_policy(PolicyVersion(9)) == weights_after(9)
    assert seen == [broken, key_of(log, 8, "full"), key_of(log, 9, "delta")]
    assert broken in caplog.text
    error = ObjectMissingError if damage == "missing" else ShardCorruptError
    with pytest.raises(error, match="version 7 cannot be read, whatever the way"):
        reopened(log).read_policy(PolicyVersion(7))
    assert reopened(log).read_policy(PolicyVersion(6)) == weights_after(6), "what comes before it can be read"


def test_a_broken_full_version_is_gone_around_by_the_chain(caplog: pytest.LogCaptureFixture) -> None:
    log = memory_log()
    train(learner(log, full_every=4), 0, 6)
    corrupt(log, key_of(log, 4, "full"))
    with caplog.at_level(logging.WARNING):
        assert reopened(log).read_policy(PolicyVersion(6)) == weights_after(6)
    assert key_of(log, 4, "full") in caplog.text


@pytest.mark.parametrize("changed", ["number", "rewind", "weights_sha256"])
def test_a_delta_against_another_base_is_not_applied(changed: str) -> None:
    log = memory_log()
    train(learner(log, full_every=100), 0, 3)
    manifest = manifest_of(log, 3)
    manifest["facts"]["chain"]["base"][changed] = {"number": 1, "rewind": 7, "weights_sha256": "0" * 64}[changed]
    log.store.put(log.layout.key("policy", state=PolicyVersion(3)), to_json(manifest))
    sampler = reopened(log)
    sampler.read_policy(PolicyVersion(2))
    with pytest.raises(ShardCorruptError, match="a delta fits its own base only"):
        sampler.read_policy(PolicyVersion(3))


def test_a_chain_that_ends_in_other_weights_is_refused() -> None:
    # A delta with its promised bytes, against the right base, that makes something else: only the sha256 of the
    # resulting weights can tell.
    log = memory_log()
    train(learner(log, full_every=100), 0, 3)
    manifest = manifest_of(log, 3)
    manifest["facts"]["chain"]["weights_sha256"] = "0" * 64
    log.store.put(log.layout.key("policy", state=PolicyVersion(3)), to_json(manifest))
    with pytest.raises(ShardCorruptError, match="the chain of 3 deltas ends in weights"):
        reopened(log).read_policy(PolicyVersion(3))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(("delta", "full")), st.booleans()), max_size=5),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
)
def test_whatever_breaks_a_reader_gets_the_published_weights_or_an_error(
    full_every: int, damages: list[tuple[int, str, bool]], asked: list[int]
) -> None:
    log = memory_log()
    train(learner(log, full_every), 0, 9)
    objects = {number: dict(manifest_of(log, number)["facts"]["chain"]) for number in range(10)}
    lost = set()
    for number, what, is_missing in damages:
        if (key := objects[number][what]) and key not in lost:
            log.store.delete(key) if is_missing else corrupt(log, key)
            lost.add(key)
    sampler = reopened(log)
    last_read = None
    for number in asked:
        # What can be read: a full version that is left, or the held one, and every delta from there on.
        starts = [n for n in range(number + 1) if objects[n]["full"] not in {None, *lost} or n == last_read]
        readable = any(all(objects[n]["delta"] not in lost for n in range(s + 1, number + 1)) for s in starts)
        if readable:
            assert sampler.read_policy(PolicyVersion(number)) == weights_after(number)
            last_read = number
        else:
            with pytest.raises((ObjectMissingError, ShardCorruptError)):
                sampler.read_policy(PolicyVersion(number))
