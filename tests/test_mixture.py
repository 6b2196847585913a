"""A mixture of teachers is the log of the weighted mean of their probabilities, or is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from learner_builders import scored_batch

from asyncopd.errors import ConfigError, ShapeError
from asyncopd.types import TeacherScores
from storage.mixture import mix


def scores(seed: int = 0) -> TeacherScores:
    """One trajectory of 13 tokens scored at full width; another seed is another teacher on the same ids."""
    first = scored_batch()[3].scores
    if seed == 0:
        return first
    rng = np.random.default_rng(seed)
    rows_TV = rng.standard_normal(first.topk_ids_TK.shape)
    rows_TV -= np.log(np.exp(rows_TV).sum(1, keepdims=True))
    order_TV = np.argsort(-rows_TV, axis=1).astype(np.int32)
    trajectory = scored_batch()[3].trajectory

    def at(ids: np.ndarray) -> np.ndarray:
        return np.take_along_axis(rows_TV, ids.reshape(len(ids), -1), axis=1).reshape(ids.shape).astype(np.float32)

    return replace(
        first,
        teacher=f"t{seed}",
        teacher_digest=str(seed),
        sampled_logprobs_T=at(trajectory.response_ids),
        topk_ids_TK=order_TV,
        topk_logprobs_TK=at(order_TV),
        head_logprobs_TK=at(trajectory.candidates.head_ids_TK),
        draw_logprobs_TN=at(trajectory.candidates.draw_ids_TN),
    )


def full_rows(of: TeacherScores) -> np.ndarray:
    rows_TV = np.zeros(of.topk_ids_TK.shape)
    np.put_along_axis(rows_TV, of.topk_ids_TK, np.exp(of.topk_logprobs_TK.astype(np.float64)), axis=1)
    return rows_TV


def test_a_mixture_is_the_weighted_mean_of_probabilities_at_every_id() -> None:
    a, b = scores(), scores(1)
    mixed = mix([(0.25, a), (0.75, b)], name="m", needs_top_k=True)
    expected_TV = 0.25 * full_rows(a) + 0.75 * full_rows(b)
    assert np.allclose(full_rows(mixed), expected_TV, atol=1e-6)
    assert np.allclose(full_rows(mixed).sum(1), 1, atol=1e-5)
    assert (np.diff(mixed.topk_logprobs_TK, axis=1) <= 0).all()
    trajectory = scored_batch()[3].trajectory
    for found, ids in (
        (mixed.sampled_logprobs_T[:, None], trajectory.response_ids[:, None]),
        (mixed.head_logprobs_TK, trajectory.candidates.head_ids_TK),
        (mixed.draw_logprobs_TN, trajectory.candidates.draw_ids_TN),
    ):
        assert np.allclose(np.exp(found), np.take_along_axis(expected_TV, ids, axis=1), atol=1e-6)


def test_a_teacher_mixed_with_itself_is_itself() -> None:
    a = scores()
    mixed = mix([(0.3, a), (0.7, a)], name="m", needs_top_k=True)
    assert np.array_equal(mixed.topk_ids_TK, a.topk_ids_TK)
    assert np.allclose(mixed.topk_logprobs_TK, a.topk_logprobs_TK, atol=1e-6)


def test_the_digest_tells_weights_and_teachers_apart() -> None:
    a, b = scores(), scores(1)
    digests = {
        mix([(w, a), (1 - w, other)], name="m", needs_top_k=False).teacher_digest
        for w in (0.25, 0.5)
        for other in (a, b)
    }
    assert len(digests) == 4


def test_top_k_ids_that_differ_are_left_out_or_refused_when_the_loss_needs_them() -> None:
    a = replace(scores(), topk_ids_TK=scores().topk_ids_TK[:, :3], topk_logprobs_TK=scores().topk_logprobs_TK[:, :3])
    b = replace(scores(1), topk_ids_TK=scores(1).topk_ids_TK[:, :3], topk_logprobs_TK=scores(1).topk_logprobs_TK[:, :3])
    assert mix([(0.5, a), (0.5, b)], name="m", needs_top_k=False).topk_ids_TK.shape == (13, 0)
    with pytest.raises(ConfigError, match=r"top-k ids differ.*--top-k all"):
        mix([(0.5, a), (0.5, b)], name="m", needs_top_k=True)


def test_other_temperatures_and_other_candidates_are_refused() -> None:
    a, b = scores(), scores(1)
    with pytest.raises(ConfigError, match="temperature"):
        mix([(0.5, a), (0.5, replace(b, temperature=0.5))], name="m", needs_top_k=False)
    with pytest.raises(ShapeError, match="same candidates"):
        mix([(0.5, a), (0.5, replace(b, draw_logprobs_TN=b.draw_logprobs_TN[:, :2]))], name="m", needs_top_k=False)
