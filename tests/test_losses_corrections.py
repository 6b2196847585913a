"""Corrections, m2po's threshold, the mass leak of a dropped tail, arithmetic and prefix weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_world import make_world
from torch import Tensor

from asyncopd.losses.corrections import (
    MAX_LOG_RATIO,
    Corrected,
    clip,
    decoupled,
    harmful_shifts,
    importance_log_ratio,
    m2po,
    mask,
    no_correction,
    second_moment_threshold,
    truncate,
)
from asyncopd.losses.divergences import bucket, drop, log1mexp, reverse_kl
from asyncopd.losses.policy_gradient import leave_one_out_baseline, prefix_weights

log_ratios = st.lists(st.floats(-3, 3), min_size=1, max_size=30)


def draws(num_rows: int = 200, num_draws: int = 4, *, spread: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random (log ρ with gradient, A), float64."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio_TN, advantage_TN = torch.randn(2, num_rows, num_draws, generator=generator, dtype=torch.float64)
    return (spread * log_ratio_TN).requires_grad_(), advantage_TN


def slope(correct: Callable[[Tensor, Tensor], Corrected], log_ratio_TN: Tensor, advantage_TN: Tensor) -> Tensor:
    """d objective / d log ρ."""
    return torch.autograd.grad(correct(log_ratio_TN, advantage_TN).objective_TN.sum(), log_ratio_TN)[0]


def assert_identical(left: Callable[[Tensor, Tensor], Corrected], right: Callable[[Tensor, Tensor], Corrected]) -> None:
    log_ratio_TN, advantage_TN = draws()
    assert torch.equal(left(log_ratio_TN, advantage_TN).objective_TN, right(log_ratio_TN, advantage_TN).objective_TN)
    assert torch.equal(slope(left, log_ratio_TN, advantage_TN), slope(right, log_ratio_TN, advantage_TN))


# -- identities -------------------------------------------------------------------------------------------------------


def test_clip_without_bounds_is_no_correction() -> None:
    assert_identical(lambda r, a: clip(r, a, epsilon_low=math.inf, epsilon_high=math.inf), no_correction)


def test_m2po_within_its_budget_is_no_correction() -> None:
    log_ratio_TN, advantage_TN = draws(spread=0.1)
    threshold = second_moment_threshold(harmful_shifts(log_ratio_TN, advantage_TN), budget=0.04)
    assert threshold == math.inf
    assert_identical(lambda r, a: m2po(r, a, threshold=threshold), no_correction)


def test_truncate_and_mask_with_a_huge_bound_are_no_correction() -> None:
    assert_identical(lambda r, a: truncate(r, a, max_ratio=1e30), no_correction)
    assert_identical(lambda r, a: mask(r, a, max_ratio=1e30), no_correction)


def test_decoupled_at_the_first_mini_batch_has_the_gradient_of_the_plain_ratio() -> None:
    # p_prox = p_θ: nothing to clip, and w·ρ_prox has the value and the gradient of ρ wherever w is within the cap.
    log_ratio_TN, advantage_TN = draws()

    def first_mini_batch(log_ratio_TN: Tensor, advantage_TN: Tensor) -> Corrected:
        return decoupled(
            log_ratio_TN,
            advantage_TN,
            log_ratio_TN.detach(),
            epsilon_low=0.2,
            epsilon_high=0.2,
            max_behaviour_weight=1e9,
        )

    torch.testing.assert_close(
        slope(first_mini_batch, log_ratio_TN, advantage_TN), slope(no_correction, log_ratio_TN, advantage_TN)
    )
    assert not first_mini_batch(log_ratio_TN, advantage_TN).affected_TN.any()


def test_decoupled_clips_around_the_snapshot_and_masks_above_the_cap() -> None:
    # ρ_prox = 1.5 with A > 0 is beyond 1.2: constant. ρ_prox = 1.1: w·1.1. w = 6 > 5: masked.
    log_ratio_TN = torch.tensor([[3.0, 2.2, 6.6]], dtype=torch.float64).log().requires_grad_()
    proximal_TN = torch.tensor([[2.0, 2.0, 6.0]], dtype=torch.float64).log()
    advantage_TN = torch.ones_like(proximal_TN)
    found = decoupled(
        log_ratio_TN, advantage_TN, proximal_TN, epsilon_low=0.2, epsilon_high=0.2, max_behaviour_weight=5.0
    )
    torch.testing.assert_close(found.objective_TN, torch.tensor([[2.4, 2.2, 0.0]], dtype=torch.float64))
    gradient_TN = torch.autograd.grad(found.objective_TN.sum(), log_ratio_TN)[0]
    torch.testing.assert_close(gradient_TN, torch.tensor([[0.0, 2.2, 0.0]], dtype=torch.float64))
    assert found.affected_TN.tolist() == [[True, False, True]]


def test_clip_is_the_ppo_minimum() -> None:
    log_ratio_TN, advantage_TN = draws()
    ratio_TN = log_ratio_TN.exp()
    minimum_TN = torch.minimum(ratio_TN * advantage_TN, ratio_TN.clamp(0.8, 1.28) * advantage_TN)
    found = clip(log_ratio_TN, advantage_TN, epsilon_low=0.2, epsilon_high=0.28)
    torch.testing.assert_close(found.objective_TN, minimum_TN)
    dual_TN = torch.where(advantage_TN < 0, torch.maximum(minimum_TN, 1.5 * advantage_TN), minimum_TN)
    found = clip(log_ratio_TN, advantage_TN, epsilon_low=0.2, epsilon_high=0.28, dual_clip=1.5)
    torch.testing.assert_close(found.objective_TN, dual_TN)
    assert torch.equal(found.affected_TN, slope_is_zero(found, log_ratio_TN))


def slope_is_zero(found: Corrected, log_ratio_TN: Tensor) -> Tensor:
    return torch.autograd.grad(found.objective_TN.sum(), log_ratio_TN)[0] == 0


def test_truncated_draws_keep_pulling_with_the_bound_as_weight() -> None:
    log_ratio_TN = torch.tensor([[0.5, 4.0]], dtype=torch.float64).log().requires_grad_()
    advantage_TN = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    expected_TN = torch.tensor([[0.5 * 2.0, 2.0 * 3.0]], dtype=torch.float64)
    torch.testing.assert_close(
        slope(lambda r, a: truncate(r, a, max_ratio=2.0), log_ratio_TN, advantage_TN), expected_TN
    )


# -- m2po -------------------------------------------------------------------------------------------------------------


@given(shifts=st.lists(st.floats(0, 5), max_size=40), budget=st.floats(1e-3, 5))
def test_m2po_threshold_is_the_largest_that_meets_the_budget(shifts: list[float], budget: float) -> None:
    shifts_H = torch.tensor(shifts, dtype=torch.float64)
    threshold = second_moment_threshold(shifts_H, budget=budget)
    if threshold == math.inf:
        assert not shifts or float(shifts_H.square().mean()) <= budget * (1 + 1e-9)
    else:
        assert float(shifts_H.clamp(max=threshold).square().mean()) == pytest.approx(budget, rel=1e-9)
        assert float(shifts_H.square().mean()) > budget * (1 - 1e-9)


@settings(max_examples=50)
@given(values=log_ratios, cut=st.integers(0, 30))
def test_m2po_threshold_does_not_depend_on_the_split(values: list[float], cut: int) -> None:
    log_ratio_TN = torch.tensor(values)[:, None]
    advantage_TN = torch.ones_like(log_ratio_TN)
    whole_H = harmful_shifts(log_ratio_TN, advantage_TN)
    parts = [harmful_shifts(log_ratio_TN[part], advantage_TN[part]) for part in (slice(cut, None), slice(0, cut))]
    assert second_moment_threshold(torch.cat(parts), budget=0.04) == second_moment_threshold(whole_H, budget=0.04)


def test_m2po_touches_only_harmful_draws() -> None:
    log_ratio_TN = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.05]], dtype=torch.float64).requires_grad_()
    advantage_TN = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    assert harmful_shifts(log_ratio_TN, advantage_TN).tolist() == pytest.approx([1.0, 1.0, 0.05])
    found = m2po(log_ratio_TN, advantage_TN, threshold=0.3)
    assert found.affected_TN.tolist() == [[True, False, False, True, False]]
    assert slope_is_zero(found, log_ratio_TN).tolist() == [[True, False, False, True, False]]
    assert found.objective_TN[0, 0].item() == pytest.approx(math.exp(0.3))
    assert found.objective_TN[0, 3].item() == pytest.approx(-math.exp(-0.3))


# -- baseline ---------------------------------------------------------------------------------------------------------


def test_leave_one_out_baseline_does_not_see_its_own_draw() -> None:
    log_ratio_TN, advantage_TN = draws(num_rows=1, num_draws=3)
    weighted = (log_ratio_TN.exp() * advantage_TN)[0].tolist()
    expected = [(weighted[1] + weighted[2]) / 2, (weighted[0] + weighted[2]) / 2, (weighted[0] + weighted[1]) / 2]
    assert leave_one_out_baseline(log_ratio_TN, advantage_TN)[0].tolist() == pytest.approx(expected)


# -- tails ------------------------------------------------------------------------------------------------------------


def fit(outcomes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Minimise reverse KL on a support of 4 of 12 ids: (P_S reached, Q_S, largest |log p_k − log q_k + shift|)."""
    world = make_world()
    support_K = world.teacher_V.argsort(descending=True)[:4]
    logits_V = world.student_V.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits_V], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        student_K = torch.log_softmax(logits_V, -1)[support_K]
        loss = reverse_kl(*outcomes(student_K[None], world.teacher_V[support_K][None])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    student_K = torch.log_softmax(logits_V.detach(), -1)[support_K]
    teacher_K = world.teacher_V[support_K]
    return float(student_K.exp().sum()), float(teacher_K.exp().sum()), float((student_K - teacher_K).mean())


def test_dropped_tail_leaks_support_mass_down_to_one_e_th() -> None:
    reached, teacher_mass, shift = fit(drop)
    assert reached == pytest.approx(teacher_mass / math.e, rel=1e-4)
    assert shift == pytest.approx(-1.0, abs=1e-4)


def test_bucketed_tail_does_not_leak() -> None:
    reached, teacher_mass, shift = fit(bucket)
    assert reached == pytest.approx(teacher_mass, rel=1e-4)
    assert shift == pytest.approx(0.0, abs=1e-4)


# -- arithmetic -------------------------------------------------------------------------------------------------------


@given(exponent=st.floats(-12, 2.8))
def test_log1mexp_keeps_its_digits_at_both_ends(exponent: float) -> None:
    x = -(10.0**exponent)
    exact = math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))
    assert float(log1mexp(torch.tensor(x, dtype=torch.float64))) == pytest.approx(exact, rel=1e-13, abs=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_and_its_gradient_stay_finite_where_mass_rounds_to_one(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 2e-7, -1e-30, -1e-9, -0.6931, -0.6932, -50.0, -800.0], dtype=dtype, requires_grad=True)
    y = log1mexp(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(y).all()
    assert torch.isfinite(gradient).all()
    assert (y <= 0).all()


def test_log1mexp_gradient_is_that_of_the_formula() -> None:
    x = torch.tensor([-1e-3, -0.5, -0.7, -3.0, -20.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log1mexp(x).sum(), x)
    torch.testing.assert_close(gradient, -1 / torch.expm1(-x.detach()))


def test_full_support_in_a_bucket_has_no_phantom_tail_in_float32() -> None:
    # P_S of the whole vocabulary is 1 + rounding; the bucket must neither explode nor change the gradient.
    world = make_world(vocab_size=40, scale=3.0)
    gradients = []
    for outcomes in (bucket, drop):
        logits_V = world.student_V.float().requires_grad_()
        student_V = torch.log_softmax(logits_V, -1)[None]
        loss = reverse_kl(*outcomes(student_V, world.teacher_V.float()[None])).sum()
        gradients.append(torch.autograd.grad(loss, logits_V)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)


def test_log_ratio_is_clamped_before_exp() -> None:
    student = torch.tensor([0.0, -200.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-200.0, 0.0, -1.5])
    log_ratio = importance_log_ratio(student, behaviour)
    assert log_ratio.tolist() == [MAX_LOG_RATIO, -MAX_LOG_RATIO, 0.5]
    assert torch.isfinite(log_ratio.exp()).all()


# -- prefix weight ----------------------------------------------------------------------------------------------------


def test_prefix_weight_is_the_truncated_product_over_the_previous_tokens_of_the_same_response() -> None:
    ratio_T = torch.tensor([2.0, 0.5, 3.0, 4.0, 7.0, 2.0], dtype=torch.float64)
    trajectory_T = torch.tensor([5, 5, 5, 5, 2, 2])
    weight_T, truncated_T = prefix_weights(ratio_T.log(), torch.zeros_like(ratio_T), trajectory_T, max_weight=2.5)
    assert weight_T.tolist() == pytest.approx([1.0, 2.0, 1.0, 2.5, 1.0, 2.5])
    assert truncated_T.tolist() == [False, False, False, True, False, True]


def test_prefix_weight_makes_the_expectation_over_prefixes_that_of_the_student() -> None:
    # Two-token responses over 5 ids, by enumeration: E_old[w · f(first token)] = E_θ[f(first token)] without a cap.
    world = make_world(vocab_size=5, drift=0.3)
    first_T, second_T = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    probability_T = (world.behaviour_V[first_T] + world.behaviour_V[second_T]).exp()
    student_T = torch.stack([world.student_V[first_T], world.student_V[second_T]], -1).flatten()
    behaviour_T = torch.stack([world.behaviour_V[first_T], world.behaviour_V[second_T]], -1).flatten()
    trajectory_T = torch.arange(25).repeat_interleave(2)
    weights = prefix_weights(student_T, behaviour_T, trajectory_T, max_weight=1e9)[0][1::2]
    f_V = torch.arange(5, dtype=torch.float64)
    expected = (world.student_V.exp() * f_V).sum()
    torch.testing.assert_close((probability_T * weights * f_V[first_T]).sum(), expected)
