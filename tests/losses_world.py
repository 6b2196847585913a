"""A one-prefix world small enough to enumerate: three known softmax distributions and every draw that could happen.

Gradients are taken with respect to the student's logits at that prefix, in float64. A test that needs the expectation
over draws lists all of them as rows and weighs the rows by their probability: nothing is sampled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asyncopd.config.losses import LossConfig, PolicyGradientConfig
from asyncopd.losses import RowLosses, StepContext, TokenRows, build_estimator


@dataclass(frozen=True)
class World:
    """log-probs [V] of student, sampling student and teacher at one prefix, float64, detached."""

    student_V: Tensor
    behaviour_V: Tensor
    teacher_V: Tensor

    @property
    def vocab_size(self) -> int:
        return len(self.student_V)


def make_world(
    *, vocab_size: int = 12, drift: float = 0.15, seed: int = 0, scale: float = 1.5, agreement: float = 0.7
) -> World:
    """Random logits; the student is the sampling student moved in a random direction until KL(p_θ‖p_old) = drift.

    `agreement` is the correlation of the teacher's logits with the sampling student's; 0 makes them independent.
    """
    rng = np.random.default_rng(seed)
    behaviour, teacher, direction = (torch.from_numpy(rng.standard_normal(vocab_size)) for _ in range(3))
    behaviour_V = torch.log_softmax(scale * behaviour, -1)
    low, high = 0.0, 64.0
    for _ in range(200):
        middle = (low + high) / 2
        moved_V = torch.log_softmax(behaviour_V + middle * direction, -1)
        if float((moved_V.exp() * (moved_V - behaviour_V)).sum()) < drift:
            low = middle
        else:
            high = middle
    student_V = torch.log_softmax(behaviour_V + low * direction, -1) if drift else behaviour_V
    related = agreement * behaviour + (1 - agreement**2) ** 0.5 * teacher
    return World(student_V, behaviour_V, torch.log_softmax(scale * related, -1))


@dataclass(frozen=True)
class Enumeration:
    """Rows for every draw that could happen, with its probability."""

    rows: TokenRows
    weights_T: Tensor
    """Probabilities; they add up to 1."""


def rows_with(
    world: World,
    *,
    head: int = 0,
    draws_TN: Tensor | None = None,
    teacher_draws_TM: Tensor | None = None,
    responses_T: Tensor | None = None,
) -> TokenRows:
    """Rows that all stand at the world's prefix; the teacher's full row is cached, longest draw column decides T."""
    given = [array for array in (draws_TN, teacher_draws_TM, responses_T) if array is not None]
    num_rows = len(given[0]) if given else 1
    empty = torch.empty((num_rows, 0), dtype=torch.int64)
    draws_TN = empty if draws_TN is None else draws_TN
    teacher_draws_TM = empty if teacher_draws_TM is None else teacher_draws_TM
    responses_T = torch.zeros(num_rows, dtype=torch.int64) if responses_T is None else responses_T
    topk_ids_TK = world.teacher_V.argsort(descending=True).expand(num_rows, -1)
    head_ids_TK = world.behaviour_V.argsort(descending=True)[:head].expand(num_rows, -1)
    return TokenRows(
        response_ids_T=responses_T,
        behaviour_logprobs_T=world.behaviour_V[responses_T],
        teacher_logprobs_T=world.teacher_V[responses_T],
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=world.teacher_V[topk_ids_TK],
        head_ids_TK=head_ids_TK,
        head_behaviour_logprobs_TK=world.behaviour_V[head_ids_TK],
        head_teacher_logprobs_TK=world.teacher_V[head_ids_TK],
        tail_logmass_T=tail_mass(world, head).log().expand(num_rows),
        draw_ids_TN=draws_TN,
        draw_behaviour_logprobs_TN=world.behaviour_V[draws_TN],
        draw_teacher_logprobs_TN=world.teacher_V[draws_TN],
        teacher_draw_ids_TM=teacher_draws_TM,
        teacher_draw_logprobs_TM=world.teacher_V[teacher_draws_TM],
        trajectory_T=torch.arange(num_rows),
    )


def tail_mass(world: World, head: int) -> Tensor:
    return world.behaviour_V.exp().sort(descending=True).values[head:].sum()


def enumerate_policy_draws(world: World, num_draws: int) -> Enumeration:
    """All V^N draws from p_old; draw 0 is the emitted token."""
    draws_TN = _tuples(torch.arange(world.vocab_size), num_draws)
    weights_T = world.behaviour_V[draws_TN].sum(-1).exp()
    return Enumeration(rows_with(world, draws_TN=draws_TN, responses_T=draws_TN[:, 0]), weights_T)


def enumerate_tail_draws(world: World, head: int, num_draws: int) -> Enumeration:
    """All (V−K)^N draws from p_old outside the head."""
    draws_TN = _tuples(world.behaviour_V.argsort(descending=True)[head:], num_draws)
    weights_T = (world.behaviour_V[draws_TN] - tail_mass(world, head).log()).sum(-1).exp()
    return Enumeration(rows_with(world, head=head, draws_TN=draws_TN), weights_T)


def enumerate_teacher_draws(world: World, num_draws: int) -> Enumeration:
    """All V^M draws from q."""
    draws_TM = _tuples(torch.arange(world.vocab_size), num_draws)
    return Enumeration(rows_with(world, teacher_draws_TM=draws_TM), world.teacher_V[draws_TM].sum(-1).exp())


def enumerate_for(world: World, config: LossConfig) -> Enumeration:
    """Everything that could have been drawn for `config`; one row of probability 1 where it needs no draw."""
    needs = config.requirements()
    if needs.num_teacher_draws:
        return enumerate_teacher_draws(world, needs.num_teacher_draws)
    if needs.law == "tail":
        return enumerate_tail_draws(world, needs.head, needs.num_draws)
    if isinstance(config, PolicyGradientConfig) or config.name in ("cross_entropy", "npd"):
        return enumerate_policy_draws(world, max(1, needs.num_draws))
    return Enumeration(rows_with(world, head=needs.head), torch.ones(1, dtype=torch.float64))


def losses_at(
    config: LossConfig, rows: TokenRows, student_logprobs_TV: Tensor, context: StepContext | None = None
) -> RowLosses:
    """The estimator's losses when row t of the student is `student_logprobs_TV[t]`.

    Without a context the rows are the whole optimizer step.
    """
    estimator = build_estimator(config)
    gathered_TJ = student_logprobs_TV.gather(-1, estimator.student_ids(rows))
    if context is None:
        context = estimator.step_context(rows, gathered_TJ)
    return estimator(rows, gathered_TJ, context)


@dataclass(frozen=True)
class Expectation:
    value: float
    gradient_V: Tensor


def expectation(config: LossConfig, world: World, enumeration: Enumeration | None = None) -> Expectation:
    """Expected loss and expected gradient with respect to the student's logits, by enumeration."""
    enumeration = enumerate_for(world, config) if enumeration is None else enumeration
    logits_V = world.student_V.clone().requires_grad_()
    student_TV = torch.log_softmax(logits_V, -1).expand(len(enumeration.rows), -1)
    context = _population_context(config, world, enumeration)
    loss = (enumeration.weights_T * losses_at(config, enumeration.rows, student_TV, context).loss_T).sum()
    return Expectation(loss.item(), torch.autograd.grad(loss, logits_V)[0])


def _population_context(config: LossConfig, world: World, enumeration: Enumeration) -> StepContext:
    """The context of an optimizer step so large that every row occurs in it as often as it is probable."""
    estimator = build_estimator(config)
    if not estimator.needs_step_pass:
        return StepContext()
    occurrences_T = (enumeration.weights_T * 20_000).round().long()
    rows = enumeration.rows.select(torch.arange(len(enumeration.rows)).repeat_interleave(occurrences_T))
    return estimator.step_context(rows, world.student_V[estimator.student_ids(rows)])


def exact_forward_kl(world: World) -> Expectation:
    """D_F and ∇D_F by autograd of its definition."""
    logits_V = world.student_V.clone().requires_grad_()
    q_V = world.teacher_V.exp()
    loss = (q_V * (q_V.log() - torch.softmax(logits_V, -1).log())).sum()
    return Expectation(loss.item(), torch.autograd.grad(loss, logits_V)[0])


def exact_reverse_kl(world: World) -> Expectation:
    """D_R and ∇D_R by autograd of its definition."""
    logits_V = world.student_V.clone().requires_grad_()
    p_V = torch.softmax(logits_V, -1)
    loss = (p_V * (p_V.log() - world.teacher_V)).sum()
    return Expectation(loss.item(), torch.autograd.grad(loss, logits_V)[0])


def relative_error(found_V: Tensor, target_V: Tensor) -> float:
    return float((found_V - target_V).norm() / target_V.norm())


def cosine(found_V: Tensor, target_V: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(found_V, target_V, dim=0))


def as_float32(rows: TokenRows) -> TokenRows:
    """The same rows with float32 log-probs, as a log holds them."""
    changed = {name: value.float() for name, value in vars(rows).items() if value.dtype == torch.float64}
    return replace(rows, **changed)


def _tuples(ids: Tensor, length: int) -> Tensor:
    return torch.tensor(list(itertools.product(ids.tolist(), repeat=length)))
