"""What the learner knows of an estimator: which ids it wants, and a loss per row. Everything else is the estimator's.

TokenRows --student_ids--> ids [T, J] --gather--> log p_θ [T, J] --__call__--> RowLosses
                                          |
                                          +--step_context, micro-batches and ranks joined, before the first
                                             backward, only where needs_step_pass--> StepContext

An estimator's module binds it to its settings beside its mathematics: `@estimator_of.register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor

from asyncopd.config.losses import LossSettings
from asyncopd.errors import ConfigError
from asyncopd.losses.rows import TokenRows
from asyncopd.metrics import Metric


@dataclass(frozen=True)
class StepContext:
    """What an estimator must know about the whole optimizer step before it judges one row of it."""

    harmful_shifts_H: Tensor | None = None
    """[H] |log ρ| of the step's harmful draws (corrections.py), any order; None where no pass over the step was made.
    One 1-D tensor, so that ranks can gather it."""

    @classmethod
    def join(cls, contexts: Sequence[StepContext]) -> StepContext:
        """The context of all micro-batches and ranks together; their order does not matter."""
        parts = [context.harmful_shifts_H for context in contexts if context.harmful_shifts_H is not None]
        return cls(torch.cat(parts) if parts else None)

    def required_shifts_H(self) -> Tensor:
        """`harmful_shifts_H`, or ConfigError when the learner skipped the pass that the estimator needs."""
        if self.harmful_shifts_H is None:
            raise ConfigError(
                "loss.correction m2po was called without its pass over the whole optimizer step. Call step_context on "
                "every micro-batch first and pass StepContext.join of the results."
            )
        return self.harmful_shifts_H


@dataclass(frozen=True)
class RowLosses:
    """The loss of every row and what is worth watching about it.

    The learner sums `loss_T` and divides by the number of trained tokens of the whole optimizer step.
    """

    loss_T: Tensor
    """[T] nats, with gradient."""
    statistics_T: Mapping[Metric, Tensor] = field(default_factory=dict)
    """[T] each, detached; the metric says how they reduce."""


class Estimator(ABC):
    """One configured estimator. Stateless: the same arguments give the same result."""

    @property
    def needs_step_pass(self) -> bool:
        """Must `step_context` see the whole optimizer step before the first `__call__`?"""
        return False

    def num_sampled(self, num_ids: int) -> int:
        """At how many of its ids, the first ones, log p_θ is weighed against log p_old: under a truncated law (top-p)
        these are log-probs of that law, like log p_old. The others are of the whole distribution.

        Args:
            num_ids: J of `student_ids`.
        """
        del num_ids
        return 0

    @abstractmethod
    def student_ids(self, rows: TokenRows) -> Tensor:
        """[T, J] int64: the ids at which it wants log p_θ.

        Raises:
            ShapeError: a cached array is narrower than the configuration asks for.
        """

    def step_context(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> StepContext:
        """What these rows contribute to the step's context; never carries gradient. Join with StepContext.join."""
        del rows, student_logprobs_TJ
        return StepContext()

    @abstractmethod
    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        """The loss of each row.

        Args:
            rows: T trained tokens, all of one micro-batch.
            student_logprobs_TJ: [T, J] log p_θ at `student_ids(rows)`, with gradient.
            context: of the whole optimizer step; StepContext() where `needs_step_pass` is False.
        """


@singledispatch
def estimator_of(settings: LossSettings) -> Estimator:
    """The estimator that `settings` describe, without prefix weight.

    Raises:
        ConfigError: nothing is registered for this class of settings.
    """
    raise ConfigError(
        f"loss.name {settings.name!r} has settings ({type(settings).__name__}) but no function. Register one with "
        "@estimator_of.register in a module that asyncopd/losses/__init__.py imports (CONTRIBUTING.md)."
    )
