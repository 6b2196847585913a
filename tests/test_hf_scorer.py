"""HfScorer: teacher log-probs equal a plain forward pass, at any ids, whatever is scored together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hf_models import FAMILIES, VOCAB_SIZE, law_rows, tiny_model, trajectory_of

from asyncopd.errors import EngineError
from asyncopd.ports import Scorer, ScoreRequest
from asyncopd.teacher.hf import HfScorer
from asyncopd.types import LOGPROB_FLOOR, ScoredTrajectory, TeacherScores


def scorer(family: str = "llama", **changes: Any) -> HfScorer:
    settings: dict[str, Any] = {"name": "teacher", "tokenizer_digest": "t", "row_capacity": 64}
    return HfScorer(tiny_model(family), **{**settings, **changes})


def request(**changes: Any) -> ScoreRequest:
    return ScoreRequest(**{"top_k": 4, "num_teacher_draws": 3, "temperature": 1.0, "seed": 2, **changes})


def assert_close(found: list[TeacherScores], expected: list[TeacherScores], atol: float) -> None:
    for have, want in zip(found, expected, strict=True):
        assert have.index == want.index
        for name in ("sampled_logprobs_T", "topk_logprobs_TK", "head_logprobs_TK", "draw_logprobs_TN"):
            np.testing.assert_allclose(getattr(have, name), getattr(want, name), atol=atol)
        assert have.teacher_draw_ids_TM.tolist() == want.teacher_draw_ids_TM.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_scores_equal_a_plain_forward_pass_at_any_ids(family: str, temperature: float) -> None:
    trajectories = [trajectory_of(index, 1 + 7 * index) for index in range(7)]
    port: Scorer = scorer(family)
    for trajectory, scores in zip(
        trajectories, await port.score(trajectories, request(temperature=temperature)), strict=True
    ):
        ScoredTrajectory(trajectory, scores)
        rows_TV = law_rows(tiny_model(family), trajectory.prompt_ids, trajectory.response_ids, temperature=temperature)
        rows_T1 = np.arange(len(rows_TV))[:, None]
        for found, ids in (
            (scores.sampled_logprobs_T[:, None], trajectory.response_ids[:, None]),
            (scores.topk_logprobs_TK, scores.topk_ids_TK),
            (scores.head_logprobs_TK, trajectory.candidates.head_ids_TK),
            (scores.draw_logprobs_TN, trajectory.candidates.draw_ids_TN),
            (scores.teacher_draw_logprobs_TM, scores.teacher_draw_ids_TM),
        ):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, rows_TV[rows_T1, ids], atol=2e-5)
        np.testing.assert_allclose(scores.topk_logprobs_TK, -np.sort(-rows_TV)[:, :4], atol=2e-5)
        assert scores.temperature == temperature


async def test_scores_do_not_depend_on_what_is_scored_together() -> None:
    trajectories = [trajectory_of(index, 1 + 7 * index) for index in range(8)]
    together = await scorer().score(trajectories, request())
    alone = [(await scorer().score([trajectory], request()))[0] for trajectory in trajectories]
    assert_close(alone, together, atol=3e-6)
    backwards = await scorer(row_capacity=8, tokens_per_pass=60).score(trajectories[::-1], request())
    assert_close(backwards[::-1], together, atol=3e-6)
    # Chunks of five tokens.
    chunked = await scorer(logprobs_per_chunk=5 * VOCAB_SIZE).score(trajectories, request())
    assert_close(chunked, together, atol=1e-6)


async def test_candidates_of_different_widths_can_be_scored_together() -> None:
    trajectories = [trajectory_of(0, 4, head=2), trajectory_of(1, 5, head=0, num_draws=0), trajectory_of(2, 3, head=5)]
    for trajectory, scores in zip(trajectories, await scorer().score(trajectories, request()), strict=True):
        ScoredTrajectory(trajectory, scores)
    assert await scorer().score([], request()) == []


async def test_what_the_teacher_rules_out_is_stored_at_the_floor() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        model.lm_head.weight[3] = torch.inf  # hidden states of both signs: −inf or NaN
    trajectory = trajectory_of(3, 6)
    with pytest.raises(EngineError, match="produced NaN for indices 3 to 3"):
        await HfScorer(model, name="teacher", tokenizer_digest="t").score([trajectory], request(top_k=VOCAB_SIZE))
    with torch.no_grad():
        model.lm_head.weight[3] = 0.0
    scorer = HfScorer(model, name="teacher", tokenizer_digest="t")
    (scores,) = await scorer.score([trajectory], request(top_k=VOCAB_SIZE))
    rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids)
    assert rows_TV.min() < 2 * LOGPROB_FLOOR
    assert scores.topk_logprobs_TK.min() == LOGPROB_FLOOR
    assert scores.head_logprobs_TK.min() == LOGPROB_FLOOR


async def test_full_vocabulary_and_nothing_extra() -> None:
    (everything,) = await scorer().score([trajectory_of(3, 6)], request(top_k=VOCAB_SIZE))
    assert np.sort(everything.topk_ids_TK).tolist() == [list(range(VOCAB_SIZE))] * 6
    np.testing.assert_allclose(np.exp(everything.topk_logprobs_TK).sum(1), 1.0, atol=1e-6)
    (nothing,) = await scorer().score([trajectory_of(3, 6)], request(top_k=0, num_teacher_draws=0))
    assert nothing.topk_ids_TK.shape == nothing.teacher_draw_ids_TM.shape == (6, 0)


async def test_teacher_draws_are_seeded_and_follow_the_teacher() -> None:
    trajectory = trajectory_of(3, 6)
    (scores,) = await scorer().score([trajectory], request(num_teacher_draws=4000))
    (again,) = await scorer().score([trajectory], request(num_teacher_draws=4000))
    (other,) = await scorer().score([trajectory], request(num_teacher_draws=4000, seed=3))
    assert np.array_equal(scores.teacher_draw_ids_TM, again.teacher_draw_ids_TM)
    assert not np.array_equal(scores.teacher_draw_ids_TM, other.teacher_draw_ids_TM)
    rows_TV = law_rows(tiny_model(), trajectory.prompt_ids, trajectory.response_ids)
    for ids_M, law_V in zip(scores.teacher_draw_ids_TM, np.exp(rows_TV), strict=True):
        frequencies_V = np.bincount(ids_M, minlength=VOCAB_SIZE) / len(ids_M)
        assert np.abs(frequencies_V - law_V).sum() / 2 < 0.06


async def test_requests_that_cannot_be_answered_are_refused() -> None:
    for trajectory, asked, complaint in (
        (trajectory_of(1, 3), request(top_k=25), "top_k <= 24"),
        (trajectory_of(1, 3), request(temperature=0.0), "temperature above 0"),
        (trajectory_of(1, 3, vocab_size=500), request(), "index 1: ids reach"),
        (trajectory_of(1, 140), request(), "index 1: 142 tokens exceed the 128 positions"),
    ):
        with pytest.raises(EngineError, match=complaint):
            await scorer().score([trajectory], asked)


async def test_nan_teachers_are_an_error() -> None:
    model = tiny_model()
    broken = HfScorer(model, name="teacher", tokenizer_digest="t")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(EngineError, match="NaN"):
        await broken.score([trajectory_of(1, 3)], request())


def test_digest_changes_with_whatever_changes_the_numbers() -> None:
    digests = {
        scorer("llama").digest,
        scorer("qwen3").digest,
        HfScorer(tiny_model("llama", seed=1), name="teacher", tokenizer_digest="t").digest,
        HfScorer(tiny_model("llama", rms_norm_eps=1e-3), name="teacher", tokenizer_digest="t").digest,
    }
    assert len(digests) == 4
    assert scorer("llama").digest == scorer("llama", name="other").digest
