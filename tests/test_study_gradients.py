"""The study's exact bias and variance against brute force on a few prefixes."""

from __future__ import annotations

import pytest
import torch
from losses_world import make_world

from asyncopd.config import losses as c
from asyncopd.losses import StepContext, build_estimator
from asyncopd.study.estimators import contestants, scale_for_drift
from asyncopd.study.gradients import World, exact_gradient, measure, token_rows


def small_world(drift: float = 0.15, vocab_size: int = 9) -> World:
    made = [make_world(vocab_size=vocab_size, drift=drift, seed=seed) for seed in range(3)]
    stacked = {
        name: torch.stack([getattr(w, name) for w in made]) for name in ("student_V", "behaviour_V", "teacher_V")
    }
    return World(stacked["student_V"], stacked["behaviour_V"], stacked["teacher_V"])


@pytest.mark.parametrize("advantage", ["current", "behaviour"])
def test_leave_one_out_moments_equal_the_enumeration_of_all_pairs(advantage: str) -> None:
    world = small_world()
    config = c.PolicyGradientConfig.model_validate({"name": "policy_gradient", "num_draws": 2, "advantage": advantage})
    num_prefixes, vocab_size = world.behaviour_TV.shape
    pairs = torch.cartesian_prod(torch.arange(vocab_size), torch.arange(vocab_size))
    prefix_R = torch.arange(num_prefixes).repeat_interleave(len(pairs))
    ids_RN = pairs.repeat(num_prefixes, 1)
    estimator = build_estimator(config)
    rows = token_rows(world, prefix_R, ids_RN, ids_RN[:, :0], head=0)
    logits = world.student_TV[prefix_R].clone().requires_grad_()
    gathered = torch.log_softmax(logits, -1).gather(-1, estimator.student_ids(rows))
    gradients = torch.autograd.grad(estimator(rows, gathered, StepContext()).loss_T.sum(), logits)[0]
    weights = world.behaviour_TV[prefix_R[:, None], ids_RN].sum(-1).exp().reshape(num_prefixes, -1, 1)
    gradients = gradients.reshape(num_prefixes, -1, vocab_size)
    mean = (weights * gradients).sum(1)
    variance = (weights * (gradients - mean[:, None]).square()).sum()
    target = exact_gradient(world, "D_R")

    found = measure(config, world, "D_R")
    assert found.relative_variance == pytest.approx(float(variance / target.square().sum()), rel=1e-9)
    assert found.relative_bias == pytest.approx(float((mean - target).norm() / target.norm()), abs=1e-9)


def test_leave_one_out_variance_at_sixteen_draws_is_that_of_simulated_steps() -> None:
    world = small_world()
    config = c.PolicyGradientConfig(num_draws=16)
    estimator, generator = build_estimator(config), torch.Generator().manual_seed(0)
    prefix_R = torch.arange(3).repeat_interleave(4000)
    ids_RN = torch.multinomial(world.behaviour_TV.exp()[prefix_R], 16, replacement=True, generator=generator)
    rows = token_rows(world, prefix_R, ids_RN, ids_RN[:, :0], head=0)
    logits = world.student_TV[prefix_R].clone().requires_grad_()
    gathered = torch.log_softmax(logits, -1).gather(-1, estimator.student_ids(rows))
    gradients = torch.autograd.grad(estimator(rows, gathered, StepContext()).loss_T.sum(), logits)[0]
    variance = gradients.reshape(3, 4000, -1).var(1).sum()
    expected = variance / exact_gradient(world, "D_R").square().sum()
    assert measure(config, world, "D_R").relative_variance == pytest.approx(float(expected), rel=0.1)


def test_unbiased_contestants_have_no_bias_and_dense_ones_no_variance() -> None:
    world = small_world(vocab_size=20)
    found = {each.name: measure(each.config, world, each.target) for each in contestants(8, 20)}
    for name in (
        "head 4 + tail 4",
        "head 2 + teacher 2 + tail 4",
        "draws, leave-one-out",
        "draws, no baseline",
        "sampled token alone",
        "sampled token, exact baseline",
        "teacher draws 8",
        "dense reverse KL",
        "dense forward KL",
    ):
        assert found[name].relative_bias < 1e-9, name
    for name in ("dense reverse KL", "dense forward KL", "forward KL, teacher top-8, bucket"):
        assert found[name].relative_variance < 1e-18, name
    for name in ("draws, A_old", "draws, no ratio", "draws, clip (exact baseline)", "reverse KL, student top-8, drop"):
        assert found[name].relative_bias > 0.05, name
    assert found["head 4 + tail 4"].relative_variance < found["draws, leave-one-out"].relative_variance


def test_the_scale_that_makes_a_drift_is_found() -> None:
    assert scale_for_drift(lambda s: s**2, 0.5) == pytest.approx(0.5**0.5, rel=0.005)
    assert scale_for_drift(lambda s: s**2, 40.0) == pytest.approx(40**0.5, rel=0.005)
