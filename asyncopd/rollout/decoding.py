"""Continuous batching: the synchronous engine inside `HfSampler`. One `step` gives every active slot one token.

    admit --> uncached --step: packed prefill--> cached --step: one token--> ... --> finished Trajectory, slot free
                 ^                                  |
                 +--------- refresh (all slots) ----+      finished tokens stay, the cache is made again

A token depends on seed, trajectory index, position and weights, never on the slot or on what runs beside it. Invariant
during a step: slots 0 ... num_active−1 are occupied, so that the cache is read through views. Suffixes: S slots or
rows of the host's records, A active slots, U uncached ones, T response positions, C columns (emitted token, head,
draws; then the tail mass).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.causal_lm import num_ids
from asyncopd.models.packing import PackedTokens, TokenPair, pack
from asyncopd.models.sampling import SamplerSettings, draw, law_logprobs, policy_key
from asyncopd.ports import SampleRequest
from asyncopd.rollout.slots import SlotModel, first_slots
from asyncopd.types import FinishReason, PolicyVersion, PolicyWeights, Trajectory, VersionRun

# Short rows keep the block-causal mask small: attention over C cells costs C² whatever the segments are.
_ROW_CAPACITY = 128
# Tokens prefilled in one pass; bounds activations when a refresh makes all caches again.
_PREFILL_CELLS = 8192
# `pack` lays out what predicts a response; what comes next is not known yet, only that it is one token.
_NEXT_TOKEN = np.zeros(1, np.int32)


@dataclass(frozen=True)
class _Response:
    """One response in progress."""

    ticket: int
    request: SampleRequest
    row: int
    """Of its tokens in the records."""
    runs: list[tuple[int, int]]
    """(version, first response position it produces), in order."""


class Decoder:
    """Slots, their cache and their host-side records. Not thread-safe; `HfSampler` gives it a thread."""

    def __init__(self, model: PreTrainedModel, settings: SamplerSettings) -> None:
        """Takes ownership of `model`.

        Raises:
            ConfigError: a sampling law that is no distribution.
            EngineError: the model cannot serve `max_context` or be given slots.
        """
        rule = settings.rule(num_ids(model))
        num_slots, max_context = settings.slots, settings.max_context
        self._model = SlotModel(model, num_slots=num_slots, max_context=max_context)
        self._rule, self._settings = rule, settings
        self._stop_ids = np.array(settings.stop_ids, np.int64)
        self.version: PolicyVersion | None = None
        self.num_slots, self.max_context = num_slots, max_context
        self.vocab_size = self._model.vocab_size

        # What was drawn, by row; a response keeps its row when its slot moves. The last log-prob is the tail mass.
        # Memory is committed by the operating system as positions are written, not here.
        num_columns = 1 + rule.head + rule.num_draws
        self._ids_STC = np.zeros((num_slots, max_context, num_columns), np.int32)
        self._logprobs_STC = np.zeros((num_slots, max_context, num_columns + 1), np.float32)
        # All by slot.
        self._responses: list[_Response | None] = [None] * num_slots
        self._rows_S = np.arange(num_slots)
        self._keys_S = np.zeros(num_slots, np.uint64)
        self._prompt_lengths_S = np.zeros(num_slots, np.int64)
        self._counts_S = np.zeros(num_slots, np.int64)
        self._limits_S = np.zeros(num_slots, np.int64)
        self._last_ids_S = np.zeros(num_slots, np.int64)
        self._is_cached_S = np.zeros(num_slots, np.bool_)
        lengths = (self._prompt_lengths_S, self._counts_S, self._limits_S)
        self._moving = (*lengths, self._keys_S, self._last_ids_S, self._is_cached_S)
        self._end = 0
        self._holes: list[int] = []
        self._num_admitted = 0

    @property
    def num_active(self) -> int:
        return self._end - len(self._holes)

    @property
    def num_prefilling(self) -> int:
        """Active responses whose cache the next step, or the one in progress, makes."""
        return sum(1 for r, cached in zip(self._responses, self._is_cached_S, strict=True) if r and not cached)

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_active

    def admit(self, request: SampleRequest) -> int:
        """Give a checked request a free slot; its first token comes with the next step. Returns its ticket."""
        assert self.version is not None
        if self._holes:
            slot = self._holes.pop()
        else:
            slot, self._end = self._end, self._end + 1
        runs = [(self.version.number, 0)]
        self._responses[slot] = _Response(self._num_admitted, request, int(self._rows_S[slot]), runs)
        self._keys_S[slot] = policy_key(self._settings.seed, request.index)
        self._prompt_lengths_S[slot] = len(request.prompt_ids)
        self._limits_S[slot] = request.max_new_tokens
        self._counts_S[slot] = 0
        self._is_cached_S[slot] = False
        self._num_admitted += 1
        return self._num_admitted - 1

    def refresh(self, weights: PolicyWeights) -> None:
        """Go on under other weights: active responses keep their tokens, their cache is made again.

        Raises:
            EngineError: the weights do not fit; nothing changed.
        """
        self._model.load(weights.safetensors)
        self.version = weights.version
        self._is_cached_S[:] = False
        for slot, response in enumerate(self._responses):
            if response is not None:
                count = int(self._counts_S[slot])
                # A run that got no token is forgotten.
                response.runs[:] = [run for run in response.runs if run[1] < count]
                response.runs.append((weights.version.number, count))

    def step(self) -> list[tuple[int, Trajectory]]:
        """One token for every active slot (at least one); returns tickets and responses that this finished.

        Raises:
            EngineError: the model produced NaN.
        """
        self._fill_holes()
        active = slice(0, self._end)
        logits_AV = self._model.logits(self._hidden())
        logprobs_AV = law_logprobs(logits_AV, temperature=self._settings.temperature, top_p=self._settings.top_p)
        draws = draw(logprobs_AV, self._keys_S[active], self._counts_S[active], self._rule)
        ids_AC = draws.ids_AC.cpu().numpy()
        logprobs_AC = torch.cat([draws.logprobs_AC, draws.tail_logmass_A[:, None]], dim=1).cpu().numpy()
        if not np.isfinite(logprobs_AC).all():
            raise EngineError(
                f"the student produced NaN under policy version {self.version}; generation stopped. "
                "Check the published weights and the learner's last steps."
            )
        rows_A, positions_A = self._rows_S[active], self._counts_S[active]
        self._ids_STC[rows_A, positions_A], self._logprobs_STC[rows_A, positions_A] = ids_AC, logprobs_AC
        self._last_ids_S[active] = ids_AC[:, 0]
        self._is_cached_S[active] = True
        self._counts_S[active] += 1
        is_finished_A = np.isin(ids_AC[:, 0], self._stop_ids) | (self._counts_S[active] >= self._limits_S[active])
        return [self._finish(int(slot)) for slot in np.flatnonzero(is_finished_A)]

    def _hidden(self) -> Tensor:
        """[A, D] hidden states that predict the next token of every active slot; fills the cache on the way."""
        is_cached_A = self._is_cached_S[: self._end]
        ids_A = self._last_ids_S[: self._end]
        positions_A = np.where(is_cached_A, (self._prompt_lengths_S + self._counts_S)[: self._end] - 1, -1)
        uncached_U = np.flatnonzero(~is_cached_A)
        if len(uncached_U) == 0:
            return self._model.forward_pass(ids_A, positions_A, None, uncached_U)
        # Decoding rides on the first prefill pass, unless nothing is cached. Uncached slots are computed too:
        # that costs a row each and keeps the cache a view.
        num_decode = self._end if is_cached_A.any() else 0
        hidden_AD: Tensor | None = None
        for slots_U, packed in self._prefill_groups(uncached_U):
            output_PD = self._model.forward_pass(ids_A[:num_decode], positions_A[:num_decode], packed, slots_U)
            self._copy_shared_prompts(packed, slots_U)
            if hidden_AD is None:
                hidden_AD = output_PD.new_empty(self._end, output_PD.shape[-1])
                hidden_AD[:num_decode] = output_PD[:num_decode]
            hidden_AD[self._model.on_device(slots_U)] = output_PD[num_decode:]
            num_decode = 0
        assert hidden_AD is not None
        return hidden_AD

    def _prefill_groups(self, uncached_U: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], PackedTokens]]:
        """Slots and packed tokens of each prefill pass: prompt and response so far, at most `_PREFILL_CELLS` a pass
        unless a single response is longer. A prompt that several responses answer is computed once."""
        waiting: list[tuple[int, int, TokenPair]] = []
        for slot in uncached_U.tolist():
            response = self._responses[slot]
            assert response is not None
            so_far = self._ids_STC[response.row, : self._counts_S[slot], 0]
            pair = (response.request.prompt_ids, np.concatenate([so_far, _NEXT_TOKEN]))
            waiting.append((response.request.index, slot, pair))
        # Responses to one prompt have neighbouring indices, whatever slots they got.
        waiting.sort(key=lambda each: each[:2])
        lengths_U = np.array([len(prompt) + len(so_far) - 1 for _, _, (prompt, so_far) in waiting])
        groups_U = np.cumsum(lengths_U) // _PREFILL_CELLS
        for group in np.unique(groups_U):
            members = np.flatnonzero(groups_U == group)
            pairs = [waiting[member][2] for member in members]
            capacity = max(_ROW_CAPACITY, int(lengths_U[members].max()))
            are_shared = len({prompt_ids.tobytes() for prompt_ids, _ in pairs}) < len(pairs)
            packed = pack(pairs, 2 * capacity if are_shared else capacity)
            # Only what comes next is asked for.
            last_U = packed.predict_rows_T[np.cumsum([len(so_far) for _, so_far in pairs]) - 1]
            yield np.array([waiting[member][1] for member in members]), replace(packed, predict_rows_T=last_U)

    def _copy_shared_prompts(self, packed: PackedTokens, slots_U: NDArray[np.int64]) -> None:
        """Give every slot behind a shared prompt the keys and values that the pass wrote into the first one's."""
        for slot, source in zip(slots_U.tolist(), first_slots(packed, slots_U).tolist(), strict=True):
            if slot != source:
                self._model.cache.move(source, slot, int(self._prompt_lengths_S[slot]))

    def _fill_holes(self) -> None:
        """Move the last slots into holes, so that active slots are contiguous. Rare: new requests fill holes first."""
        for hole in sorted(self._holes, reverse=True):
            self._end -= 1
            last = self._end
            if hole == last:
                continue
            length = int(self._prompt_lengths_S[last] + self._counts_S[last]) - 1
            self._model.cache.move(last, hole, length)
            # Swapped, not copied: rows stay a permutation, so a freed slot owns a free row.
            self._rows_S[[hole, last]] = self._rows_S[[last, hole]]
            self._responses[hole], self._responses[last] = self._responses[last], None
            for by_slot in self._moving:
                by_slot[hole] = by_slot[last]
        self._holes.clear()

    def _finish(self, slot: int) -> tuple[int, Trajectory]:
        """Free the slot and turn its records into a Trajectory, whose arrays are views into two copies made here."""
        response = self._responses[slot]
        assert response is not None
        self._responses[slot] = None
        self._holes.append(slot)
        count = int(self._counts_S[slot])
        reason: FinishReason = "stop" if self._last_ids_S[slot] in self._stop_ids else "length"
        ends = [start for _, start in response.runs[1:]] + [count]
        return response.ticket, self._rule.trajectory(
            response.request.index,
            response.request.prompt_ids,
            self._ids_STC[response.row, :count].copy(),
            self._logprobs_STC[response.row, :count].copy(),
            version_runs=tuple(VersionRun(v, end - start) for (v, start), end in zip(response.runs, ends, strict=True)),
            finish_reason=reason,
        )


def check_request(request: SampleRequest, *, max_context: int, vocab_size: int, has_weights: bool) -> None:
    """Refuse what an engine cannot serve.

    Raises:
        EngineError: no weights yet, an empty or invalid prompt, or no room for the response; names the index.
    """
    ids, index = request.prompt_ids, request.index
    if not has_weights:
        raise EngineError(f"index {index}: the sampler has no weights yet; await refresh(weights) first.")
    if len(ids) == 0 or request.max_new_tokens < 1:
        raise EngineError(
            f"index {index}: {len(ids)} prompt tokens and max_new_tokens {request.max_new_tokens}; "
            "both must be at least 1."
        )
    if len(ids) + request.max_new_tokens > max_context:
        raise EngineError(
            f"index {index}: {len(ids)} prompt + {request.max_new_tokens} new tokens exceed max_context "
            f"{max_context}. Lower the response limit or raise max_context."
        )
    if np.min(ids) < 0 or np.max(ids) >= vocab_size:
        raise EngineError(
            f"index {index}: prompt ids reach from {np.min(ids)} to {np.max(ids)}, the model's vocabulary has "
            f"{vocab_size}. Do task and student use the same tokenizer?"
        )
