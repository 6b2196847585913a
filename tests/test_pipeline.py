"""The whole pipeline on real parts, in one process: every arrow of the design, without Prefect."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from safetensors.torch import load
from storage_builders import assert_same

from asyncopd.metrics import DRIFT, ESS, OUTSIDE
from asyncopd.schedule import step_of
from asyncopd.types import PolicyVersion
from flows.wiring import open_stored_run, rollout_stage
from storage.manifests import find_manifest
from storage.stores.local import LocalStore


@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_a_run_trains_every_index_once_within_the_staleness_bound(tmp_path: Path, max_staleness: int) -> None:
    config = pipeline.small_config(tmp_path, staleness__max_staleness=max_staleness)
    run = pipeline.new_run(config)
    await pipeline.run_all(run)

    steps = run.log.steps()
    assert [step.step for step in steps] == list(range(4))
    assert [i for step in steps for i in step.indices.indices] == list(range(32))
    for step in steps:
        assert 0 <= min(step.staleness_tokens) <= max(step.staleness_tokens) <= max_staleness
        assert sum(step.staleness_tokens.values()) == step.num_tokens
    for shard in config.plan.shards():
        for trajectory in run.log.read_trajectories(shard):
            step = step_of(trajectory.index, config.learner.batch_size)
            assert step - max_staleness <= trajectory.version_first <= trajectory.version_last <= step
    assert run.log.latest_policy().number == 4
    assert [e.version.number for e in run.log.evaluations()] == [0, 4]


async def test_behaviour_logprobs_are_the_learners_own_when_nothing_is_stale(tmp_path: Path) -> None:
    run = pipeline.new_run(pipeline.small_config(tmp_path, staleness__max_staleness=0))
    await pipeline.run_all(run)
    for step in run.log.steps():
        # The sampler's cached decoding and the learner's packed forward agree on every trained token.
        assert step.metrics["train/drift_nats"] < 1e-9
        assert step.metrics["train/ess_fraction"] == pytest.approx(1, abs=1e-6)


async def test_responses_to_one_prompt_share_it_from_sampler_to_learner(tmp_path: Path) -> None:
    changes = {"rollout__responses_per_prompt": 4, "staleness__max_staleness": 0, "evaluate__every": 0}
    run = pipeline.new_run(pipeline.small_config(tmp_path, **changes))
    await pipeline.run_all(run)
    made = [t for shard in run.config.plan.shards() for t in run.log.read_trajectories(shard)]
    asked = [trajectory.prompt_id for trajectory in made]
    assert asked == [asked[number - number % 4] for number in range(len(asked))]
    assert len(set(asked)) > 1
    assert len({tuple(trajectory.response_ids) for trajectory in made}) > len(asked) // 4
    for step in run.log.steps():
        assert step.metrics["train/drift_nats"] < 1e-9
        assert step.metrics["train/ess_fraction"] == pytest.approx(1, abs=1e-6)


async def test_a_stopped_learner_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    # All rollouts and scores exist; one learner trains through, the other is stopped after step 3 and resumed.
    config = pipeline.small_config(tmp_path / "a", staleness__max_staleness=4, evaluate__every=0)
    run = pipeline.new_run(config)
    await pipeline.run_all(run)
    through = run.log.read_policy(run.log.latest_policy()).safetensors

    worker = run.worker("learn")
    rewind = run.log.record_rewind(2, worker=worker.name)  # as if steps 2 and 3 had been lost
    await pipeline.train_steps(run)
    resumed = run.log.latest_policy()
    rewind += 1  # the learner records its own, so that whoever trained before it cannot publish into its lineage
    assert (resumed.number, resumed.rewind) == (4, rewind)
    assert run.log.read_policy(resumed).safetensors == through
    assert [(s.step, s.rewind) for s in run.log.steps()] == [(0, 0), (1, 0), (2, rewind), (3, rewind)]


async def test_a_second_learner_call_on_a_finished_run_does_nothing(tmp_path: Path) -> None:
    run = pipeline.new_run(pipeline.small_config(tmp_path, evaluate__every=0))
    await pipeline.run_all(run)
    before = run.log.policies()
    await pipeline.train_steps(run)
    assert run.log.policies() == before


async def test_training_lowers_the_divergence_from_the_teacher(tmp_path: Path) -> None:
    config = pipeline.small_config(
        tmp_path, learner__num_steps=30, learner__batch_size=16, learner__lr=3e-3, evaluate__every=30
    )
    run = pipeline.new_run(config)
    await pipeline.run_all(run)
    first, last = run.log.evaluations()
    assert last.kl_nats < first.kl_nats - 2 * np.hypot(first.kl_standard_error_nats, last.kl_standard_error_nats)


async def test_a_role_says_what_it_loads_while_that_takes_its_time(tmp_path: Path) -> None:
    # A model that loads held the event loop up: no heartbeat, and "starting" at best.
    run = pipeline.new_run(pipeline.small_config(tmp_path))
    worker = run.worker("score")

    def seen() -> list[str | None]:
        first = run.log.heartbeats()[worker.name]
        while (later := run.log.heartbeats()[worker.name]).beat < first.beat + 2:
            time.sleep(0.01)
        return [first.status.doing, later.status.doing]

    async with worker.alive():
        assert await worker.load("loads the teacher", seen) == ["loads the teacher"] * 2
        assert worker.status.doing is None


async def test_a_student_sampled_with_top_p_does_not_drift_from_itself(tmp_path: Path) -> None:
    # Log p_θ was of the whole distribution, log p_old of the truncated one: up to 0.105 nats apart at every token.
    asked = {"rollout__top_p": 0.9, "staleness__max_staleness": 0, "evaluate__every": 0, "learner__num_steps": 2}
    run = pipeline.new_run(pipeline.small_config(tmp_path, **asked))
    await pipeline.run_all(run)
    for step in run.log.steps():
        assert step.metrics[DRIFT.key] < 1e-6
        assert step.metrics[ESS.key] == pytest.approx(1, abs=1e-5)
        assert step.metrics[OUTSIDE.key] == 0


async def test_a_rewind_does_not_take_a_sampler_back_to_older_weights(tmp_path: Path) -> None:
    # It used to: at τ = 0 a response begun under version 4 then went on under version 2.
    run = pipeline.new_run(pipeline.small_config(tmp_path, evaluate__every=0))
    await pipeline.run_all(run)
    worker = run.worker("rollout")
    stage, sampler = rollout_stage(run, worker)
    async with stage.following_versions():
        assert sampler.version == PolicyVersion(4, 0)
        run.log.record_rewind(3, worker="learner")
        assert open_stored_run(run.config.storage.root, run.log.run_id).log.latest_policy() == PolicyVersion(3, 0)
        await asyncio.sleep(20 * worker.poll_s)
        assert sampler.version == PolicyVersion(4, 0)
        for number in (4, 5):
            newer = replace(run.log.read_policy(PolicyVersion(4)), version=PolicyVersion(number, 1))
            run.log.publish_policy(newer, worker="learner")
        await worker.wait_for(lambda: sampler.version == PolicyVersion(5, 1) or None, "version 5")
    await sampler.close()


async def test_a_rewind_between_two_looks_does_not_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It used to: the newest version was compared at one look and read at the next.
    run = pipeline.new_run(pipeline.small_config(tmp_path, evaluate__every=0))
    await pipeline.run_all(run)
    worker = run.worker("rollout")
    stage, sampler = rollout_stage(run, worker)
    looks = iter([PolicyVersion(2), PolicyVersion(3)])
    monkeypatch.setattr(run.log, "latest_policy", lambda: next(looks, PolicyVersion(1)))
    async with stage.following_versions():
        await worker.wait_for(lambda: sampler.version != PolicyVersion(2) or None, "another version")
        assert sampler.version == PolicyVersion(3)
    await sampler.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_run_that_publishes_deltas_equals_one_that_publishes_full_weights(tmp_path: Path, dtype: str) -> None:
    # One slot and τ = 0: what is sampled then depends on nothing but the weights, however the processes are timed.
    runs = []
    for kind in ("full", "delta"):
        config = pipeline.small_config(
            tmp_path / kind,
            staleness__max_staleness=0,
            rollout__slots=1,
            learner__publish__kind=kind,
            learner__publish__dtype=dtype,
            learner__publish__full_every=3,
        )
        runs.append(pipeline.new_run(config))
        await pipeline.run_all(runs[-1])
    full, delta = (open_stored_run(run.config.storage.root, run.log.run_id) for run in runs)

    in_full, chained = (
        find_manifest(run.log.store, run.log.layout.key("policy", state=PolicyVersion(1))).facts.chain
        for run in (full, delta)
    )
    assert in_full is None
    assert chained.full is None, "version 1 is a delta"
    assert full.log.policies() == delta.log.policies()
    for version in full.log.policies():
        assert full.log.read_policy(version) == delta.log.read_policy(version)
    for shard in full.config.plan.shards():
        assert_same(full.log.read_trajectories(shard), delta.log.read_trajectories(shard))
    for ours, theirs in zip(full.log.steps(), delta.log.steps(), strict=True):
        assert ours.metrics | {"train/seconds": 0} == theirs.metrics | {"train/seconds": 0}
    assert [e.kl_nats for e in full.log.evaluations()] == [e.kl_nats for e in delta.log.evaluations()]
    assert {name: t.dtype for name, t in load(full.log.read_policy(PolicyVersion(4)).safetensors).items()} == {
        name: getattr(torch, dtype) for name in load(full.log.read_checkpoint(4, 0)["model.safetensors"])
    }
    assert {t.dtype for t in load(full.log.read_checkpoint(4, 0)["model.safetensors"]).values()} == {torch.float32}


async def test_a_run_goes_on_when_its_newest_version_cannot_be_read(tmp_path: Path) -> None:
    # The delta of version 2 is lost and version 4 is full: with τ = 2, samplers go on under version 1 until then.
    config = pipeline.small_config(
        tmp_path,
        evaluate__every=0,
        staleness__max_staleness=2,
        learner__publish__kind="delta",
        learner__publish__full_every=4,
    )
    run = pipeline.new_run(config)
    original_put = LocalStore.put

    def lose_the_delta_of_version_2(store: LocalStore, key: str, body: bytes, *, durable: bool = True) -> None:
        if not ("policies/000002/" in key and key.endswith(".delta")):
            original_put(store, key, body, durable=durable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put", lose_the_delta_of_version_2)
        await pipeline.run_all(run)
    assert [step.step for step in run.log.steps()] == list(range(4))
    used = {t.version_first for shard in config.plan.shards() for t in run.log.read_trajectories(shard)}
    assert used <= {0, 1, 4}, "versions 2 and 3 cannot be read"
