"""From a loss section to the estimator that the learner calls, with the weight of prefixes where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.config.losses import LossSettings, OnPolicySettings
from asyncopd.losses import divergences, head_tail, policy_gradient
from asyncopd.losses.contract import Estimator, RowLosses, StepContext, estimator_of
from asyncopd.losses.logspace import importance_log_ratio
from asyncopd.losses.rows import TokenRows
from asyncopd.metrics import PREFIX_TRUNCATED, PREFIX_WEIGHT

FAMILIES = (head_tail, policy_gradient, divergences)
"""The modules whose estimators exist: importing one registers them with `estimator_of`."""


def build_estimator(settings: LossSettings) -> Estimator:
    """The estimator that `settings` describe, with its prefix weight if they ask for one.

    Raises:
        ConfigError: the settings have no function.
    """
    estimator = estimator_of(settings)
    if isinstance(settings, OnPolicySettings) and settings.max_prefix_weight is not None:
        return PrefixWeighted(estimator, settings.max_prefix_weight)
    return estimator


@dataclass(frozen=True)
class PrefixWeighted(Estimator):
    """Another estimator, each row weighted by how much likelier the current student is to reach its prefix."""

    inner: Estimator
    max_weight: float

    @property
    def needs_step_pass(self) -> bool:
        return self.inner.needs_step_pass

    def student_ids(self, rows: TokenRows) -> Tensor:
        return torch.cat([rows.response_ids_T[:, None], self.inner.student_ids(rows)], -1)

    def step_context(self, rows: TokenRows, student_logprobs_TJ: Tensor) -> StepContext:
        return self.inner.step_context(rows, student_logprobs_TJ[:, 1:])

    def __call__(self, rows: TokenRows, student_logprobs_TJ: Tensor, context: StepContext) -> RowLosses:
        losses = self.inner(rows, student_logprobs_TJ[:, 1:], context)
        weight_T, truncated_T = prefix_weights(
            student_logprobs_TJ[:, 0], rows.behaviour_logprobs_T, rows.trajectory_T, max_weight=self.max_weight
        )
        own = {PREFIX_WEIGHT: weight_T, PREFIX_TRUNCATED: truncated_T.to(weight_T.dtype)}
        return RowLosses(losses.loss_T * weight_T, {**losses.statistics_T, **own})


def prefix_weights(
    student_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, trajectory_T: Tensor, *, max_weight: float
) -> tuple[Tensor, Tensor]:
    """w_t = min(Π_{s<t} ρ(y_s), c): how much more often the current student would have reached prefix s_t.

    The product runs over the previous tokens of the same response only; the first token has weight 1. Untruncated it
    makes E_{p_old} over prefixes an E_{p_θ}; its variance grows exponentially with t, hence the cap, and hence off by
    default. Rows must be whole trajectories in response order. The summed log is exact to float64.

    Args:
        student_logprobs_T: [T] log p_θ of the sampled tokens, nats; not differentiated.
        behaviour_logprobs_T: [T] log p_old of them, nats.
        trajectory_T: [T] int64, constant over the consecutive rows of a trajectory.
        max_weight: c >= 1.
    Returns:
        Weights [T] in (0, max_weight], detached; and [T] bool, where the product exceeded the cap.
    """
    log_ratio_T = importance_log_ratio(student_logprobs_T.detach(), behaviour_logprobs_T).double()
    before_T = log_ratio_T.cumsum(0) - log_ratio_T
    _, lengths = torch.unique_consecutive(trajectory_T, return_counts=True)
    first_rows = lengths.cumsum(0) - lengths
    log_product_T = before_T - before_T[first_rows].repeat_interleave(lengths)
    log_cap = torch.tensor(max_weight, dtype=torch.float64).log()
    weight_T = log_product_T.clamp(max=log_cap.item()).exp().to(student_logprobs_T.dtype)
    return weight_T, log_product_T > log_cap
