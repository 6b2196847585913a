"""Bias and variance of an estimator's gradient with respect to the logits, prefix by prefix, against the exact one.

A world is frozen prefixes with three full distributions each; all of it is enumerated, nothing sampled. Where a
prefix's gradient is a mean over independent draws, every id that one draw can be is a row, weighed by its probability,
and the variance of N draws is that of one over N. With the leave-one-out baseline it is a mean over pairs of draws,
whose variance is Hoeffding's for U-statistics. The threshold of m2po is that of an optimizer step with many draws at
every prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asyncopd.config.losses import ForwardKLDrawsConfig, HeadTailConfig, LossConfig, PolicyGradientConfig
from asyncopd.config.recorded import CacheRequirements
from asyncopd.losses import Estimator, StepContext, TokenRows, build_estimator

_CONTEXT_DRAWS = 64
"""Draws at every prefix of the step that m2po's threshold is taken from."""
Target = Literal["D_R", "D_F"]


@dataclass(frozen=True)
class World:
    """log-probs [T, V] at T prefixes, float64, nats."""

    student_TV: Tensor
    behaviour_TV: Tensor
    teacher_TV: Tensor


@dataclass(frozen=True)
class Measurement:
    """Of one estimator in one world; sums over prefixes and ids, relative to the exact gradient's."""

    relative_bias: float
    """sqrt(Σ‖E[ĝ] − g‖² / Σ‖g‖²)."""
    relative_variance: float
    """ΣE‖ĝ − E[ĝ]‖² / Σ‖g‖²."""
    cosine: float
    """Between E[ĝ] and g, all prefixes stacked."""


def exact_gradient(world: World, target: Target) -> Tensor:
    """[T, V] ∇D_R or ∇D_F with respect to the logits, by autograd of the definition."""
    logits_TV = world.student_TV.clone().requires_grad_()
    student_TV = torch.log_softmax(logits_TV, -1)
    if target == "D_R":
        loss = (student_TV.exp() * (student_TV - world.teacher_TV)).sum()
    else:
        loss = (world.teacher_TV.exp() * (world.teacher_TV - student_TV)).sum()
    return torch.autograd.grad(loss, logits_TV)[0]


def measure(config: LossConfig, world: World, target: Target) -> Measurement:
    """Compare the estimator's gradient with the exact one of `target`."""
    exact_TV = exact_gradient(world, target)
    mean_TV, variance_T = _moments(config, world)
    scale = exact_TV.square().sum()
    return Measurement(
        relative_bias=float(((mean_TV - exact_TV).square().sum() / scale).sqrt()),
        relative_variance=float(variance_T.sum() / scale),
        cosine=float((mean_TV * exact_TV).sum() / (mean_TV.norm() * exact_TV.norm())),
    )


def _moments(config: LossConfig, world: World) -> tuple[Tensor, Tensor]:
    """E[ĝ] [T, V] and E‖ĝ − E[ĝ]‖² [T]."""
    single, num_draws = _with_one_draw(config)
    law_TV = _law(config, world)
    # Ids that cannot be drawn have weight 0, and a gradient that may be anything.
    gradients_TVV = torch.where(law_TV[..., None] > 0, _gradients(single, config.requirements(), world), 0.0)
    if isinstance(config, PolicyGradientConfig) and config.baseline == "leave_one_out":
        return _leave_one_out_moments(config, world, gradients_TVV)
    mean_TV = (law_TV[..., None] * gradients_TVV).sum(1)
    variance_T = (law_TV * (gradients_TVV - mean_TV[:, None]).square().sum(-1)).sum(-1)
    return mean_TV, variance_T / num_draws


def _leave_one_out_moments(config: PolicyGradientConfig, world: World, gradients_TVV: Tensor) -> tuple[Tensor, Tensor]:
    """Of −(1/N) Σ_j (X_j − b_j Y_j), b_j the mean of a_i over i ≠ j; X = ρ A s, Y = ρ s, a = ρ A, s = ∇log p_θ.

    It is minus the U-statistic with kernel h(i, j) = ½(X_i + X_j − a_i Y_j − a_j Y_i), so its variance is
    2/(N(N−1)) · (2(N−2) ζ1 + ζ2) with ζ1 = Var E[h|i] and ζ2 = Var h.
    """
    law_TV = world.behaviour_TV.exp()
    student_TV = world.student_TV
    ratio_TV = (student_TV - world.behaviour_TV).exp()
    advantage_TV = world.teacher_TV - (student_TV if config.advantage == "current" else world.behaviour_TV)
    a_TV = ratio_TV * advantage_TV
    x_TVV = -gradients_TVV
    y_TVV = ratio_TV[..., None] * (torch.eye(law_TV.shape[1], dtype=law_TV.dtype) - student_TV.exp()[:, None])

    def mean(values: Tensor) -> Tensor:
        """Over the draw, which is the second axis."""
        return (law_TV.reshape(law_TV.shape + (1,) * (values.ndim - 2)) * values).sum(1)

    mean_x_TV, mean_y_TV, mean_a_T = mean(x_TVV), mean(y_TVV), mean(a_TV)
    mean_TV = mean_x_TV - mean_a_T[:, None] * mean_y_TV
    given_one_TVV = (x_TVV - a_TV[..., None] * mean_y_TV[:, None] - mean_a_T[:, None, None] * y_TVV) / 2
    first_T = mean((given_one_TVV - mean(given_one_TVV)[:, None]).square().sum(-1))
    squared_T = (
        (
            mean(x_TVV.square().sum(-1))
            + mean_x_TV.square().sum(-1)
            + mean(a_TV.square()) * mean(y_TVV.square().sum(-1))
            + mean(a_TV[..., None] * y_TVV).square().sum(-1)
        )
        / 2
        - (mean(a_TV[..., None] * x_TVV) * mean_y_TV).sum(-1)
        - mean_a_T * mean((x_TVV * y_TVV).sum(-1))
    )
    second_T = squared_T - mean_TV.square().sum(-1)
    count = config.num_draws
    return -mean_TV, 2 / (count * (count - 1)) * (2 * (count - 2) * first_T + second_T)


def _with_one_draw(config: LossConfig) -> tuple[LossConfig, int]:
    """The same estimator with a single draw, which has no others to leave one out of; and how many it has."""
    if isinstance(config, PolicyGradientConfig):
        baseline = "none" if config.baseline == "leave_one_out" else config.baseline
        return config.model_copy(update={"num_draws": 1, "baseline": baseline}), config.num_draws
    if isinstance(config, HeadTailConfig):
        return config.model_copy(update={"num_draws": 1}), config.num_draws
    if isinstance(config, ForwardKLDrawsConfig):
        return config.model_copy(update={"num_teacher_draws": 1}), config.num_teacher_draws
    return config, 1


def _law(config: LossConfig, world: World) -> Tensor:
    """[T, V] probabilities that one draw has each id."""
    needs = config.requirements()
    if needs.num_teacher_draws:
        return world.teacher_TV.exp()
    if needs.law == "tail":
        outside_TV = outside_head(world, needs.head)
        return outside_TV / outside_TV.sum(-1, keepdim=True)
    return world.behaviour_TV.exp()


def _gradients(single: LossConfig, needs: CacheRequirements, world: World) -> Tensor:
    """[T, V, V] gradient of each prefix's loss with respect to its logits, for every id its one draw can be."""
    num_prefixes, vocab_size = world.behaviour_TV.shape
    estimator = build_estimator(single)
    prefix_R = torch.arange(num_prefixes).repeat_interleave(vocab_size)
    ids_R1 = torch.arange(vocab_size).repeat(num_prefixes)[:, None]
    by_teacher = needs.num_teacher_draws > 0
    draws = (ids_R1[:, :0], ids_R1) if by_teacher else (ids_R1, ids_R1[:, :0])
    rows = token_rows(world, prefix_R, *draws, head=needs.head)
    logits_RV = world.student_TV[prefix_R].clone().requires_grad_()
    gathered_RJ = torch.log_softmax(logits_RV, -1).gather(-1, estimator.student_ids(rows))
    loss = estimator(rows, gathered_RJ, _context(estimator, world)).loss_T.sum()
    return torch.autograd.grad(loss, logits_RV)[0].reshape(num_prefixes, vocab_size, vocab_size)


def _context(estimator: Estimator, world: World) -> StepContext:
    """Of a step with many draws at every prefix."""
    if not estimator.needs_step_pass:
        return StepContext()
    generator = torch.Generator().manual_seed(0)
    ids_TN = torch.multinomial(world.behaviour_TV.exp(), _CONTEXT_DRAWS, replacement=True, generator=generator)
    prefix_R = torch.arange(len(ids_TN)).repeat_interleave(_CONTEXT_DRAWS)
    ids_R1 = ids_TN.reshape(-1, 1)
    rows = token_rows(world, prefix_R, ids_R1, ids_R1[:, :0], head=0)
    return estimator.step_context(rows, world.student_TV[prefix_R].gather(-1, estimator.student_ids(rows)))


# -- rows of a world ----------------------------------------------------------------------------------------------
def token_rows(
    world: World, prefix_R: Tensor, draw_ids_RN: Tensor, teacher_draw_ids_RM: Tensor, *, head: int
) -> TokenRows:
    """R rows at prefixes `prefix_R`, as a log would hold them; the teacher's top-k is its full row.

    Args:
        draw_ids_RN: under p_old, or p_old outside the head. The first draw is the emitted token.
    """
    behaviour_RV, teacher_RV = world.behaviour_TV[prefix_R], world.teacher_TV[prefix_R]
    has_draws = draw_ids_RN.shape[1] > 0
    responses_R = draw_ids_RN[:, 0] if has_draws else torch.zeros_like(prefix_R)
    topk_RK = world.teacher_TV.argsort(-1, descending=True)[prefix_R]
    head_RK = heads(world, head)[prefix_R]
    return TokenRows(
        response_ids_T=responses_R,
        behaviour_logprobs_T=behaviour_RV.gather(-1, responses_R[:, None])[:, 0],
        teacher_logprobs_T=teacher_RV.gather(-1, responses_R[:, None])[:, 0],
        topk_ids_TK=topk_RK,
        topk_logprobs_TK=teacher_RV.gather(-1, topk_RK),
        head_ids_TK=head_RK,
        head_behaviour_logprobs_TK=behaviour_RV.gather(-1, head_RK),
        head_teacher_logprobs_TK=teacher_RV.gather(-1, head_RK),
        tail_logmass_T=outside_head(world, head).sum(-1).log()[prefix_R],
        draw_ids_TN=draw_ids_RN,
        draw_behaviour_logprobs_TN=behaviour_RV.gather(-1, draw_ids_RN),
        draw_teacher_logprobs_TN=teacher_RV.gather(-1, draw_ids_RN),
        teacher_draw_ids_TM=teacher_draw_ids_RM,
        teacher_draw_logprobs_TM=teacher_RV.gather(-1, teacher_draw_ids_RM),
        trajectory_T=torch.arange(len(prefix_R)),
    )


def heads(world: World, head: int) -> Tensor:
    """[T, K] p_old's most likely ids."""
    return world.behaviour_TV.argsort(-1, descending=True)[:, :head]


def outside_head(world: World, head: int) -> Tensor:
    """[T, V] p_old with the head's entries 0."""
    return world.behaviour_TV.exp().scatter(-1, heads(world, head), 0.0)
