"""Continuous batching: the synchronous engine inside `HfSampler`. One `step` gives every active slot one token.

    admit --> uncached --step: packed prefill--> cached --step: one token--> ... --> finished Trajectory, slot free
                 ^                                  |
                 +--------- refresh (all slots) ----+      finished tokens stay, the cache is made again

A token depends on seed, trajectory index, position and weights, never on the slot or on what runs beside it.
Invariant during a step: slots 0 ... num_active−1 are occupied, so that the cache is read through views.
Suffixes: S slots, A active slots, U uncached ones, C candidates columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.modeling import block_causal_mask, load_safetensors, output_embedding
from asyncopd.packing import PackedTokens, TokenPair, pack
from asyncopd.ports import SampleRequest
from asyncopd.rollout.records import OpenResponse, TokenRecords
from asyncopd.rollout.slots import ATTENTION_NAME, PassPlan, SlotCache
from asyncopd.sampling import CandidateRule, check_law, draw, law_logprobs, policy_key
from asyncopd.types import FinishReason, PolicyVersion, PolicyWeights, Trajectory

_ROW_CAPACITY = 128
# Short rows keep the block-causal mask small: attention over C cells costs C² whatever the segments are.
_PREFILL_CELLS = 8192
_NEXT_TOKEN = np.zeros(1, np.int32)


class Decoder:
    """Slots, their cache and their host-side records. Not thread-safe; `HfSampler` gives it a thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_context: int,
        temperature: float,
        top_p: float,
        rule: CandidateRule,
        seed: int,
        eos_id: int,
    ) -> None:
        """Takes ownership of `model`, whose attention is replaced.

        Raises:
            ConfigError: a sampling law that is no distribution.
            EngineError: `max_context` beyond the model's positions, or an attention that cannot be replaced.
        """
        check_law(temperature=temperature, top_p=top_p, rule=rule, vocab_size=model.config.vocab_size)
        positions = getattr(model.config, "max_position_embeddings", max_context)
        if max_context > positions or num_slots < 1:
            raise EngineError(
                f"max_context {max_context} must be at most the model's {positions} positions, "
                f"and {num_slots} slots at least 1."
            )
        model.set_attn_implementation(ATTENTION_NAME)
        self._model, self._num_layers = model, int(model.config.num_hidden_layers)
        # Kept, because the model finds them by walking its parameters, and a step asks many times.
        self._device, self._dtype = model.device, model.dtype
        self._weight_VD, self._bias_V = output_embedding(model)
        # Slot attention has its own masks. A 4-D one is handed through as it is, and stops models from making theirs.
        self._no_mask_1111 = torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=self._device)
        self._cache = SlotCache(num_slots, max_context)
        self._temperature, self._top_p, self._rule = temperature, top_p, rule
        self._seed, self._eos_id = seed, eos_id
        self.version: PolicyVersion | None = None
        self.num_slots, self.max_context = num_slots, max_context
        self.vocab_size = int(model.config.vocab_size)

        # A response keeps its row of the records when its slot moves.
        self._records = TokenRecords(num_slots, max_context, rule)
        # All by slot.
        self._responses: list[OpenResponse | None] = [None] * num_slots
        self._rows_S = np.arange(num_slots)
        self._keys_S = np.zeros(num_slots, np.uint64)
        self._prompt_lengths_S = np.zeros(num_slots, np.int64)
        self._counts_S = np.zeros(num_slots, np.int64)
        self._limits_S = np.zeros(num_slots, np.int64)
        self._last_ids_S = np.zeros(num_slots, np.int64)
        self._is_cached_S = np.zeros(num_slots, np.bool_)
        self._end = 0
        self._holes: list[int] = []
        self._num_admitted = 0

    @property
    def num_active(self) -> int:
        return self._end - len(self._holes)

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
        self._responses[slot] = OpenResponse(self._num_admitted, request, int(self._rows_S[slot]), self.version.number)
        self._keys_S[slot] = policy_key(self._seed, request.index)
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
        load_safetensors(self._model, weights.safetensors)
        self.version = weights.version
        self._is_cached_S[:] = False
        for slot, response in enumerate(self._responses):
            if response is not None:
                response.start_version(weights.version.number, int(self._counts_S[slot]))

    def step(self) -> list[tuple[int, Trajectory]]:
        """One token for every active slot (at least one); returns tickets and responses that this finished.

        Raises:
            EngineError: the model produced NaN, or ignores the slot attention.
        """
        self._fill_holes()
        active = slice(0, self._end)
        logits_AV = torch.nn.functional.linear(self._hidden(), self._weight_VD, self._bias_V)
        logprobs_AV = law_logprobs(logits_AV, temperature=self._temperature, top_p=self._top_p)
        draws = draw(logprobs_AV, self._keys_S[active], self._counts_S[active], self._rule)
        ids_AC = draws.ids_AC.cpu().numpy()
        logprobs_AC = torch.cat([draws.logprobs_AC, draws.tail_logmass_A[:, None]], dim=1).cpu().numpy()
        if not np.isfinite(logprobs_AC).all():
            raise EngineError(
                f"the student produced NaN under policy version {self.version}; generation stopped. "
                "Check the published weights and the learner's last steps."
            )
        self._records.write(self._rows_S[active], self._counts_S[active], ids_AC, logprobs_AC)
        self._last_ids_S[active] = ids_AC[:, 0]
        self._is_cached_S[active] = True
        self._counts_S[active] += 1
        is_finished_A = (ids_AC[:, 0] == self._eos_id) | (self._counts_S[active] >= self._limits_S[active])
        return [self._finish(int(slot)) for slot in np.flatnonzero(is_finished_A)]

    def _hidden(self) -> Tensor:
        """[A, D] hidden states that predict the next token of every active slot; fills the cache on the way."""
        num_active = self._end
        uncached_U = np.flatnonzero(~self._is_cached_S[:num_active])
        if len(uncached_U) == 0:
            return self._forward_pass(num_active, None, uncached_U)
        prefills = list(self._prefill_groups(uncached_U))
        # Decoding rides on the first prefill pass. Slots still uncached decode too, masked and never written:
        # that costs one row each and keeps the cache a view.
        num_decode = num_active if len(uncached_U) < num_active else 0
        hidden_AD: Tensor | None = None
        for slots_U, packed in prefills:
            output_PD = self._forward_pass(num_decode, packed, slots_U)
            if hidden_AD is None:
                hidden_AD = output_PD.new_empty(num_active, output_PD.shape[-1])
                hidden_AD[:num_decode] = output_PD[:num_decode]
            hidden_AD[self._on_device(slots_U)] = output_PD[num_decode:]
            num_decode = 0
        assert hidden_AD is not None
        return hidden_AD

    def _prefill_groups(self, uncached_U: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], PackedTokens]]:
        """Slots and packed tokens of each prefill pass: prompt and response so far, at most `_PREFILL_CELLS` a pass
        unless a single response is longer."""
        pairs: list[TokenPair] = []
        for slot in uncached_U:
            response = self._responses[slot]
            assert response is not None
            so_far = self._records.response_ids(response.row, int(self._counts_S[slot]))
            pairs.append((np.concatenate([response.request.prompt_ids, so_far]), _NEXT_TOKEN))
        ends_U = np.cumsum([len(ids) for ids, _ in pairs])
        for group in np.unique(ends_U // _PREFILL_CELLS):
            members = np.flatnonzero(ends_U // _PREFILL_CELLS == group)
            chosen = [pairs[member] for member in members]
            yield uncached_U[members], pack(chosen, max(_ROW_CAPACITY, max(len(ids) for ids, _ in chosen)))

    def _forward_pass(self, num_decode: int, packed: PackedTokens | None, slots_U: NDArray[np.int64]) -> Tensor:
        """[num_decode + U, D]: hidden states of the decoding slots, then of each prefilled slot's last token."""
        is_cached_A = self._is_cached_S[:num_decode]
        positions_A = np.where(is_cached_A, (self._prompt_lengths_S + self._counts_S)[:num_decode] - 1, 0)
        ids, positions, outputs = self._last_ids_S[:num_decode], positions_A, np.arange(num_decode)
        slots = np.where(is_cached_A, outputs, self._cache.scratch_slot)
        prefill_mask = None
        if packed is not None:
            segments = packed.segments_RC.ravel()
            ids = np.concatenate([ids, packed.ids_RC.ravel()])
            positions = np.concatenate([positions, packed.positions_RC.ravel()])
            # Segment −1, padding, selects the last element.
            slots = np.concatenate([slots, np.append(slots_U, self._cache.scratch_slot)[segments]])
            outputs = np.concatenate([outputs, num_decode + packed.predict_rows_T])
            prefill_mask = block_causal_mask(self._on_device(packed.segments_RC), self._dtype)
        position_ids_N = self._on_device(positions)
        plan = PassPlan(
            cache=self._cache,
            num_decode=num_decode,
            decode_mask_A11L=self._decode_mask(positions_A) if num_decode else None,
            prefill_mask_R1CC=prefill_mask,
            slots_N=self._on_device(slots),
            positions_N=position_ids_N,
        )
        output: Any = self._model.base_model(
            input_ids=self._on_device(ids)[None],
            position_ids=position_ids_N[None],
            attention_mask=self._no_mask_1111,
            use_cache=False,
            plan=plan,
        )
        if len(plan.layers_seen) != self._num_layers:
            raise EngineError(
                f"{self._model.config.model_type}: {len(plan.layers_seen)} of {self._num_layers} layers "
                "attend through transformers' AttentionInterface, so the slot cache cannot serve it."
            )
        hidden_ND: Tensor = output.last_hidden_state[0]
        return hidden_ND if len(outputs) == len(ids) else hidden_ND[self._on_device(outputs)]

    def _decode_mask(self, positions_A: NDArray[np.int64]) -> Tensor:
        """[A, 1, 1, L] additive; each slot sees its cached positions and the one being written."""
        hidden_AL = np.arange(positions_A.max() + 1) > positions_A[:, None]
        mask_AL = torch.zeros(hidden_AL.shape, dtype=self._dtype, device=self._device)
        return mask_AL.masked_fill_(self._on_device(hidden_AL), torch.finfo(mask_AL.dtype).min)[:, None, None]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _fill_holes(self) -> None:
        """Move the last slots into holes, so that active slots are contiguous. Rare: new requests fill holes first."""
        for hole in sorted(self._holes, reverse=True):
            self._end -= 1
            last = self._end
            if hole == last:
                continue
            length = int(self._prompt_lengths_S[last] + self._counts_S[last]) - 1
            self._cache.move(last, hole, length)
            # Swapped, not copied: rows stay a permutation, so a freed slot owns a free row.
            self._rows_S[[hole, last]] = self._rows_S[[last, hole]]
            self._responses[hole], self._responses[last] = self._responses[last], None
            for by_slot in (
                self._keys_S,
                self._prompt_lengths_S,
                self._counts_S,
                self._limits_S,
                self._last_ids_S,
                self._is_cached_S,
            ):
                by_slot[hole] = by_slot[last]
        self._holes.clear()

    def _finish(self, slot: int) -> tuple[int, Trajectory]:
        """Free the slot and turn its records into a Trajectory."""
        response = self._responses[slot]
        assert response is not None
        self._responses[slot] = None
        self._holes.append(slot)
        reason: FinishReason = "stop" if self._last_ids_S[slot] == self._eos_id else "length"
        return response.ticket, self._records.trajectory(response, int(self._counts_S[slot]), reason)
