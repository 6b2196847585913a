"""Flipped bytes, truncation and deletion in a real run: the audit finds them, and readers raise only errors of ours."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import maintain_runs
import pytest

from asyncopd.errors import ShardCorruptError
from flows.wiring import OpenRun
from storage.layout import parse, run_of
from storage.maintain.audit import audit_run
from storage.maintain.checks import Finding
from storage.maintain.quarantine import set_aside
from storage.parquet import decode_scores, decode_trajectories
from storage.records import from_json, to_json
from storage.run_log import StoredRunLog
from storage.stores.base import ObjectStore

KINDS = {
    "run",
    "architecture",
    "trajectories",
    "scores",
    "policy",
    "checkpoint",
    "step",
    "evaluation",
    "rewind",
    "claim",
    "heartbeat",
    "spans",
    "failure",
    "removal",
    "data",
}
FORGETTABLE = {"claim", "heartbeat", "spans", "failure", "removal", "evaluation"}
"""Kinds whose deletion nothing else proves: they are observations, or forgotten by design (docs/maintenance.md)."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    run = asyncio.run(maintain_runs.finished_run(tmp_path_factory.mktemp("damage")))
    set_aside(run.store, run.store.list(run.log.layout.folder("failure"))[0])  # leaves a removal on record
    run.log.publish_failure("learn", "learn-x", "another reason")
    return run


def keys_by_kind(run: OpenRun) -> dict[str, list[str]]:
    """Keys of the run and of its shared model, by kind; data objects by the folder they lie in."""
    by_kind: dict[str, list[str]] = {}
    for key in [*run.store.list("runs"), *run.store.list("models")]:
        kind = parse(key).kind if run_of(key) else "model"
        by_kind.setdefault(kind, []).append(key)
    del by_kind["quarantined"]  # not live any more
    assert by_kind.keys() == KINDS | {"model"}
    data = by_kind.pop("data")
    for folder in ("trajectories", "scores", "policies", "checkpoints", "architecture"):
        by_kind[f"data of {folder}"] = [key for key in data if f"/{folder}/" in key]
    assert all(by_kind.values())
    return by_kind


def audit(store: ObjectStore) -> tuple[Finding, ...]:
    return audit_run(store, maintain_runs.RUN_ID, grace_s=0, recheck_s=0).findings


def test_an_undamaged_run_is_clean(run: OpenRun) -> None:
    assert audit(run.store) == ()
    assert maintain_runs.read_everything(run.log, run.config.model_digest(run.config.student)) == []


def test_every_flipped_byte_is_found_and_none_crashes_a_reader(run: OpenRun) -> None:
    rng = random.Random(20261121)
    digest = run.config.model_digest(run.config.student)
    by_kind = keys_by_kind(run)
    num_flips = 0
    for kind, keys in by_kind.items():
        for _ in range(11):
            key = rng.choice(keys)
            whole = run.store.get(key)
            position = rng.randrange(len(whole))
            flipped = whole[position] ^ rng.randrange(1, 256)
            run.store.put(key, whole[:position] + bytes([flipped]) + whole[position + 1 :], durable=False)
            where = f"{kind} {key} byte {position}: {whole[position]} -> {flipped}"
            assert any(finding.key == key for finding in audit(run.store)), where
            # Any other error than ours ends the test here.
            maintain_runs.read_everything(run.log, digest)
            run.store.put(key, whole, durable=False)
            num_flips += 1
    assert num_flips >= 200
    assert audit(run.store) == ()


def test_every_truncation_is_found_and_none_crashes_a_reader(run: OpenRun) -> None:
    rng = random.Random(1)
    digest = run.config.model_digest(run.config.student)
    for kind, keys in keys_by_kind(run).items():
        for length in (0, 1, -1, None):
            key = rng.choice(keys)
            whole = run.store.get(key)
            kept = whole[: rng.randrange(len(whole)) if length is None else length]
            run.store.put(key, kept, durable=False)
            assert any(finding.key == key for finding in audit(run.store)), f"{kind} {key} to {len(kept)} bytes"
            maintain_runs.read_everything(run.log, digest)
            run.store.put(key, whole, durable=False)


def test_every_deletion_of_something_that_counts_is_found_and_none_crashes_a_reader(run: OpenRun) -> None:
    digest = run.config.model_digest(run.config.student)
    counting = {p.number: p for p in run.log.policies()}
    rng = random.Random(3)
    for kind, keys in keys_by_kind(run).items():
        for key in rng.sample(keys, min(4, len(keys))):
            whole = run.store.get(key)
            run.store.delete(key)
            found = audit(run.store)
            if kind not in FORGETTABLE | {"model"}:
                superseded_step = kind == "step" and key.endswith(".r0.json") and counting[3].rewind > 0
                assert found or superseded_step, f"{kind} {key} is gone"
            maintain_runs.read_everything(run.log, digest)
            run.store.put(key, whole, durable=False)
    assert audit(run.store) == ()


def test_a_deleted_evaluation_that_a_later_one_proves_is_found(run: OpenRun) -> None:
    key = run.log.layout.key("evaluation", state=run.log.evaluations()[0].version)
    whole = run.store.get(key)
    run.store.delete(key)
    (finding,) = audit(run.store)
    run.store.put(key, whole)
    assert (finding.problem, finding.key) == ("missing", key)
    assert finding.mend.startswith("prefect deployment run evaluate/worker -p run_id=small-1")


def test_decoders_alone_survive_flips_that_no_checksum_stopped(run: OpenRun) -> None:
    # As in a file restored together with a manifest that was made from it.
    rng = random.Random(2)
    for folder, decode in (("trajectories", decode_trajectories), ("scores", decode_scores)):
        keys = [key for key in run.store.list(f"{run.log.layout.root}/{folder}") if key.endswith(".parquet")]
        for _ in range(300):
            body = bytearray(run.store.get(rng.choice(keys)))
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            # Values may change unnoticed here; what must not happen is an error that is not ours.
            with contextlib.suppress(ShardCorruptError):
                decode(bytes(body), "key")


def test_a_record_whose_checksum_was_cut_off_is_refused() -> None:
    sealed = to_json({"a": 1})
    with pytest.raises(ShardCorruptError, match="schema version 2 without its sha256 at the end"):
        from_json(sealed[: sealed.index(b',\n "sha256"')] + b"\n}", "key", dict)


def test_equal_values_in_other_bytes_are_damage_too() -> None:
    # 1e-05 and 1E-05 are one number, so a checksum of values would miss the flipped bit.
    sealed = to_json({"lr": 1e-5})
    with pytest.raises(ShardCorruptError, match=r"sha256 \w{12} does not match its own"):
        from_json(sealed.replace(b"1e-05", b"1E-05"), "key", dict)


def test_a_damaged_run_is_named_by_the_commands_that_mend_it(run: OpenRun, tmp_path: Path) -> None:
    log: StoredRunLog = maintain_runs.copy_of(run, tmp_path / "copy")
    shard = log.trajectory_shards()[0]
    ((data_key, _),) = log.find_trajectories(shard).objects.items()  # type: ignore[union-attr]
    log.store.put(data_key, b"x" * len(log.store.get(data_key)))
    (finding,) = audit(log.store)
    manifest_key = log.layout.shard_manifest(log.layout.trajectories, shard)
    assert (finding.problem, finding.key) == ("corrupt", data_key)
    assert finding.mend == f"asyncopd maintain quarantine {manifest_key} --root {tmp_path / 'copy'}"
    assert manifest_key in finding.expected
