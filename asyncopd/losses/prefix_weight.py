"""The optional weight that corrects the distribution over prefixes, not the one over the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.losses.logspace import importance_log_ratio


@dataclass(frozen=True)
class PrefixWeights:
    weight_T: Tensor
    """[T] in (0, max_weight], detached."""
    truncated_T: Tensor
    """[T] bool: the product exceeded the cap."""


def prefix_weights(
    student_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, trajectory_T: Tensor, *, max_weight: float
) -> PrefixWeights:
    """w_t = min(Π_{s<t} ρ(y_s), c): how much more often the current student would have reached prefix s_t.

    The product runs over the previous tokens of the same response only; the first token has weight 1. Untruncated it
    makes E_{p_old} over prefixes an E_{p_θ}; its variance grows exponentially with t, hence the cap, and hence off by
    default. Rows must be whole trajectories in response order. The summed log is exact to float64.

    Args:
        student_logprobs_T: [T] log p_θ of the sampled tokens, nats; not differentiated.
        behaviour_logprobs_T: [T] log p_old of them, nats.
        trajectory_T: [T] int64, constant over the consecutive rows of a trajectory.
        max_weight: c >= 1.
    """
    log_ratio_T = importance_log_ratio(student_logprobs_T.detach(), behaviour_logprobs_T).double()
    before_T = log_ratio_T.cumsum(0) - log_ratio_T
    _, lengths = torch.unique_consecutive(trajectory_T, return_counts=True)
    first_rows = lengths.cumsum(0) - lengths
    log_product_T = before_T - before_T[first_rows].repeat_interleave(lengths)
    log_cap = torch.tensor(max_weight, dtype=torch.float64).log()
    return PrefixWeights(
        weight_T=log_product_T.clamp(max=log_cap.item()).exp().to(student_logprobs_T.dtype),
        truncated_T=log_product_T > log_cap,
    )
