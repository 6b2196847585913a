"""The whole pipeline on S3, over real HTTP: the same weights as on a directory, also when requests fail."""

from __future__ import annotations

import asyncio
import uuid

import pipeline
import pytest
from faulty_proxy import FaultyProxy
from s3_servers import BUCKET, SECRET_KEY, point_at, shared_moto, shared_radosgw

from flows.wiring import OpenRun
from storage.layout import RunLayout
from storage.runs import list_runs
from storage.stores import open_store


async def trained(root: str) -> OpenRun:
    """A finished run in which timing decides nothing: one slot, and every trajectory under its step's own version."""
    config = pipeline.small_config(
        root,
        staleness__max_staleness=0,
        rollout__slots=1,
        learner__num_steps=3,
        evaluate__every=0,
        limits__poll_s=0.02,
    )
    run = pipeline.new_run(config)
    await pipeline.run_all(run)
    return run


@pytest.fixture(scope="module")
def weights_on_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of the same run on a directory."""
    return final_weights(asyncio.run(trained(str(tmp_path_factory.mktemp("file")))))


def final_weights(run: OpenRun) -> bytes:
    version = run.log.latest_policy()
    assert version is not None
    assert version.number == run.config.learner.num_steps
    return run.log.read_policy(version).safetensors


def assert_trained_once(run: OpenRun) -> None:
    """Every index of the run in exactly one step, and every object that a manifest promises in place."""
    steps = run.log.steps()
    assert [i for step in steps for i in step.indices.indices] == [*range(run.config.plan.num_indices)]
    layout = RunLayout(run.log.run_id)
    assert len(open_store(run.config.storage.root).list(layout.folder("step"))) == len(steps), (
        "no step was recorded twice"
    )
    for shard in run.config.plan.shards():
        assert [t.index for t in run.log.read_trajectories(shard)] == [*shard.indices]
        assert [s.index for s in run.log.read_scores(run.config.teacher.name, shard)] == [*shard.indices]
    assert run.log.failures() == []


async def test_a_run_on_s3_ends_with_the_weights_of_a_run_on_a_directory(
    weights_on_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, shared_moto())
    root = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    on_s3 = await trained(root)
    assert_trained_once(on_s3)
    assert final_weights(on_s3) == weights_on_file
    store = open_store(root)
    assert list_runs(store) == ["small-1"]
    for key in store.list("runs"):
        assert SECRET_KEY.encode() not in store.get(key), f"{key} holds the secret"


async def test_a_run_completes_though_one_request_in_twenty_fails(
    weights_on_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(shared_moto(), rate=0.05, seed=7) as proxy:
        point_at(monkeypatch, proxy.url)
        on_s3 = await trained(f"s3://{BUCKET}/{uuid.uuid4().hex}")
        assert_trained_once(on_s3)
        assert final_weights(on_s3) == weights_on_file
        assert proxy.injected["lost"] > 0
        assert proxy.injected.total() >= 5


@pytest.mark.radosgw
async def test_a_run_on_radosgw_ends_with_the_weights_of_a_run_on_a_directory(
    weights_on_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(shared_radosgw(), rate=0.05, seed=7) as proxy:
        point_at(monkeypatch, proxy.url)
        on_s3 = await trained(f"s3://{BUCKET}/{uuid.uuid4().hex}")
        assert_trained_once(on_s3)
        assert final_weights(on_s3) == weights_on_file
