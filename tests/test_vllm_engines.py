"""What only the vLLM engines do: weights that change under running responses, and processes that die."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine_models import (
    ARCHITECTURE,
    EOS_ID,
    LAW,
    MAX_CONTEXT,
    SMALL_CACHE,
    VOCAB_SIZE,
    byte_model,
    engine_processes,
    requests,
    sampler_of,
    save_teacher,
    vllm_teacher_settings,
)
from hf_models import files_of, law_rows, sample_all, save_model, tiny_model, weights

from asyncopd.config import load_config
from asyncopd.config.engines import VllmSampling
from asyncopd.errors import ConfigError, EngineError
from asyncopd.models.load import build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import ScoreRequest
from asyncopd.teacher.hf import HfScorer
from asyncopd.types import Trajectory
from flows.preflight import check_vllm

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.vllm]
pytest_plugins = ["shared_engine"]


@pytest.fixture
def sampler(shared_sampler: Any) -> Any:
    return shared_sampler


def endless(seed: int) -> Any:
    return byte_model(seed=seed, eos_bias=-9.0)


async def refreshed_in_flight(sampler: Any, old: Any, new: Any) -> list[Trajectory]:
    """Sixty responses of 90 tokens on 16 slots, during which the weights change from `old` to `new`."""
    await sampler.refresh(weights(old, sampler.version.number + 1))
    running = asyncio.gather(*(sampler.sample(request) for request in requests(60, max_new_tokens=90)))
    await asyncio.sleep(0.3)
    await sampler.refresh(weights(new, sampler.version.number + 1))
    return list(await running)


def largest_error(trajectory: Trajectory, model: Any, tokens: slice) -> float:
    rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids, **LAW)
    expected_T = rows_TV[np.arange(len(rows_TV)), trajectory.response_ids]
    return float(np.abs(trajectory.behaviour_logprobs_T - expected_T)[tokens].max(initial=0.0))


async def test_tokens_are_those_of_the_hf_engine(sampler: Any) -> None:
    model = byte_model(seed=12)
    await sampler.refresh(weights(model, sampler.version.number + 1))
    made = await sample_all(sampler, requests(30))
    async with sampler_of("hf", model) as reference:
        expected = await sample_all(reference, requests(30))  # type: ignore[arg-type]
    same = [made[index].response_ids.tolist() == expected[index].response_ids.tolist() for index in made]
    # A logit that rounds otherwise may move a draw across an edge; that is rarer than one response in thirty.
    assert sum(same) >= 29


async def test_rebuild_keeps_tokens_and_goes_on_as_if_the_new_weights_had_read_them(sampler: Any) -> None:
    old, new = endless(1), endless(2)
    made = await refreshed_in_flight(sampler, old, new)
    version = sampler.version.number
    assert await sampler.weight_version() == f"{version}.0"
    changed = [t for t in made if [run.version for run in t.version_runs] == [version - 1, version]]
    assert len(changed) >= 8
    for trajectory in changed:
        kept = trajectory.version_runs[0].length
        assert largest_error(trajectory, old, slice(0, kept)) < 1e-3
        assert largest_error(trajectory, new, slice(kept, None)) < 1e-3
        assert len(trajectory.response_ids) == 90


async def test_keep_goes_on_with_the_old_cache(sampler: Any) -> None:
    sampler._settings = sampler._settings.model_copy(update={"in_flight": "keep"})
    old, new = endless(3), endless(4)
    made = await refreshed_in_flight(sampler, old, new)
    version = sampler.version.number
    changed = [t for t in made if [run.version for run in t.version_runs] == [version - 1, version]]
    assert len(changed) >= 8
    # The first keys and values are the old weights', so these are nobody's log-probs.
    assert max(largest_error(t, new, slice(t.version_runs[0].length, None)) for t in changed) > 1e-2
    # What starts under the new version is the new weights' alone.
    for trajectory in await asyncio.gather(*(sampler.sample(request) for request in requests(20))):
        assert largest_error(trajectory, new, slice(None)) < 1e-3


async def test_finish_gives_every_response_one_version(sampler: Any) -> None:
    sampler._settings = sampler._settings.model_copy(update={"in_flight": "finish"})
    old, new = endless(5), endless(6)
    made = await refreshed_in_flight(sampler, old, new)
    assert all(len(t.version_runs) == 1 for t in made)
    for trajectory in made:
        model = new if trajectory.version_runs[0].version == sampler.version.number else old
        assert largest_error(trajectory, model, slice(None)) < 1e-3


async def test_busy_intervals_cover_the_work_and_no_more(sampler: Any) -> None:
    sampler.busy_intervals()
    before = time.time()
    await sample_all(sampler, requests(10))
    after = time.time()
    await asyncio.sleep(0.2)
    intervals = sampler.busy_intervals()
    assert 0 < sum(end - start for start, end in intervals) <= after - before
    assert sampler.busy_intervals() == []


async def test_an_engine_process_that_is_killed_fails_its_responses_and_its_calls_by_name(sampler: Any) -> None:
    await sampler.refresh(weights(endless(7), sampler.version.number + 1))
    (core,) = [process for process in engine_processes(psutil.Process()) if "Core" in " ".join(process.cmdline())]
    running = [asyncio.ensure_future(sampler.sample(request)) for request in requests(80, max_new_tokens=90)]
    await asyncio.sleep(0.1)
    # Asleep, so that the refresh is under way and unanswered when it dies: vLLM would wait for that answer for ever.
    core.suspend()
    refreshing = asyncio.ensure_future(sampler.refresh(weights(byte_model(), 99)))
    await asyncio.sleep(1.0)
    core.kill()
    outcomes = await asyncio.wait_for(asyncio.gather(*running, refreshing, return_exceptions=True), 30)
    assert isinstance(outcomes[-1], EngineError)
    failures = [outcome for outcome in outcomes if not isinstance(outcome, Trajectory)]
    assert len(failures) >= 32
    for failure in failures:
        assert isinstance(failure, EngineError)
        assert "the vLLM sampler's engine" in str(failure)
    with pytest.raises(EngineError):
        await sampler.refresh(weights(byte_model(), 99))


# -- refusals before anything starts ------------------------------------------------------------------------------
def config(**overrides: Any) -> Any:
    return load_config({}, {key.replace("__", "."): value for key, value in overrides.items()})


async def test_models_vllm_cannot_serve_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student: heads of 48 / 4 = 12; vLLM's CPU attention"):
        check_vllm(config(rollout__engine="vllm"))
    described = {"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"Qwen3ForSequenceClassification.*generates text"):
        files_of(tmp_path).check(needed_context=8)

    exact = {"kind": "tiny", "hidden_size": 64, "num_heads": 2, "max_context": 195}
    with pytest.raises(ConfigError, match=r"a context of 195 tokens; engine vllm needs 196"):
        check_vllm(config(teacher={"engine": "vllm", "model": exact}))


async def test_http_teachers_of_large_vocabularies_are_held_to_their_top_k(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(vocab_size=9_000))
    student = {"kind": "pretrained", "path": str(tmp_path)}
    teacher = {"engine": "openai", "urls": ["http://127.0.0.1:8000"], "model": "qwen"}
    with pytest.raises(ConfigError, match=r"student's candidates, evaluate.every 25 would need all 9000"):
        check_vllm(config(student=student, teacher=teacher))
    check_vllm(config(student=student, teacher=teacher, loss={"name": "npd"}, evaluate__every=0))


async def test_rows_of_no_id_are_neither_drawn_nor_scored(tmp_path: Path) -> None:
    # Qwen2.5 pads its head to a round number of rows; here they would be drawn most of the time.
    from asyncopd.vllm.sampler import VllmSampler
    from asyncopd.vllm.scorer import VllmScorer

    model = build_causal_lm({**ARCHITECTURE, "vocab_size": 320, "num_ids": VOCAB_SIZE}, seed=1)
    with torch.no_grad():
        model.transformer.wte.weight[VOCAB_SIZE:] *= 5
    # A nucleus of fewer ids than the head, which is filled up with others.
    law: dict[str, Any] = {"slots": 4, "max_context": MAX_CONTEXT, "stop_ids": (EOS_ID,), "seed": 5, "top_p": 0.05}
    settings = SamplerSettings(**law, head=40)
    sampler = VllmSampler(model.config.to_dict(), settings, settings=VllmSampling.model_validate(SMALL_CACHE))
    try:
        await sampler.refresh(weights(model))
        made = list((await sample_all(sampler, requests(4))).values())  # type: ignore[arg-type]
    finally:
        await sampler.close()
    assert max(t.response_ids.max() for t in made) < VOCAB_SIZE
    assert max(t.candidates.head_ids_TK.max() for t in made) < VOCAB_SIZE
    whole = ScoreRequest(top_k=VOCAB_SIZE, num_teacher_draws=1, temperature=1.0, seed=0)
    hf = HfScorer(model, name="t", tokenizer_digest="d")
    expected = await hf.score(made, whole)
    scorer = VllmScorer(
        save_teacher(tmp_path, model),
        name="t",
        tokenizer_digest="d",
        vocab_size=VOCAB_SIZE,
        max_context=MAX_CONTEXT,
        max_sequences=4,
        settings=vllm_teacher_settings(),
    )
    try:
        found = await scorer.score(made, whole)
    finally:
        await scorer.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert np.allclose(np.exp(ours.topk_logprobs_TK.astype(float)).sum(1), 1, atol=1e-4)
        assert ours.topk_ids_TK.max() < VOCAB_SIZE
        assert np.allclose(ours.sampled_logprobs_T, theirs.sampled_logprobs_T, atol=1e-3)
