"""A delta gives back the new weights bit for bit, whatever the bits are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import storage.weight_delta
from asyncopd.errors import ShardCorruptError
from asyncopd.models.causal_lm import load_safetensors, to_safetensors
from asyncopd.models.load import architecture_of_size, build_causal_lm
from storage.weight_delta import apply_delta, encode_delta

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
)
NAN_PAYLOADS = (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0x80000000, 0x00000000, 0x7F800000, 0x00000001)
"""float32 bits: quiet, negative and signalling NaNs, −0, +0, infinity, the smallest subnormal."""


def applied(base: bytes, delta: bytes) -> bytes:
    body = bytearray(base)
    apply_delta(body, delta)
    return bytes(body)


def from_bits(words: NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    # torch refuses another dtype's view of nothing.
    return torch.from_numpy(words.flatten()).view(dtype) if words.size else torch.empty(0, dtype=dtype)


@dataclass(frozen=True)
class Pair:
    """Two models of one architecture, serialised, and how many of their elements differ."""

    old: bytes
    new: bytes
    num_changed: int


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Random bits in both, of which any part differs."""
    old: dict[str, torch.Tensor] = {}
    new: dict[str, torch.Tensor] = {}
    num_changed = 0
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        count = math.prod(shape)
        size = torch.empty(0, dtype=dtype).element_size()
        before = rng.integers(0, 2 if dtype == torch.bool else 256, (count, size), dtype=np.uint8)
        is_changed = rng.random(count) < draw(st.sampled_from((0.0, 0.05, 0.5, 1.0)))
        after = np.where(is_changed[:, None], rng.permutation(before), before)
        num_changed += int((before != after).any(axis=1).sum())
        for tensors, words in ((old, before), (new, after)):
            tensors[f"layer.{number}"] = from_bits(words, dtype).reshape(shape)
    return Pair(safetensors.torch.save(old), safetensors.torch.save(new), num_changed)


@settings(max_examples=300, deadline=None)
@given(pairs())
def test_weights_of_any_bits_come_back(pair: Pair) -> None:
    delta = encode_delta(pair.old, pair.new)
    assert delta is not None
    assert applied(pair.old, delta.body) == pair.new
    assert delta.num_changed == pair.num_changed


@pytest.mark.parametrize("old_bits", NAN_PAYLOADS)
def test_nan_payloads_and_signed_zeros_are_bits_like_any_others(old_bits: int) -> None:
    # NaN != NaN and −0.0 == +0.0 as floats: both would be lost by comparing values.
    base = {"w": np.full(len(NAN_PAYLOADS), old_bits, "<u4").view("<f4")}
    new = {"w": np.array(NAN_PAYLOADS, "<u4").view("<f4")}
    before, after = safetensors.numpy.save(base), safetensors.numpy.save(new)
    delta = encode_delta(before, after)
    assert delta is not None
    assert delta.num_changed == len(NAN_PAYLOADS) - 1
    assert applied(before, delta.body) == after


def test_gaps_and_tensors_beyond_one_block_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.weight_delta, "BLOCK", 70_000)
    old = np.zeros(200_001, "<u2")
    new = old.copy()
    new[[0, 299, 66_000, 69_999, 70_000, 140_000, 200_000]] = [1, 65_535, 32_768, 7, 8, 9, 10]
    base, changed = safetensors.numpy.save({"w": old}), safetensors.numpy.save({"w": new})
    delta = encode_delta(base, changed)
    assert delta is not None
    assert delta.num_changed == 7
    assert applied(base, delta.body) == changed


def test_equal_weights_make_an_empty_delta() -> None:
    body = safetensors.numpy.save({"w": np.ones(5, "f4")})
    delta = encode_delta(body, body)
    assert delta is not None
    assert (delta.num_changed, applied(body, delta.body)) == (0, body)


@pytest.mark.parametrize(
    "other",
    [{"w": np.ones(6, "f4")}, {"w": np.ones(5, "f8")}, {"v": np.ones(5, "f4")}, {"w": np.ones((5, 1), "f4")}],
    ids=["size", "dtype", "name", "shape"],
)
def test_weights_of_another_architecture_have_no_delta(other: dict[str, NDArray[np.generic]]) -> None:
    assert encode_delta(safetensors.numpy.save({"w": np.ones(5, "f4")}), safetensors.numpy.save(other)) is None


def test_a_delta_of_another_model_is_refused() -> None:
    base, new = (safetensors.numpy.save({"w": np.full(5, value, "f4")}) for value in (1, 2))
    delta = encode_delta(base, new)
    assert delta is not None
    with pytest.raises(ShardCorruptError, match="tensor w, which its base lacks"):
        apply_delta(bytearray(safetensors.numpy.save({"v": np.ones(5, "f4")})), delta.body)


def test_tied_bfloat16_weights_reach_a_sampler_through_a_delta() -> None:
    architecture = architecture_of_size(
        num_layers=1, hidden_size=16, num_heads=2, vocab_size=17, max_positions=32, eos_id=1, pad_id=0
    )
    learner, sampler = (build_causal_lm(architecture, seed=seed) for seed in (0, 1))
    before = to_safetensors(learner, torch.bfloat16)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 1e-4 * torch.randn_like(parameter)
    after = to_safetensors(learner, torch.bfloat16)
    delta = encode_delta(before, after)
    assert delta is not None
    assert 0 < delta.num_changed < sum(parameter.numel() for parameter in learner.parameters())
    load_safetensors(sampler, applied(before, delta.body))
    assert sampler.lm_head.weight is sampler.transformer.wte.weight
    for name, weights in learner.named_parameters():
        assert torch.equal(sampler.get_parameter(name), weights.bfloat16().float()), name
