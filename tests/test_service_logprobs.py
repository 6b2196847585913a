"""A response under the weights of any stored version: computed by a process of its own, from what the run stored."""

from __future__ import annotations

import asyncio

import numpy as np
import pipeline
import pytest
from fastapi.testclient import TestClient
from service_world import client_of, settings_of

from flows.wiring import OpenRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    run = pipeline.new_run(pipeline.small_config(tmp_path_factory.mktemp("root"), staleness__max_staleness=0))
    asyncio.run(pipeline.run_all(run))
    return run


@pytest.fixture(scope="module")
def client(run: OpenRun, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return client_of(settings_of(run.config.storage.root, tmp_path_factory.mktemp("service")))


def test_the_version_that_sampled_gives_the_log_probs_it_had_when_sampling(run: OpenRun, client: TestClient) -> None:
    trajectory = run.log.read_trajectories(run.log.trajectory_shards()[-1])[0]
    assert trajectory.version_first == trajectory.version_last > 0
    path = f"/v1/runs/small-1/trajectories/{trajectory.index}/logprobs"
    then = client.get(path, params={"version": trajectory.version_first}).json()
    assert then["version"] == trajectory.version_first
    np.testing.assert_allclose(then["logprobs"], trajectory.behaviour_logprobs_T, atol=1e-4)

    now = client.get(path).json()
    assert now["version"] == 4
    assert len(now["logprobs"]) == len(trajectory.response_ids)
    assert np.abs(np.subtract(now["logprobs"], then["logprobs"])).max() > 1e-3, "training moved them"


def test_what_is_not_stored_is_refused_before_weights_are_loaded(client: TestClient) -> None:
    for path, said in (
        ("/v1/runs/small-1/trajectories/3/logprobs?version=99", "no weights of version 99"),
        ("/v1/runs/small-1/trajectories/9999/logprobs", "Index 9999"),
        ("/v1/runs/other/trajectories/3/logprobs", "no run other"),
    ):
        answer = client.get(path)
        assert answer.status_code == 404
        assert said in answer.json()["detail"]
