"""A causal language model with its cache by slot: one pass decodes one token per slot and prefills new sequences.

Owns the model, its attention and the cache; knows nothing about requests. Suffixes: A decoding slots, U sequences to
prefill, N tokens of a pass, L cached positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.modeling import block_causal_mask, load_safetensors, output_embedding
from asyncopd.packing import PackedTokens, pack
from asyncopd.rollout.slots import ATTENTION_NAME, PassPlan, SlotCache


class SlotModel:
    """Forward passes over slots. Passes must run under `torch.inference_mode`."""

    def __init__(self, model: PreTrainedModel, *, num_slots: int, max_context: int) -> None:
        """Takes ownership of `model`, whose attention is replaced.

        Raises:
            EngineError: `max_context` beyond the model's positions, or an attention that cannot be replaced.
        """
        positions = getattr(model.config, "max_position_embeddings", max_context)
        if max_context > positions or num_slots < 1:
            raise EngineError(
                f"max_context {max_context} must be at most the model's {positions} positions, "
                f"and {num_slots} slots at least 1."
            )
        model.set_attn_implementation(ATTENTION_NAME)
        self.vocab_size = int(model.config.vocab_size)
        self.cache = SlotCache(num_slots, max_context)
        self._model, self._num_layers = model.eval(), int(model.config.num_hidden_layers)
        # Kept, because the model finds them by walking its parameters, and a step asks many times.
        self._device, self._dtype = model.device, model.dtype
        self._weight_VD, self._bias_V = output_embedding(model)
        # Slot attention has its own masks. A 4-D one is handed through as it is, and stops models from making theirs.
        self._no_mask_1111 = torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=self._device)
        self._try_attention()

    def load(self, safetensors: bytes) -> None:
        """Other weights; what the cache holds is then outdated.

        Raises:
            EngineError: they do not fit; nothing changed.
        """
        load_safetensors(self._model, safetensors)

    def logits(self, hidden_AD: Tensor) -> Tensor:
        """[A, V] in the model's dtype."""
        return torch.nn.functional.linear(hidden_AD, self._weight_VD, self._bias_V)

    def forward_pass(
        self,
        ids_A: NDArray[np.int64],
        positions_A: NDArray[np.int64],
        packed: PackedTokens | None,
        slots_U: NDArray[np.int64],
    ) -> Tensor:
        """Decode slots 0 ... A−1 and prefill `packed` into the slots `slots_U`, in one pass.

        Args:
            ids_A: the newest token of each slot, to be cached and attended from.
            positions_A: its position; −1 is a slot whose cache is not made yet, which is computed and thrown away.
            packed: sequences to prefill, each with one prediction: its last token's. None for none.
            slots_U: the slot of each of these sequences.
        Returns:
            [A + U, D] hidden states that predict the next token: of the decoding slots, then of the prefilled ones.
        """
        num_decode = len(ids_A)
        is_cached_A = positions_A >= 0
        ids, positions = ids_A, np.maximum(positions_A, 0)
        slots = np.where(is_cached_A, np.arange(num_decode), self.cache.scratch_slot)
        decode_mask = self._decode_mask(positions) if num_decode else None
        prefill_mask = None
        if packed is not None:
            segments = packed.segments_RC.ravel()
            ids = np.concatenate([ids, packed.ids_RC.ravel()])
            positions = np.concatenate([positions, packed.positions_RC.ravel()])
            # Segment −1, padding, selects the last element.
            slots = np.concatenate([slots, np.append(slots_U, self.cache.scratch_slot)[segments]])
            prefill_mask = block_causal_mask(self.on_device(packed.segments_RC), self._dtype)
        position_ids_N = self.on_device(positions)
        plan = PassPlan(
            cache=self.cache,
            num_decode=num_decode,
            decode_mask_A11L=decode_mask,
            prefill_mask_R1CC=prefill_mask,
            slots_N=self.on_device(slots),
            positions_N=position_ids_N,
        )
        hidden_ND = self._run(self.on_device(ids), position_ids_N, plan)
        if packed is None:
            return hidden_ND
        return hidden_ND[self.on_device(np.concatenate([np.arange(num_decode), num_decode + packed.predict_rows_T]))]

    def on_device(self, array: NDArray[Any]) -> Tensor:
        """The array as a tensor beside the model."""
        return torch.from_numpy(array).to(self._device)

    def _run(self, ids_N: Tensor, position_ids_N: Tensor, plan: PassPlan) -> Tensor:
        output = self._model.base_model(
            input_ids=ids_N[None],
            position_ids=position_ids_N[None],
            attention_mask=self._no_mask_1111,
            use_cache=False,
            plan=plan,
        )
        hidden_ND: Tensor = output.last_hidden_state[0]
        return hidden_ND

    def _decode_mask(self, positions_A: NDArray[np.int64]) -> Tensor:
        """[A, 1, 1, L] additive; each slot sees its cached positions and the one being written."""
        hidden_AL = np.arange(positions_A.max() + 1) > positions_A[:, None]
        mask_AL = torch.zeros(hidden_AL.shape, dtype=self._dtype, device=self._device)
        return mask_AL.masked_fill_(self.on_device(hidden_AL), torch.finfo(self._dtype).min)[:, None, None]

    @torch.inference_mode()
    def _try_attention(self) -> None:
        """Prefill one token, so that a model that cannot be served says so now; allocates the cache."""
        one_token = pack([(np.zeros(1, np.int32), np.zeros(1, np.int32))], capacity=1)
        plan = PassPlan(
            cache=self.cache,
            num_decode=0,
            decode_mask_A11L=None,
            prefill_mask_R1CC=block_causal_mask(self.on_device(one_token.segments_RC), self._dtype),
            slots_N=self.on_device(np.array([self.cache.scratch_slot])),
            positions_N=self.on_device(np.array([0])),
        )
        reason = ""
        try:
            self._run(self.on_device(one_token.ids_RC.ravel()), plan.positions_N, plan)
        except TypeError as error:
            reason = f": {error}"
        if reason or len(plan.layers_seen) != self._num_layers:
            raise EngineError(
                f"{self._model.config.model_type}: {len(plan.layers_seen)} of {self._num_layers} layers attend through "
                f"transformers' AttentionInterface, so the slot cache cannot serve it{reason}. "
                "Use a Llama-, Qwen- or GPT-2-like student."
            )
