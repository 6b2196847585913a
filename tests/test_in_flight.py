"""What becomes of responses in progress when the weights change, on the real hf sampler, both ways."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hf_models import MAX_CONTEXT, law_rows, requests, tiny_model, weights

from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.types import PolicyVersion, Trajectory


def sampler_of(slots: int, *, in_flight_updates: bool) -> HfSampler:
    sampling = SamplerSettings(slots=slots, max_context=MAX_CONTEXT, stop_ids=(), seed=0)
    return HfSampler(tiny_model(), sampling, in_flight_updates=in_flight_updates)


async def sampled_across_two_refreshes(*, in_flight_updates: bool) -> list[Trajectory]:
    """Ten responses in four slots, with weights 1 and 2 arriving while the first ones are on their way."""
    sampler = sampler_of(4, in_flight_updates=in_flight_updates)
    await sampler.refresh(weights(tiny_model(seed=0), 0))
    asked = requests(10, max_new_tokens=60)
    running = asyncio.gather(*(sampler.sample(request) for request in asked))
    for version in (1, 2):
        while sampler.num_generated_tokens < 80 * version:
            await asyncio.sleep(0.0005)
        await sampler.refresh(weights(tiny_model(seed=version), version))
        assert sampler.version == PolicyVersion(version)
    made: list[Trajectory] = await running
    await sampler.close()
    return made


@pytest.mark.parametrize("in_flight_updates", [True, False])
async def test_every_tokens_logprob_is_that_of_the_version_that_is_recorded_for_it(in_flight_updates: bool) -> None:
    made = await sampled_across_two_refreshes(in_flight_updates=in_flight_updates)
    models = [tiny_model(seed=version) for version in range(3)]
    for trajectory in made:
        rows_3TV = [law_rows(model, trajectory.prompt_ids, trajectory.response_ids) for model in models]
        positions = np.arange(len(trajectory.response_ids))
        expected_3T = np.stack([rows_TV[positions, trajectory.response_ids] for rows_TV in rows_3TV])
        of_its_version_T = expected_3T[trajectory.versions_T, positions]
        np.testing.assert_allclose(trajectory.behaviour_logprobs_T, of_its_version_T, atol=2e-5)
        # And the versions differ enough for that to mean something.
        others_T = expected_3T[(trajectory.versions_T + 1) % 3, positions]
        assert np.abs(trajectory.behaviour_logprobs_T - others_T).mean() > 0.1
    assert {run.version for trajectory in made for run in trajectory.version_runs} == {0, 1, 2}
    changed = [trajectory for trajectory in made if len(trajectory.version_runs) > 1]
    assert len(changed) > 0 if in_flight_updates else changed == []


async def test_without_in_flight_updates_new_requests_wait_for_the_new_weights() -> None:
    sampler = sampler_of(4, in_flight_updates=False)
    await sampler.refresh(weights(tiny_model(), 0))
    first = asyncio.create_task(sampler.sample(SampleRequest(0, np.array([3], np.int32), 60)))
    while sampler.num_generated_tokens < 5:
        await asyncio.sleep(0.0005)
    refresh = asyncio.create_task(sampler.refresh(weights(tiny_model(seed=1), 1)))
    await asyncio.sleep(0)
    # Three slots are free, and yet what is asked for now starts under version 1.
    second = await sampler.sample(SampleRequest(1, np.array([3], np.int32), 5))
    assert first.done()
    await refresh
    assert [run.version for run in (await first).version_runs] == [0]
    assert [run.version for run in second.version_runs] == [1]
    await sampler.close()


async def test_closing_a_sampler_that_waits_to_refresh_fails_everything_pending() -> None:
    sampler = sampler_of(1, in_flight_updates=False)
    await sampler.refresh(weights(tiny_model(), 0))
    calls = [asyncio.ensure_future(sampler.sample(request)) for request in requests(3, max_new_tokens=90)]
    while sampler.num_active == 0:
        await asyncio.sleep(0.0005)
    calls.append(asyncio.ensure_future(sampler.refresh(weights(tiny_model(seed=1), 1))))
    await asyncio.sleep(0)
    await sampler.close()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert "closed" in str(outcomes[-1])
