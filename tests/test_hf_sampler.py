"""HfSampler behind the Sampler port: concurrency, refresh in flight, refusals, failure and close."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import EOS_ID, MAX_CONTEXT, law_rows, requests, running_sampler, sample_all, tiny_model, weights

from asyncopd.errors import EngineError
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import Sampler, SampleRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.types import PolicyVersion, PolicyWeights


def endless(count: int) -> list[SampleRequest]:
    """Requests that no EOS ends; use with no stop ids."""
    return requests(count, max_new_tokens=MAX_CONTEXT - 6)


async def test_concurrent_calls_give_what_each_gives_alone() -> None:
    asked = requests(20)
    async with running_sampler(tiny_model()) as sampler:
        port: Sampler = sampler
        assert port.version == PolicyVersion(0)
        together = await sample_all(sampler, asked)
        assert sampler.num_generated_tokens == sum(len(t.response_ids) for t in together.values())
        assert sampler.num_active == sampler.num_waiting == 0
    async with running_sampler(tiny_model(), slots=2) as sampler:
        for request in asked[::7]:
            trajectory = await sampler.sample(request)
            assert trajectory.response_ids.tolist() == together[request.index].response_ids.tolist()
            assert trajectory.prompt_ids.tolist() == request.prompt_ids.tolist()
            assert (trajectory.prompt_id, trajectory.group, trajectory.correct) == ("", "", None)


async def test_another_seed_gives_other_tokens() -> None:
    made = []
    for seed in (5, 6):
        async with running_sampler(tiny_model(), seed=seed) as sampler:
            made.append(await sample_all(sampler, requests(6)))
    assert any(made[0][i].response_ids.tolist() != made[1][i].response_ids.tolist() for i in range(6))


async def test_first_tokens_follow_the_models_law() -> None:
    prompt_ids = np.array([3, 9], np.int32)
    async with running_sampler(tiny_model(), slots=256, temperature=0.8) as sampler:
        made = await sample_all(sampler, [SampleRequest(index, prompt_ids, 1) for index in range(3000)])
    counts_V = np.bincount([int(t.response_ids[0]) for t in made.values()], minlength=24)
    law_V = np.exp(law_rows(tiny_model(), prompt_ids, np.array([0], np.int32), temperature=0.8)[0])
    # The mean total variation of 3000 right draws over 24 ids is about 0.03.
    assert np.abs(counts_V / 3000 - law_V).sum() / 2 < 0.06


async def test_refresh_in_flight_keeps_tokens_and_records_runs() -> None:
    new = tiny_model(seed=1)
    async with running_sampler(tiny_model(), stop_ids=()) as sampler:
        running = asyncio.gather(*(sampler.sample(request) for request in endless(4)))
        while sampler.num_generated_tokens < 40:
            await asyncio.sleep(0.001)
        await sampler.refresh(weights(new, 1))
        assert sampler.version == PolicyVersion(1)
        made = await running
    for trajectory in made:
        assert [run.version for run in trajectory.version_runs] == [0, 1]
        kept = trajectory.version_runs[0].length
        assert kept >= 5
        rows_TV = law_rows(new, trajectory.prompt_ids, trajectory.response_ids)
        expected_T = rows_TV[np.arange(len(rows_TV)), trajectory.response_ids]
        np.testing.assert_allclose(trajectory.behaviour_logprobs_T[kept:], expected_T[kept:], atol=2e-5)


async def test_requests_that_cannot_be_served_name_their_index() -> None:
    async with running_sampler(tiny_model()) as sampler:
        for prompt, limit, complaint in (
            ([], 4, "index 41: 0 prompt tokens"),
            ([2], 0, "index 41: 1 prompt tokens and max_new_tokens 0"),
            ([2] * 50, 47, "index 41: 50 prompt .* exceed max_context 96"),
            ([2, 24], 4, "index 41: prompt ids reach from 2 to 24"),
        ):
            with pytest.raises(EngineError, match=complaint):
                await sampler.sample(SampleRequest(41, np.array(prompt, np.int32), limit))
        # Exactly the context is allowed.
        exact = await sampler.sample(SampleRequest(1, np.full(50, 2, np.int32), 46))
        assert len(exact.response_ids) <= 46


async def test_sampling_before_the_first_weights_is_refused() -> None:
    sampler = HfSampler(tiny_model(), SamplerSettings(slots=2, max_context=MAX_CONTEXT, stop_ids=(EOS_ID,), seed=0))
    with pytest.raises(EngineError, match="no weights yet"):
        await sampler.sample(requests(1)[0])
    await sampler.close()


async def test_close_fails_what_is_pending_within_a_second() -> None:
    async with running_sampler(tiny_model(), slots=2, stop_ids=()) as sampler:
        calls = [asyncio.ensure_future(sampler.sample(request)) for request in endless(40)]
        while sampler.num_active == 0:
            await asyncio.sleep(0.001)
        start = time.monotonic()
        await sampler.close()
        assert time.monotonic() - start < 2.0
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(outcomes[-1], EngineError)
        assert "closed" in str(outcomes[-1])
        with pytest.raises(EngineError, match="closed"):
            await sampler.sample(requests(1)[0])
        await sampler.close()


async def test_an_engine_failure_reaches_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_sampler(tiny_model(), slots=2) as sampler:

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(sampler._decoder, "step", fail)
        outcomes = await asyncio.gather(*(sampler.sample(r) for r in requests(5)), return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, EngineError)
            assert "RuntimeError: out of memory" in str(outcome)
        with pytest.raises(EngineError, match="out of memory"):
            await sampler.refresh(weights(tiny_model(), 1))


async def test_weights_that_do_not_fit_fail_their_refresh_only() -> None:
    async with running_sampler(tiny_model()) as sampler:
        with pytest.raises(EngineError, match="not safetensors"):
            await sampler.refresh(PolicyWeights(PolicyVersion(1), b"nonsense"))
        assert sampler.version == PolicyVersion(0)
        assert len(await sample_all(sampler, requests(3))) == 3


async def test_a_cancelled_call_harms_nobody() -> None:
    async with running_sampler(tiny_model(), slots=1) as sampler:
        calls = [asyncio.ensure_future(sampler.sample(request)) for request in requests(6)]
        await asyncio.sleep(0)
        for call in (calls[0], calls[3]):
            call.cancel()
        made = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in made) == 2


async def test_an_idle_sampler_uses_no_cpu_and_reports_when_it_was_busy() -> None:
    async with running_sampler(tiny_model()) as sampler:
        before = time.time()
        await sample_all(sampler, requests(20))
        after = time.time()
        intervals = sampler.busy_intervals()
        assert sampler.busy_intervals() == []
        assert 0 < sum(end - start for start, end in intervals) <= after - before + 1.0
        assert all(start <= end for start, end in intervals)
        assert intervals == sorted(intervals)
        # One stretch of work, but for pauses when this machine is loaded; never one interval per step.
        assert len(intervals) < 20
        used = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - used < 0.1


async def test_bfloat16_students_are_served() -> None:
    model = tiny_model().to(torch.bfloat16)
    async with running_sampler(model, head=2) as sampler:
        made = await sample_all(sampler, requests(4))
    for trajectory in made.values():
        assert trajectory.behaviour_logprobs_T.dtype == np.float32
        assert (np.exp(trajectory.candidates.head_logprobs_TK).sum(1) <= 1.0 + 1e-5).all()
