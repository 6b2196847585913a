"""Continuous batching: tokens depend on seed, index, prompt and weights, never on slots, order or company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import EOS_ID, FAMILIES, MAX_CONTEXT, law_rows, requests, tiny_model, weights
from transformers import PreTrainedModel

from asyncopd.errors import ConfigError, EngineError
from asyncopd.models.load import build_causal_lm
from asyncopd.models.sampling import LOGPROB_FLOOR, SamplerSettings
from asyncopd.ports import SampleRequest
from asyncopd.rollout import decoding
from asyncopd.rollout.decoding import Decoder
from asyncopd.types import PolicyWeights, Trajectory, VersionRun


def decoder(model: PreTrainedModel, **changes: Any) -> Decoder:
    settings: dict[str, Any] = {
        "slots": 8,
        "max_context": MAX_CONTEXT,
        "head": 3,
        "num_draws": 2,
        "law": "tail",
        "seed": 5,
        "stop_ids": (EOS_ID,),
    }
    initial = weights(model)
    made = Decoder(model, SamplerSettings(**{**settings, **changes}))
    made.refresh(initial)
    return made


def decode(
    engine: Decoder, asked: Sequence[SampleRequest], refreshes: dict[int, PolicyWeights] | None = None
) -> dict[int, Trajectory]:
    """Run requests through an engine, in order; `refreshes` are loaded before the step of their number."""
    waiting, made, step = list(reversed(asked)), {}, 0
    with torch.inference_mode():
        while waiting or engine.num_active:
            if refreshes and step in refreshes:
                engine.refresh(refreshes[step])
            while waiting and engine.num_free:
                engine.admit(waiting.pop())
            made.update({trajectory.index: trajectory for _, trajectory in engine.step()})
            step += 1
    return made


def assert_same(found: dict[int, Trajectory], expected: dict[int, Trajectory]) -> None:
    assert found.keys() == expected.keys()
    for index, want in expected.items():
        have = found[index]
        assert have.response_ids.tolist() == want.response_ids.tolist()
        assert have.finish_reason == want.finish_reason
        np.testing.assert_allclose(have.behaviour_logprobs_T, want.behaviour_logprobs_T, atol=1e-5)
        np.testing.assert_allclose(have.candidates.tail_logmass_T, want.candidates.tail_logmass_T, atol=1e-5)
        assert have.candidates.draw_ids_TN.tolist() == want.candidates.draw_ids_TN.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_output_does_not_depend_on_slots_order_or_company(family: str) -> None:
    asked = requests(30)
    expected = decode(decoder(tiny_model(family), slots=1), asked)
    assert len({len(trajectory.response_ids) for trajectory in expected.values()}) > 8
    assert_same(decode(decoder(tiny_model(family), slots=64), asked), expected)
    assert_same(decode(decoder(tiny_model(family), slots=5), asked[::-1]), expected)
    alone = decode(decoder(tiny_model(family), slots=3), asked[11:12])
    assert_same(alone, {11: expected[11]})


def test_prefill_in_several_passes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(12)
    expected = decode(decoder(tiny_model()), asked)
    monkeypatch.setattr(decoding, "_PREFILL_CELLS", 4)
    monkeypatch.setattr(decoding, "_ROW_CAPACITY", 6)
    again = {3: weights(tiny_model())}
    assert_same(decode(decoder(tiny_model()), asked, again), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9)])
def test_stored_logprobs_are_those_of_a_forward_pass_without_cache(
    family: str, temperature: float, top_p: float
) -> None:
    made = decode(decoder(tiny_model(family), temperature=temperature, top_p=top_p), requests(12))
    model = tiny_model(family)
    for trajectory in made.values():
        candidates = trajectory.candidates
        rows_TV = law_rows(
            model, trajectory.prompt_ids, trajectory.response_ids, temperature=temperature, top_p=top_p
        ).clip(min=LOGPROB_FLOOR)
        rows_T = np.arange(len(rows_TV))[:, None]
        np.testing.assert_allclose(
            trajectory.behaviour_logprobs_T, rows_TV[rows_T[:, 0], trajectory.response_ids], atol=2e-5
        )
        assert trajectory.behaviour_logprobs_T.min() > LOGPROB_FLOOR
        np.testing.assert_allclose(candidates.head_logprobs_TK, rows_TV[rows_T, candidates.head_ids_TK], atol=2e-5)
        np.testing.assert_allclose(candidates.draw_logprobs_TN, rows_TV[rows_T, candidates.draw_ids_TN], atol=2e-5)
        # The head is the true top-k, most likely first.
        np.testing.assert_allclose(candidates.head_logprobs_TK, -np.sort(-rows_TV)[:, :3], atol=2e-5)
        tail_mass_T = 1 - np.exp(candidates.head_logprobs_TK.astype(np.float64)).sum(1)
        np.testing.assert_allclose(np.exp(candidates.tail_logmass_T), tail_mass_T, atol=1e-5)
        in_head_TN = (candidates.draw_ids_TN[:, :, None] == candidates.head_ids_TK[:, None, :]).any(-1)
        assert not in_head_TN[candidates.tail_logmass_T > LOGPROB_FLOOR].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_refresh_keeps_tokens_and_continues_under_the_new_weights(family: str) -> None:
    old, new = tiny_model(family, seed=0), tiny_model(family, seed=1)
    # Without EOS every response has 12 tokens, so each number below is exact.
    asked = requests(6, max_new_tokens=12)
    before = decode(decoder(tiny_model(family, seed=0), stop_ids=()), asked)
    engine = decoder(tiny_model(family, seed=0), stop_ids=())
    made = decode(engine, asked, {5: weights(new, 7)})
    assert engine.version is not None
    assert engine.version.number == 7
    for index, trajectory in made.items():
        assert trajectory.version_runs == (VersionRun(0, 5), VersionRun(7, 7))
        assert trajectory.response_ids[:5].tolist() == before[index].response_ids[:5].tolist()
        rows_T = np.arange(12)
        for model, part in ((old, slice(0, 5)), (new, slice(5, 12))):
            rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids)
            np.testing.assert_allclose(
                trajectory.behaviour_logprobs_T[part], rows_TV[rows_T, trajectory.response_ids][part], atol=2e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_to_one_prompt_are_what_they_are_alone(family: str) -> None:
    prompts = [np.arange(2, 9, dtype=np.int32), np.array([5, 3], np.int32)]
    asked = [SampleRequest(index, prompts[index // 5 % 2], 30) for index in range(20)]
    refreshes = {step: weights(tiny_model(family, seed=1), step) for step in (3, 9)}
    together = decode(decoder(tiny_model(family), stop_ids=()), asked, refreshes)
    for request in asked[:8]:
        # Admitted at step 0 either way, so that both see the new weights at the same positions.
        alone = decode(decoder(tiny_model(family), stop_ids=()), [request], refreshes)
        assert_same({request.index: together[request.index]}, alone)


def test_refresh_while_slots_are_refilled_matches_running_alone() -> None:
    # Several versions pass while responses of many lengths start and end: each must be as if it ran by itself
    # under the versions it recorded.
    asked = requests(24)
    models = {number: tiny_model(seed=number) for number in range(4)}
    refreshes = {number * 9: weights(models[number], number) for number in (1, 2, 3)}
    made = decode(decoder(tiny_model(seed=0), slots=4), asked, refreshes)
    assert {len(trajectory.version_runs) for trajectory in made.values()} >= {1, 2}
    for trajectory in made.values():
        rows_T = np.arange(len(trajectory.response_ids))
        logprobs_T = np.zeros(len(rows_T))
        for number, model in models.items():
            rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids)
            of_version = trajectory.versions_T == number
            logprobs_T[of_version] = rows_TV[rows_T, trajectory.response_ids][of_version]
        np.testing.assert_allclose(trajectory.behaviour_logprobs_T, logprobs_T, atol=2e-5)


def test_two_refreshes_between_steps_leave_one_run() -> None:
    engine = decoder(tiny_model(), stop_ids=())
    engine.admit(requests(1, max_new_tokens=3)[0])
    with torch.inference_mode():
        engine.step()
        for number in (1, 2):
            engine.refresh(weights(tiny_model(), number))
        engine.step()
        ((_, trajectory),) = engine.step()
    assert trajectory.version_runs == (VersionRun(0, 1), VersionRun(2, 2))


def test_responses_end_at_eos_or_at_their_own_limit() -> None:
    asked = [SampleRequest(r.index, r.prompt_ids, 1 + r.index % 9) for r in requests(40)]
    made = decode(decoder(tiny_model()), asked)
    assert {trajectory.finish_reason for trajectory in made.values()} == {"stop", "length"}
    for request in asked:
        trajectory = made[request.index]
        assert (trajectory.response_ids[:-1] != EOS_ID).all()
        if trajectory.finish_reason == "stop":
            assert trajectory.response_ids[-1] == EOS_ID
        else:
            assert trajectory.response_ids[-1] != EOS_ID
            assert len(trajectory.response_ids) == request.max_new_tokens


def test_policy_draws_contain_the_emitted_token_first() -> None:
    made = decode(decoder(tiny_model(), head=0, num_draws=5, law="policy"), requests(5))
    for trajectory in made.values():
        assert trajectory.candidates.draw_ids_TN[:, 0].tolist() == trajectory.response_ids.tolist()
        assert trajectory.candidates.head_ids_TK.shape == (len(trajectory.response_ids), 0)
        assert (trajectory.candidates.tail_logmass_T == 0).all()


def test_weights_that_do_not_fit_leave_the_engine_as_it_was() -> None:
    engine = decoder(tiny_model())
    with pytest.raises(EngineError, match=r"tensor .* should be"):
        engine.refresh(weights(tiny_model(intermediate_size=16), 1))
    assert engine.version is not None
    assert engine.version.number == 0
    assert_same(decode(engine, requests(3)), decode(decoder(tiny_model()), requests(3)))


def test_nan_weights_are_an_error_not_tokens() -> None:
    broken = tiny_model()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    engine = decoder(tiny_model())
    engine.refresh(weights(broken, 3))
    engine.admit(requests(1)[0])
    with torch.inference_mode(), pytest.raises(EngineError, match="NaN under policy version"):
        engine.step()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(EngineError, match="max_context 129 must be at most the model's 128"):
        decoder(tiny_model(), max_context=129)
    falcon = {"model_type": "falcon", "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1}
    with pytest.raises(EngineError, match="0 of 1 layers attend through"):
        decoder(build_causal_lm({**falcon, "num_attention_heads": 2}, seed=0))
    with pytest.raises(ConfigError, match="temperature"):
        decoder(tiny_model(), temperature=0.0)
