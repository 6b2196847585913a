"""Per-slot key-value cache and the attention that reads it: one forward pass decodes all slots and prefills new ones.

A pass sees one flat row of tokens (transformers' `AttentionInterface` is the only hook):

    [ slot 0 | slot 1 | ... | slot A-1 | prefill row 0 ........ | prefill row 1 ........ | ... ]
      one new token per slot:            packed prompts: attend to their own segment,
      attends to the slot's buffers      and their keys and values are scattered into slots

Nothing is padded to the longest response, and finishing a response frees its slot without touching the others.
Suffixes: S slots, A decoding slots, G key-value heads, H heads, L cached positions, R·C prefill cells, N all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "asyncopd_slots"


class SlotCache:
    """Key and value buffers [S + 1, G, L_max, head_dim] per layer, allocated when the first keys show their shape."""

    def __init__(self, num_slots: int, max_context: int) -> None:
        self.scratch_slot = num_slots
        """Takes what belongs nowhere (padding, slots that wait for their prefill); never read."""
        self.max_context = max_context
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like_GND: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer. Zeros at first: masked positions still enter a product, so must be finite."""
        if number not in self._buffers:
            shape = (self.scratch_slot + 1, like_GND.shape[0], self.max_context, like_GND.shape[-1])
            self._buffers[number] = (like_GND.new_zeros(shape), like_GND.new_zeros(shape))
        return self._buffers[number]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another's."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]


@dataclass
class PassPlan:
    """Where the tokens of one forward pass belong; handed through the model to `slot_attention`."""

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
    layers_seen: set[int] = field(default_factory=set)
    """Filled during the pass: proof that the model really attends through this plan."""


def slot_attention(
    module: torch.nn.Module,
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    plan: PassPlan,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers attention function: cache the pass's keys and values, attend by slot and by packed row.

    Returns:
        ([1, N, H, head_dim], None), as the interface wants.
    """
    query_HND, key_GND, value_GND = query_1HND[0], key_1GND[0], value_1GND[0]
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys_SGLD, values_SGLD = plan.cache.layer(layer, key_GND)
    plan.layers_seen.add(layer)
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


AttentionInterface.register(ATTENTION_NAME, slot_attention)
