"""Drawing token ids from logits: the law, counter-based randomness, and the candidates recorded beside each token.

    logits --law_logprobs--> log p_old --draw--> emitted token, head (top-k), draws     (uniforms: a pure function of
                                                                                         seed, index, position, lane)

Nothing here depends on what else is in a batch. Suffixes: A rows (one position each), V vocabulary, K head, N draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncopd.errors import ConfigError
from asyncopd.models.random import derive, stream_key, uniforms
from asyncopd.types import LOGPROB_FLOOR, Candidates, DrawLaw, FinishReason, IntArray, Trajectory, VersionRun

# Counters of one lane; responses are shorter.
_LANE_STRIDE = 1 << 32
# Above this the inverse CDF goes through block sums: one cumulative sum over 151k float64 per row is avoidable.
_BLOCK_SIZE = 1024


@dataclass(frozen=True)
class CandidateRule:
    """Which ids are recorded at every position besides the emitted token."""

    head: int
    """Most likely ids to record."""
    num_draws: int
    """Draws to record; under law `policy` the emitted token is the first of them."""
    law: DrawLaw = "policy"

    def candidates(self, ids_TC: NDArray[np.int32], logprobs_TC: NDArray[np.float32]) -> Candidates:
        """What was recorded at T positions, from columns; the values are views into them.

        Args:
            ids_TC: [T, 1 + K + N] emitted token, head, draws.
            logprobs_TC: [T, 1 + K + N + 1] log p_old of those, nats, then the tail mass.
        """
        head_end = 1 + self.head
        return Candidates(
            head_ids_TK=ids_TC[:, 1:head_end],
            head_logprobs_TK=logprobs_TC[:, 1:head_end],
            tail_logmass_T=logprobs_TC[:, -1],
            draw_ids_TN=ids_TC[:, head_end:],
            draw_logprobs_TN=logprobs_TC[:, head_end:-1],
            law=self.law,
        )

    def trajectory(
        self,
        index: int,
        prompt_ids: IntArray,
        ids_TC: NDArray[np.int32],
        logprobs_TC: NDArray[np.float32],
        *,
        version_runs: tuple[VersionRun, ...],
        finish_reason: FinishReason,
    ) -> Trajectory:
        """A finished response from the columns of `candidates`; the rollout stage adds what it knows of the prompt."""
        return Trajectory(
            index=index,
            prompt_id="",
            prompt_ids=prompt_ids,
            response_ids=ids_TC[:, 0],
            behaviour_logprobs_T=logprobs_TC[:, 0],
            version_runs=version_runs,
            finish_reason=finish_reason,
            candidates=self.candidates(ids_TC, logprobs_TC),
        )


@dataclass(frozen=True)
class SamplerSettings:
    """What is asked of a sampler, whichever engine it is."""

    slots: int
    """Responses that are generated side by side."""
    max_context: int
    """Most tokens of prompt and response together; sizes the cache."""
    stop_ids: tuple[int, ...]
    """Ids that end a response."""
    seed: int
    """The run's seed; with a trajectory's index it decides every draw."""
    temperature: float = 1.0
    """Of the law that is sampled, as is `top_p`, and whose log-probs are stored."""
    top_p: float = 1.0
    head: int = 0
    """Of the candidates recorded at each position (types.Candidates), as are `num_draws` and `law`."""
    num_draws: int = 0
    law: DrawLaw = "policy"

    def rule(self, vocab_size: int) -> CandidateRule:
        """Raises ConfigError, as `check_law` does, when the settings name no distribution over the vocabulary."""
        rule = CandidateRule(self.head, self.num_draws, self.law)
        check_law(temperature=self.temperature, top_p=self.top_p, rule=rule, vocab_size=vocab_size)
        return rule


@dataclass(frozen=True)
class Draws:
    """What was drawn at A positions; log-probs are of the law really sampled from, nats, at least `LOGPROB_FLOOR`."""

    ids_AC: Tensor
    """[A, 1 + K + N] int64: emitted token, head, draws."""
    logprobs_AC: Tensor
    """[A, 1 + K + N] float32, log p_old at `ids_AC`."""
    tail_logmass_A: Tensor
    """[A] float32, log of the mass outside the head. `LOGPROB_FLOOR` where nothing is left outside it (top-p, or a
    head as large as the vocabulary); tail draws are then the head's first id, and weigh exp(floor) = 0."""


def policy_key(seed: int, index: int) -> int:
    """Random key (64 bits) of the student's draws for trajectory `index` of the run seeded by `seed`."""
    return derive(stream_key("student draws", seed), index)


def teacher_key(seed: int, index: int) -> int:
    """Random key of a teacher's draws for trajectory `index`; its stream is independent of the student's."""
    return derive(stream_key("teacher draws", seed), index)


def lane_uniforms(keys_A: NDArray[np.uint64], positions_A: NDArray[np.int64], num_lanes: int) -> NDArray[np.float64]:
    """[A, num_lanes] numbers in [0, 1), a pure function of key, position and lane, whatever `num_lanes` is."""
    return uniforms(keys_A[:, None], positions_A[:, None] + np.arange(num_lanes) * _LANE_STRIDE)


def law_logprobs(logits_AV: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """[A, V] float32 log-probs of the law that is sampled: temperature, then the smallest set of ids whose mass
    reaches `top_p`, renormalised; −inf outside it. Equal logits are ranked by id."""
    logprobs_AV = torch.log_softmax(logits_AV.float() / temperature, dim=-1)
    if top_p >= 1.0:
        return logprobs_AV
    return torch.log_softmax(logprobs_AV.masked_fill(~nucleus(logprobs_AV, top_p), -torch.inf), dim=-1)


def nucleus(logprobs_AV: Tensor, top_p: float) -> Tensor:
    """[A, V] bool: is the id in the smallest set whose mass reaches `top_p`? Equal log-probs are ranked by id."""
    sorted_AV, order_AV = logprobs_AV.sort(dim=-1, descending=True, stable=True)
    probs_AV = sorted_AV.exp()
    # Mass before an id, so that the id which crosses top_p is still inside and the most likely one always is.
    inside_AV = probs_AV.cumsum(dim=-1) - probs_AV < top_p
    return torch.zeros_like(inside_AV).scatter_(1, order_AV, inside_AV)


def draw(logprobs_AV: Tensor, keys_A: NDArray[np.uint64], positions_A: NDArray[np.int64], rule: CandidateRule) -> Draws:
    """Emit one token per row from exp(logprobs), and record the candidates of `rule`.

    The emitted token uses lane 0 alone, so it is the same whatever candidates are recorded.
    """
    probs_AV = logprobs_AV.exp()
    uniforms_AN = torch.from_numpy(lane_uniforms(keys_A, positions_A, 1 + rule.num_draws)).to(logprobs_AV.device)
    head_ids_AK = logprobs_AV.topk(rule.head, dim=-1).indices
    tail_mass_A = torch.ones(len(logprobs_AV), dtype=torch.float64, device=logprobs_AV.device)
    if rule.head:
        tail_AV = probs_AV.scatter(1, head_ids_AK, 0.0)
        tail_mass_A = tail_AV.sum(dim=-1, dtype=torch.float64)
    if rule.law == "tail" and rule.head and rule.num_draws:
        emitted_ids = inverse_cdf(probs_AV, uniforms_AN[:, :1])
        tail_ids = inverse_cdf(tail_AV, uniforms_AN[:, 1:])
        draw_ids = torch.where(tail_mass_A[:, None] > 0, tail_ids, head_ids_AK[:, :1])
    elif rule.law == "tail":
        emitted_and_draws = inverse_cdf(probs_AV, uniforms_AN)
        emitted_ids, draw_ids = emitted_and_draws[:, :1], emitted_and_draws[:, 1:]
    else:
        draw_ids = inverse_cdf(probs_AV, uniforms_AN[:, : max(1, rule.num_draws)])
        emitted_ids, draw_ids = draw_ids[:, :1], draw_ids[:, : rule.num_draws]
    ids_AC = torch.cat([emitted_ids, head_ids_AK, draw_ids], dim=1)
    return Draws(
        ids_AC=ids_AC,
        logprobs_AC=logprobs_AV.gather(1, ids_AC).clamp(min=LOGPROB_FLOOR),
        tail_logmass_A=tail_mass_A.log().clamp(min=LOGPROB_FLOOR, max=0.0).float(),
    )


def inverse_cdf(weights_AV: Tensor, uniforms_AN: Tensor) -> Tensor:
    """[A, N] ids drawn with probability proportional to the weights; an id of weight 0 is never drawn.

    Args:
        weights_AV: [A, V] float32, >= 0, not necessarily normalised.
        uniforms_AN: [A, N] float64 in [0, 1).
    """
    num_ids = weights_AV.shape[1]
    if num_ids <= 4 * _BLOCK_SIZE:
        cdf_AV = weights_AV.cumsum(dim=-1, dtype=torch.float64)
        # In float64 u·total < total for every u < 1, so the last id of positive weight is never passed.
        return _search(cdf_AV, uniforms_AN * cdf_AV[:, -1:])
    # First the block, then the id inside it: two short cumulative sums instead of one over the vocabulary.
    num_blocks = -(-num_ids // _BLOCK_SIZE)
    padded_AV = torch.nn.functional.pad(weights_AV, (0, num_blocks * _BLOCK_SIZE - num_ids))
    blocks_ABW = padded_AV.view(-1, num_blocks, _BLOCK_SIZE)
    block_cdf_AB = blocks_ABW.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets_AN = uniforms_AN * block_cdf_AB[:, -1:]
    block_AN = _search(block_cdf_AB, targets_AN)
    before_AN = torch.nn.functional.pad(block_cdf_AB, (1, 0)).gather(1, block_AN)
    rows_A1 = torch.arange(len(weights_AV), device=weights_AV.device)[:, None]
    cdf_ANW = blocks_ABW[rows_A1, block_AN].cumsum(dim=-1, dtype=torch.float64)
    # What is left for the block was rounded, so here the total itself must be kept out.
    totals_AN1 = cdf_ANW[..., -1:]
    largest_AN1 = torch.nextafter(totals_AN1, torch.zeros_like(totals_AN1))
    within_AN1 = _search(cdf_ANW, torch.minimum((targets_AN - before_AN)[..., None], largest_AN1))
    return block_AN * _BLOCK_SIZE + within_AN1[..., 0]


def check_law(*, temperature: float, top_p: float, rule: CandidateRule, vocab_size: int) -> None:
    """Refuse settings that name no distribution.

    Raises:
        ConfigError: temperature <= 0, top_p outside (0, 1], or candidates that do not fit the vocabulary.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; sampling needs a temperature above 0.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it is a probability in (0, 1], and 1 truncates nothing.")
    if not 0 <= rule.head <= vocab_size or rule.num_draws < 0:
        raise ConfigError(
            f"candidates: head {rule.head} must be in [0, {vocab_size}] (the vocabulary) and "
            f"num_draws {rule.num_draws} at least 0."
        )


def _search(cdf_V: Tensor, targets_N: Tensor) -> Tensor:
    """First ids whose cumulative weight exceeds the targets: [..., N] into cdf [..., V]."""
    # The clamp matters only where weights are NaN; the caller sees that in the log-probs.
    return torch.searchsorted(cdf_V, targets_N, right=True).clamp_(max=cdf_V.shape[-1] - 1)
