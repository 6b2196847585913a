"""Monte-Carlo behaviour of the drawn estimators: no bias at any N, variance 1/N, what a baseline or a head saves."""

from __future__ import annotations

import pytest
import torch
from losses_world import World, exact_reverse_kl, losses_at, make_world, rows_with, tail_mass
from torch import Tensor

from asyncopd.config.losses import HeadTailConfig, LossConfig, PolicyGradientConfig

NUM_REPLICATES = 6000
WORLD = make_world(vocab_size=40, drift=0.15)
PEAKED = make_world(vocab_size=40, drift=0.15, scale=4.0)
"""Entropy below 1 nat, as language models mostly have."""


def policy_gradient(num_draws: int, baseline: str) -> PolicyGradientConfig:
    return PolicyGradientConfig.model_validate(
        {"name": "policy_gradient", "num_draws": num_draws, "baseline": baseline}
    )


def sampled_gradients(config: LossConfig, world: World, *, seed: int = 0) -> Tensor:
    """[R, V] gradients of R independent realisations at the same prefix."""
    needs = config.requirements()
    law_V = world.behaviour_V.exp().clone()
    if needs.law == "tail":
        law_V[world.behaviour_V.argsort(descending=True)[: needs.head]] = 0.0
    generator = torch.Generator().manual_seed(seed)
    num_draws = max(1, needs.num_draws)
    draws_RN = torch.multinomial(law_V.expand(NUM_REPLICATES, -1), num_draws, replacement=True, generator=generator)
    rows = rows_with(world, head=needs.head, draws_TN=draws_RN, responses_T=draws_RN[:, 0])
    logits_RV = world.student_V.repeat(NUM_REPLICATES, 1).requires_grad_()
    loss_R = losses_at(config, rows, torch.log_softmax(logits_RV, -1)).loss_T
    return torch.autograd.grad(loss_R.sum(), logits_RV)[0]


def variance(gradients_RV: Tensor) -> float:
    """Total variance: trace of the covariance."""
    return float(gradients_RV.var(0).sum())


def bias_z_score(gradients_RV: Tensor, world: World) -> float:
    """How far the mean is from ∇D_R, in units of what its own variance explains; about 1 when unbiased."""
    off = (gradients_RV.mean(0) - exact_reverse_kl(world).gradient_V).square().sum()
    return float(off / (gradients_RV.var(0).sum() / len(gradients_RV)))


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_variance_falls_as_one_over_n_and_bias_stays_zero(baseline: str) -> None:
    scaled = {}
    for num_draws in (1, 4, 16, 64) if baseline == "none" else (2, 4, 16, 64):
        gradients_RV = sampled_gradients(policy_gradient(num_draws, baseline), WORLD)
        assert bias_z_score(gradients_RV, WORLD) < 2.5
        scaled[num_draws] = num_draws * variance(gradients_RV)
    if baseline == "none":
        assert list(scaled.values()) == pytest.approx([scaled[64]] * 4, rel=0.12)
    else:
        # Leave-one-out pays for estimating its baseline: its N·variance falls to its limit from above.
        assert scaled[2] > scaled[4] > scaled[16]
        assert scaled[16] == pytest.approx(scaled[64], rel=0.2)


@pytest.mark.parametrize("num_draws", [16, 64])
@pytest.mark.parametrize("world", [WORLD, PEAKED], ids=["flat", "peaked"])
def test_leave_one_out_lowers_the_variance(num_draws: int, world: World) -> None:
    plain = variance(sampled_gradients(policy_gradient(num_draws, "none"), world))
    with_baseline = variance(sampled_gradients(policy_gradient(num_draws, "leave_one_out"), world))
    assert with_baseline < 0.9 * plain


def test_leave_one_out_of_two_draws_can_cost_more_than_it_saves() -> None:
    # Where D_R is small the baseline is mostly noise of the other draw (docs/estimators.md has the table).
    plain = variance(sampled_gradients(policy_gradient(2, "none"), WORLD))
    assert variance(sampled_gradients(policy_gradient(2, "leave_one_out"), WORLD)) > 1.2 * plain


def test_exact_baseline_lowers_the_variance_of_a_single_draw() -> None:
    gradients_RV = sampled_gradients(policy_gradient(1, "exact"), WORLD)
    assert bias_z_score(gradients_RV, WORLD) < 2.5
    assert variance(gradients_RV) < 0.9 * variance(sampled_gradients(policy_gradient(1, "none"), WORLD))


def test_head_and_tail_beat_as_many_plain_draws() -> None:
    # Same teacher cost: 4 + 4 ids against 8 draws with their best baseline.
    for world, gain in ((WORLD, 1.5), (PEAKED, 8.0)):
        head_tail_RV = sampled_gradients(HeadTailConfig(head=4, num_draws=4), world)
        assert bias_z_score(head_tail_RV, world) < 2.5
        assert gain * variance(head_tail_RV) < variance(sampled_gradients(policy_gradient(8, "leave_one_out"), world))


def test_joined_teacher_head_removes_the_thin_tail_hazard() -> None:
    # The student moved its mass to an id the sampler all but excluded, and the teacher wants it.
    behaviour_V = torch.zeros(40, dtype=torch.float64)
    behaviour_V[:4], behaviour_V[30] = 5.0, -6.0
    student_V = behaviour_V.clone()
    student_V[30] = 6.0
    teacher_V = student_V * 0.8
    world = World(*(torch.log_softmax(logits_V, -1) for logits_V in (student_V, behaviour_V, teacher_V)))
    assert float(tail_mass(world, 4)) < 0.1
    plain = sampled_gradients(HeadTailConfig(head=4, num_draws=4), world)
    joined = sampled_gradients(HeadTailConfig(head=4, num_draws=4, teacher_top_k=1), world)
    assert bias_z_score(joined, world) < 2.5
    assert variance(joined) < 1e-3 * variance(plain)
