"""One optimizer step over scored trajectories: packing, micro-batches, global token normalisation, statistics.

scored trajectories --pack--> micro-batches --LogprobModel--> log p_θ at ids --Estimator--> loss per token
step loss = Σ over all trained tokens of all micro-batches and ranks / number of those tokens
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from asyncopd.errors import NonFiniteError
from asyncopd.learner.statistics import StepStatistics, of_all_ranks
from asyncopd.losses.contract import Estimator, StepContext
from asyncopd.losses.gather import gather_logprobs
from asyncopd.losses.rows import TokenRows
from asyncopd.metrics import GRAD_NORM, LOSS, recorded
from asyncopd.models.causal_lm import output_embedding, packed_hidden
from asyncopd.models.packing import PackedTokens, pack
from asyncopd.types import ScoredTrajectory


class LogprobModel(nn.Module):
    """A causal language model seen as what losses need: log-probs at given ids for every response token."""

    def __init__(self, causal_lm: nn.Module, temperature: float, top_p: float = 1.0) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature, self.top_p = temperature, top_p

    def forward(self, packed: PackedTokens, ids_TJ: Tensor, num_sampled: int | None = None) -> tuple[Tensor, Tensor]:
        """Log p_θ at `ids_TJ`, [T, J] float32 nats with gradient, and the entropy of each row, [T], without.

        The first `num_sampled` columns, or all, are of the law that is sampled from; see `gather_logprobs`.
        """
        hidden_TD = packed_hidden(self.causal_lm, packed)
        weight_VD, bias_V = output_embedding(self.causal_lm)
        return gather_logprobs(
            hidden_TD,
            weight_VD,
            ids_TJ,
            bias_V=bias_V,
            temperature=self.temperature,
            top_p=self.top_p,
            num_sampled=num_sampled,
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward works on."""

    packed: PackedTokens
    rows: TokenRows


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, over all ranks."""

    metrics: Mapping[str, float]
    num_tokens: int


def micro_batches(
    batch: Sequence[ScoredTrajectory], *, row_capacity: int, rows_per_micro_batch: int, device: torch.device
) -> list[MicroBatch]:
    """Cut a batch into packed micro-batches of about `rows_per_micro_batch` rows, in index order."""
    budget = row_capacity * rows_per_micro_batch
    groups: list[list[ScoredTrajectory]] = [[]]
    size = 0
    for scored in batch:
        prompt_ids, length = scored.trajectory.prompt_ids, len(scored.trajectory.response_ids)
        # What `pack` lays out once costs once.
        if not (groups[-1] and np.array_equal(groups[-1][-1].trajectory.prompt_ids, prompt_ids)):
            length += len(prompt_ids)
        if groups[-1] and size + length > budget:
            groups.append([])
            size = 0
        groups[-1].append(scored)
        size += length
    return [_micro_batch(group, row_capacity, device) for group in groups if group]


def _micro_batch(group: Sequence[ScoredTrajectory], row_capacity: int, device: torch.device) -> MicroBatch:
    sequences = [(s.trajectory.prompt_ids, s.trajectory.response_ids) for s in group]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    return MicroBatch(pack(sequences, max(row_capacity, longest)), TokenRows.from_scored(group, device))


def optimizer_step(
    model: LogprobModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    estimator: Estimator,
    *,
    accelerator: Accelerator,
    grad_clip: float,
    on_micro_batch: Callable[[int, int], None] = lambda number, num_batches: None,
) -> StepResult:
    """Accumulate the gradient of the whole step, clip it, and take one optimizer step.

    Args:
        batches: this rank's share; every rank needs at least one, and ranks may have different numbers of them.
        on_micro_batch: called before each with its number, from 1, and how many there are.
    Raises:
        NonFiniteError: the loss or the gradient norm is NaN or infinite; parameters are unchanged. Every rank raises
            it, with the statistics of the whole step.
    """
    num_tokens = sum(of_all_ranks(sum(len(b.rows) for b in batches), accelerator))
    context = _step_context(model, batches, estimator, accelerator)
    statistics = StepStatistics()
    optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches):
        on_micro_batch(number + 1, len(batches))
        # Gradients of all but the last micro-batch stay local: one all-reduce a step.
        with accelerator.no_sync(model) if number < len(batches) - 1 else contextlib.nullcontext():
            loss_sum = _loss_sum(model, batch, estimator, context, statistics)
            # DDP averages over ranks, the step's loss is a sum over them.
            accelerator.backward(loss_sum * (accelerator.num_processes / num_tokens))
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip)
    metrics = statistics.reduced(accelerator) | {GRAD_NORM: float(grad_norm)}
    if not np.isfinite([metrics[LOSS], metrics[GRAD_NORM]]).all():
        optimizer.zero_grad(set_to_none=True)
        indices = statistics.non_finite_indices(accelerator)
        named = ", ".join(map(str, indices[:8])) + (" …" if len(indices) > 8 else "")
        raise NonFiniteError(
            f"loss {metrics[LOSS]} with gradient norm {metrics[GRAD_NORM]}; both must be finite. "
            f"The step was abandoned and nothing was published. Indices with a non-finite loss: {named or 'none'}. "
            "Statistics: " + ", ".join(f"{key} {value:.6g}" for key, value in sorted(recorded(metrics).items())) + "."
        )
    optimizer.step()
    return StepResult(metrics=recorded(metrics), num_tokens=num_tokens)


def _loss_sum(
    model: nn.Module, batch: MicroBatch, estimator: Estimator, context: StepContext, statistics: StepStatistics
) -> Tensor:
    rows = batch.rows
    # Column 0 is always the sampled token: drift, ratios and KL are measured on it whatever the estimator.
    ids_TJ = torch.cat([rows.response_ids_T[:, None], estimator.student_ids(rows)], dim=1)
    num_sampled = 1 + estimator.num_sampled(ids_TJ.shape[1] - 1)
    logprobs_TJ, entropy_T = model(batch.packed, ids_TJ, num_sampled)
    losses = estimator(rows, logprobs_TJ[:, 1:], context)
    statistics.add(rows, ids_TJ, logprobs_TJ.detach(), entropy_T, losses)
    return losses.loss_T.sum()


@torch.no_grad()
def _step_context(
    model: LogprobModel, batches: Sequence[MicroBatch], estimator: Estimator, accelerator: Accelerator
) -> StepContext:
    """What the estimator must know of the whole step before its first micro-batch, for example m2po's threshold."""
    if not estimator.needs_step_pass:
        return StepContext()
    contexts = []
    for batch in batches:
        ids_TJ = estimator.student_ids(batch.rows)
        logprobs_TJ, _ = model(batch.packed, ids_TJ, estimator.num_sampled(ids_TJ.shape[1]))
        contexts.append(estimator.step_context(batch.rows, logprobs_TJ))
    mine = StepContext.join(contexts)
    shifts_H = None if mine.harmful_shifts_H is None else mine.harmful_shifts_H.cpu()
    return StepContext.join(of_all_ranks(StepContext(shifts_H), accelerator))
