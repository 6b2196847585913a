"""Paired differences between students that answered the same prompts."""

from __future__ import annotations

import numpy as np
import pytest

from asyncopd.errors import ShapeError
from asyncopd.evaluate import Outcome, accuracy_difference, kl_difference


def world(rng: np.random.Generator, num_prompts: int) -> tuple[Outcome, Outcome]:
    """Two students on prompts whose difficulty they share; the second is a little better."""
    difficulty_B = rng.random(num_prompts)
    lengths_B = rng.integers(2, 30, num_prompts).astype(float)
    noise_B = rng.gamma(2.0, 0.2, num_prompts)

    def outcome(skill: float) -> Outcome:
        own_B = rng.normal(0, 0.02, num_prompts)
        return Outcome(
            correct_B=(difficulty_B + own_B < skill).astype(float),
            kl_sum_B=lengths_B * (noise_B + 0.5 - 0.5 * skill + own_B),
            num_tokens_B=lengths_B,
        )

    return outcome(0.5), outcome(0.55)


def test_the_paired_error_is_the_spread_of_the_difference_over_repetitions() -> None:
    rng = np.random.default_rng(0)
    worlds = [world(rng, 200) for _ in range(600)]
    for difference in (accuracy_difference, kl_difference):
        found = [difference(*pair) for pair in worlds]
        spread = np.std([d.value for d in found])
        assert np.mean([d.paired_error for d in found]) == pytest.approx(spread, rel=0.1)
        # Sharing prompts is worth much here; the unpaired error is what two lots of prompts would give.
        assert np.mean([d.unpaired_error for d in found]) > 2 * spread


def test_the_unpaired_error_is_the_spread_when_prompts_are_not_shared() -> None:
    rng = np.random.default_rng(1)
    pairs = [(world(rng, 200)[0], world(rng, 200)[1]) for _ in range(600)]
    for difference in (accuracy_difference, kl_difference):
        found = [difference(*pair) for pair in pairs]
        assert np.mean([d.unpaired_error for d in found]) == pytest.approx(np.std([d.value for d in found]), rel=0.1)


def test_a_student_does_not_differ_from_itself() -> None:
    one, _ = world(np.random.default_rng(2), 50)
    for difference in (accuracy_difference(one, one), kl_difference(one, one)):
        assert (difference.value, difference.paired_error) == (0.0, 0.0)
        assert difference.unpaired_error > 0


def test_other_numbers_of_prompts_are_refused() -> None:
    rng = np.random.default_rng(3)
    with pytest.raises(ShapeError, match="found 50 and 60"):
        accuracy_difference(world(rng, 50)[0], world(rng, 60)[1])
