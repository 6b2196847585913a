"""Per-slot key-value cache and the attention that reads it: one forward pass decodes all slots and prefills new ones.

A pass sees one flat row of tokens (transformers' `AttentionInterface` is the only hook):

    [ slot 0 | slot 1 | ... | slot A-1 | prefill row 0 ........ | prefill row 1 ........ | ... ]
      one new token per slot:            packed prompts: attend to their own segment,
      attends to the slot's buffers      and their keys and values are scattered into slots

Nothing is padded to the longest response, and finishing a response frees its slot without touching the others. This
module owns the model, its attention and the cache, and knows nothing about requests. Suffixes: S slots, A decoding
slots, U sequences to prefill, G key-value heads, H heads, L cached positions, R·C prefill cells, N all tokens of a
pass, D hidden, V vocabulary.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.causal_lm import block_causal_mask, load_safetensors, num_ids, output_embedding, packed_hidden
from asyncopd.models.packing import PackedTokens, pack

ATTENTION_NAME = "asyncopd_slots"


class SlotCache:
    """Key and value buffers [S + 1, G, L_max, head_dim] per layer, allocated when the first ones show their shape, in
    which heads of keys and values may differ."""

    def __init__(self, num_slots: int, max_context: int) -> None:
        self.scratch_slot = num_slots
        """Takes what belongs nowhere (padding, slots that wait for their prefill); never read."""
        self.max_context = max_context
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Layers that have attended through the cache."""
        return len(self._buffers)

    def layer(self, number: int, key_GND: Tensor, value_GND: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer. Zeros at first: masked positions still enter a product, so must be finite."""
        if number not in self._buffers:

            def zeros(like_GND: Tensor) -> Tensor:
                return like_GND.new_zeros(
                    self.scratch_slot + 1, like_GND.shape[0], self.max_context, like_GND.shape[-1]
                )

            self._buffers[number] = (zeros(key_GND), zeros(value_GND))
        return self._buffers[number]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another's."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]


@dataclass(frozen=True)
class PassPlan:
    """Where the tokens of one forward pass belong; `slot_attention` finds it in `_PLAN`."""

    cache: SlotCache
    num_decode: int
    """The first tokens of the pass: one per slot 0 ... num_decode−1."""
    decode_mask_A11L: Tensor | None
    """Additive; which cached positions each slot may see, its new token included."""
    prefill_mask_R1CC: Tensor | None
    """Additive block-causal mask of the packed rows behind the decode tokens."""
    slots_N: Tensor
    positions_N: Tensor
    """Where the keys and values of each token of the pass are cached."""


# Not an argument: some architectures do not hand theirs through to their attention.
_PLAN: ContextVar[PassPlan] = ContextVar("plan")


def slot_attention(
    module: torch.nn.Module,
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers attention function: cache the pass's keys and values, attend by slot and by packed row.

    Returns:
        ([1, N, H, head_dim], None), as the interface wants.
    """
    plan = _PLAN.get()
    query_HND, key_GND, value_GND = query_1HND[0], key_1GND[0], value_1GND[0]
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys_SGLD, values_SGLD = plan.cache.layer(layer, key_GND, value_GND)
    for buffer, new_GND in ((keys_SGLD, key_GND), (values_SGLD, value_GND)):
        buffer[plan.slots_N, :, plan.positions_N] = new_GND.transpose(0, 1)

    parts = []
    if plan.decode_mask_A11L is not None:
        window = (slice(0, plan.num_decode), slice(None), slice(0, plan.decode_mask_A11L.shape[-1]))
        parts.append(
            _attend_slots(
                query_HND[:, : plan.num_decode], keys_SGLD[window], values_SGLD[window], plan.decode_mask_A11L, scaling
            )
        )
    if plan.prefill_mask_R1CC is not None:
        prefill = slice(plan.num_decode, None)
        parts.append(
            _attend_rows(
                query_HND[:, prefill], key_GND[:, prefill], value_GND[:, prefill], plan.prefill_mask_R1CC, scaling
            )
        )
    output_NHD = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output_NHD[None], None


def _attend_slots(
    query_HAD: Tensor, keys_AGLD: Tensor, values_AGLD: Tensor, mask_A11L: Tensor, scaling: float | None
) -> Tensor:
    """[A, H, head_dim]. Heads that share keys are laid side by side as if they were query positions."""
    num_slots, num_kv_heads = keys_AGLD.shape[:2]
    query = query_HAD.transpose(0, 1).reshape(num_slots, num_kv_heads, -1, query_HAD.shape[-1])
    output = scaled_dot_product_attention(query, keys_AGLD, values_AGLD, attn_mask=mask_A11L, scale=scaling)
    return output.reshape(num_slots, query_HAD.shape[0], -1)


def _attend_rows(
    query_HPD: Tensor, key_GPD: Tensor, value_GPD: Tensor, mask_R1CC: Tensor, scaling: float | None
) -> Tensor:
    """[P, H, head_dim] for the P = R·C cells of packed rows."""
    num_rows, num_columns = mask_R1CC.shape[0], mask_R1CC.shape[-1]
    num_groups = query_HPD.shape[0] // key_GPD.shape[0]
    query, key, value = (
        states.reshape(states.shape[0], num_rows, num_columns, -1).transpose(0, 1)
        for states in (
            query_HPD,
            key_GPD.repeat_interleave(num_groups, dim=0),
            value_GPD.repeat_interleave(num_groups, dim=0),
        )
    )
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask_R1CC, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1)


def first_slots(packed: PackedTokens, slots_U: NDArray[np.int64]) -> NDArray[np.int64]:
    """[U] for each packed sequence the slot that its prompt's keys and values are written to."""
    if packed.prompts_S.max() < len(slots_U):
        return slots_U
    _, first, group = np.unique(packed.prompts_S, return_index=True, return_inverse=True)
    return slots_U[first[group]]


AttentionInterface.register(ATTENTION_NAME, slot_attention)


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
        expected_1D = _own_hidden(model)
        model.set_attn_implementation(ATTENTION_NAME)
        self.vocab_size = num_ids(model)
        self.cache = SlotCache(num_slots, max_context)
        self._model, self._num_layers = model.eval(), int(model.config.num_hidden_layers)
        # Kept, because the model finds them by walking its parameters, and a step asks many times.
        self._device, self._dtype = model.device, model.dtype
        self._weight_VD, self._bias_V = output_embedding(model)
        # Slot attention has its own masks. A 4-D one is handed through as it is, and stops models from making theirs.
        self._no_mask_1111 = torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=self._device)
        self._try_attention(expected_1D)

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
            # By segment: sequences, then shared prompts, which go to their first sequence's slot; padding, −1, is last.
            slot_of = np.full(max(int(segments.max()), len(slots_U) - 1) + 2, self.cache.scratch_slot)
            slot_of[packed.prompts_S] = first_slots(packed, slots_U)
            slot_of[: len(slots_U)] = slots_U
            slots = np.concatenate([slots, slot_of[segments]])
            prefill_mask = block_causal_mask(packed, self._dtype, self._device)
        position_ids_N = self.on_device(positions)
        _PLAN.set(
            PassPlan(
                cache=self.cache,
                num_decode=num_decode,
                decode_mask_A11L=decode_mask,
                prefill_mask_R1CC=prefill_mask,
                slots_N=self.on_device(slots),
                positions_N=position_ids_N,
            )
        )
        output = self._model.base_model(
            input_ids=self.on_device(ids)[None],
            position_ids=position_ids_N[None],
            attention_mask=self._no_mask_1111,
            use_cache=False,
        )
        hidden_ND: Tensor = output.last_hidden_state[0]
        if packed is None:
            return hidden_ND
        return hidden_ND[self.on_device(np.concatenate([np.arange(num_decode), num_decode + packed.predict_rows_T]))]

    def on_device(self, array: NDArray[Any]) -> Tensor:
        """The array as a tensor beside the model."""
        return torch.from_numpy(array).to(self._device)

    def _decode_mask(self, positions_A: NDArray[np.int64]) -> Tensor:
        """[A, 1, 1, L] additive; each slot sees its cached positions and the one being written."""
        hidden_AL = np.arange(positions_A.max() + 1) > positions_A[:, None]
        mask_AL = torch.zeros(hidden_AL.shape, dtype=self._dtype, device=self._device)
        return mask_AL.masked_fill_(self.on_device(hidden_AL), torch.finfo(self._dtype).min)[:, None, None]

    @torch.inference_mode()
    def _try_attention(self, expected_1D: Tensor) -> None:
        """Prefill two tokens and decode a third, so that a model that cannot be served says so now; allocates the
        cache."""
        kind = self._model.config.model_type
        packed = pack([(_TRIED_IDS[:2], _TRIED_IDS[2:])], capacity=2)
        self.forward_pass(np.zeros(0, np.int64), np.zeros(0, np.int64), packed, np.zeros(1, np.int64))
        if self.cache.num_layers != self._num_layers:
            raise EngineError(
                f"{kind}: {self.cache.num_layers} of {self._num_layers} layers attend through transformers' "
                "AttentionInterface, so the slot cache cannot serve it. Use a Llama-, Qwen- or GPT-2-like student "
                "(docs/models.md)."
            )
        found_1D = self.forward_pass(_TRIED_IDS[2:].astype(np.int64), np.array([2]), None, np.zeros(0, np.int64))
        difference, scale = (each.abs().max().item() for each in (found_1D - expected_1D, expected_1D))
        # NaN fails too.
        if not difference <= (1e-3 if self._dtype == torch.float32 else 0.1) * scale + 1e-6:
            raise EngineError(
                f"{kind}: hidden states through the slot cache differ by {difference:.2g} from the model's own (at "
                f"most {scale:.2g}). Its attention is more than one softmax over keys and values per layer; it can be "
                "no student. Use a Llama-, Qwen- or GPT-2-like one (docs/models.md)."
            )


_TRIED_IDS = np.array([1, 0, 1], np.int32)


@torch.inference_mode()
def _own_hidden(model: PreTrainedModel) -> Tensor:
    """[1, D] hidden state after `_TRIED_IDS`, by the attention that the model has."""
    return packed_hidden(model.eval(), pack([(_TRIED_IDS, np.zeros(1, np.int32))], capacity=3))
