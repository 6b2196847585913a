"""A run through the deployment with vLLM as sampler and as teacher, whose sampling engine is killed on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pipeline
import pytest
import yaml
from engine_models import SMALL_CACHE, engine_processes, is_engine
from hf_models import law_rows
from patience import stretched
from test_deployment import Stack, _is_gone, stack, until

from asyncopd.config import load_config
from asyncopd.models.causal_lm import load_safetensors
from asyncopd.models.load import build_causal_lm
from storage.run_log import StoredRunLog

__all__ = ["stack"]
pytestmark = pytest.mark.vllm
NUM_STEPS = 12
MODEL: dict[str, Any] = {
    "kind": "tiny",
    "architecture": "qwen3",
    "num_layers": 1,
    "hidden_size": 64,
    "num_heads": 2,
    "pretrain": {"num_steps": 30},
}


def test_a_run_outlives_the_death_of_its_sampling_engine(stack: Stack) -> None:
    changes: dict[str, Any] = {
        "student": MODEL,
        "teacher": {
            "engine": "vllm",
            "model": {**MODEL, "pretrain": {"num_steps": 30, "seed": 1}},
            "vllm": SMALL_CACHE,
        },
        "rollout": {**pipeline.SMALL["rollout"], "engine": "vllm", "vllm": SMALL_CACHE},
        "learner": {**pipeline.SMALL["learner"], "num_steps": NUM_STEPS},
        "evaluate": {"every": NUM_STEPS, "num_prompts": 8},
        "limits": {"deadline_s": 900, "poll_s": 0.05, "heartbeat_s": 0.5, "lease_s": 5},
    }
    config = stack.config.parent / "vllm.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(stack.config.read_text()), **changes}))
    log = stack.log("vllm")
    with stack.start("train", str(config), "--run-id", "vllm") as training:
        until(lambda: len(log.steps()) >= 2 or training.poll() is not None, 240, "two steps")
        scorer = stack.recorded()["score-0"]
        sampling, scoring = engine_processes(stack.recorded()["rollout-0"]), engine_processes(scorer)
        assert sampling
        assert scoring
        # The worker below vLLM's engine core; tests/test_vllm_engines.py kills the core.
        sampling[-1].kill()
        scorer.kill()
        # vLLM's engine processes outlive a killed parent; ours must not.
        until(lambda: all(_is_gone(process) for process in scoring), 10, "the killed scorer's engine to end")
        output, _ = training.communicate(timeout=stretched(300))
    assert training.returncode == 0, output
    assert f"Trained {NUM_STEPS} of {NUM_STEPS} steps" in output
    steps = log.steps()
    assert [index for step in steps for index in step.indices.indices] == list(range(8 * NUM_STEPS))
    assert max(staleness for step in steps for staleness in step.staleness_tokens) <= 2
    (failure,) = log.failures()
    assert failure.role == "rollout"
    assert "the vLLM sampler's engine" in failure.reason
    assert_logprobs_are_of_the_recorded_versions(log)
    for step in steps:
        for shard in (step.indices.start, step.indices.start + 4):
            trajectories = log.read_trajectories(next(s for s in log.trajectory_shards() if s.start == shard))
            assert all(t.version_last <= step.step for t in trajectories)
    assert not [p for p in stack.everything() if is_engine(p)]


def assert_logprobs_are_of_the_recorded_versions(log: StoredRunLog) -> None:
    """By a plain forward pass of the published weights, over responses of one version in the first and last shards."""
    shards = log.trajectory_shards()
    trajectories = [t for shard in shards[:2] + shards[-2:] for t in log.read_trajectories(shard)]
    checked = [t for t in trajectories if len(t.version_runs) == 1]
    versions = {version.number: version for version in log.policies()}
    assert len({t.version_first for t in checked}) >= 2
    model = build_causal_lm(json.loads(log.read_architecture()["config.json"]), seed=0)
    for trajectory in sorted(checked, key=lambda t: t.version_first):
        load_safetensors(model, log.read_policy(versions[trajectory.version_first]).safetensors)
        rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids)
        expected_T = rows_TV[np.arange(len(rows_TV)), trajectory.response_ids]
        np.testing.assert_allclose(trajectory.behaviour_logprobs_T, expected_T, atol=1e-3)


@pytest.mark.parametrize("name", ["walk_vllm", "gsm8k_qwen3"])
def test_the_configurations_for_vllm_are_complete(name: str) -> None:
    loaded = load_config(Path(__file__).parent.parent / "configs" / f"{name}.yaml")
    assert loaded.rollout.engine == "vllm"
    assert loaded.teacher.engine == "vllm"
