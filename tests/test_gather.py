"""The chunked LM-head gather against the plain computation: value, gradient, dtypes, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from asyncopd.errors import ShapeError
from asyncopd.losses import gather_logprobs
from asyncopd.models.sampling import law_logprobs
from asyncopd.types import LOGPROB_FLOOR


def inputs(
    num_tokens: int = 11, vocab_size: int = 13, hidden_size: int = 5, num_ids: int = 3, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, ids), float64 leaves; ids repeat now and then."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(vocab_size, generator=generator, dtype=torch.float64, requires_grad=True)
    ids_TJ = torch.randint(vocab_size, (num_tokens, num_ids), generator=generator)
    return hidden_TD, weight_VD, bias_V, ids_TJ


def plain(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_TJ: Tensor, temperature: float) -> Tensor:
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V) / temperature
    return torch.log_softmax(logits_TV, -1).gather(-1, ids_TJ)


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    chunk_tokens=st.integers(1, 25),
    num_ids=st.integers(1, 30),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_equal_the_plain_computation(
    num_tokens: int, chunk_tokens: int, num_ids: int, temperature: float, seed: int
) -> None:
    hidden_TD, weight_VD, bias_V, ids_TJ = inputs(num_tokens, num_ids=num_ids, seed=seed)
    found_TJ = gather_logprobs(
        hidden_TD, weight_VD, ids_TJ, bias_V=bias_V, temperature=temperature, chunk_tokens=chunk_tokens
    ).logprobs_TJ
    expected_TJ = plain(hidden_TD, weight_VD, bias_V, ids_TJ, temperature)
    torch.testing.assert_close(found_TJ, expected_TJ, rtol=0, atol=1e-12)
    upstream_TJ = torch.randn_like(expected_TJ)
    leaves = (hidden_TD, weight_VD, bias_V)
    for found, expected in zip(
        torch.autograd.grad(found_TJ, leaves, upstream_TJ),
        torch.autograd.grad(expected_TJ, leaves, upstream_TJ),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_first_columns_are_of_the_truncated_law_where_there_is_one() -> None:
    hidden_TD, weight_VD, bias_V, ids_TJ = inputs(num_ids=6)
    found = gather_logprobs(
        hidden_TD, weight_VD, ids_TJ, bias_V=bias_V, temperature=0.7, top_p=0.6, num_sampled=4, chunk_tokens=3
    )
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V)
    law_TV = law_logprobs(logits_TV, temperature=0.7, top_p=0.6).double()
    expected_TJ = law_TV.gather(-1, ids_TJ[:, :4]).clamp(min=LOGPROB_FLOOR)
    assert (expected_TJ == LOGPROB_FLOOR).any()
    torch.testing.assert_close(found.logprobs_TJ[:, :4], expected_TJ, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        found.logprobs_TJ[:, 4:], plain(hidden_TD, weight_VD, bias_V, ids_TJ[:, 4:], 0.7), rtol=0, atol=1e-12
    )
    entropy_T = -torch.where(law_TV.isfinite(), law_TV.exp() * law_TV, 0.0).sum(-1)
    torch.testing.assert_close(found.entropy_T, entropy_T, rtol=0, atol=1e-6)
    assert not found.entropy_T.requires_grad


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_numerical_derivatives_agree(top_p: float) -> None:
    hidden_TD, weight_VD, bias_V, ids_TJ = inputs(4, 6, 3, 2)
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            gather_logprobs(h, w, ids_TJ, bias_V=b, temperature=0.8, top_p=top_p, chunk_tokens=3).logprobs_TJ
        ),
        (hidden_TD, weight_VD, bias_V),
    )


def test_entropy_is_that_of_the_whole_tempered_distribution_and_carries_no_gradient() -> None:
    hidden_TD, weight_VD, bias_V, ids_TJ = inputs()
    entropy_T = gather_logprobs(hidden_TD, weight_VD, ids_TJ, bias_V=bias_V, temperature=0.7, chunk_tokens=4).entropy_T
    probs_TV = torch.softmax((hidden_TD @ weight_VD.T + bias_V) / 0.7, -1)
    torch.testing.assert_close(entropy_T, -(probs_TV * probs_TV.log()).sum(-1))
    assert not entropy_T.requires_grad


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(wanted: str) -> None:
    hidden_TD, weight_VD, _, ids_TJ = inputs()
    (weight_VD if wanted == "hidden" else hidden_TD).requires_grad_(False)
    gather_logprobs(hidden_TD, weight_VD, ids_TJ, chunk_tokens=4).logprobs_TJ.sum().backward()
    assert (hidden_TD.grad is not None) == (wanted == "hidden")
    assert (weight_VD.grad is not None) == (wanted == "weight")


def test_large_logits_stay_finite_in_float32() -> None:
    hidden_TD = (1000 * torch.eye(4)).requires_grad_()
    found = gather_logprobs(hidden_TD, torch.eye(4, requires_grad=True), torch.arange(4)[:, None].expand(-1, 4))
    found.logprobs_TJ.sum().backward()
    assert torch.isfinite(found.logprobs_TJ).all()
    assert torch.isfinite(found.entropy_T).all()
    assert torch.isfinite(hidden_TD.grad).all()  # type: ignore[arg-type]


def test_no_rows_give_no_rows_and_a_zero_gradient() -> None:
    hidden_TD, weight_VD, _, ids_TJ = inputs(0)
    found = gather_logprobs(hidden_TD, weight_VD, ids_TJ)
    assert found.logprobs_TJ.shape == (0, 3)
    found.logprobs_TJ.sum().backward()
    assert torch.equal(weight_VD.grad, torch.zeros_like(weight_VD))  # type: ignore[arg-type]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_gives_float32_as_good_as_the_plain_head(weight_dtype: torch.dtype) -> None:
    # Reference: the same bf16 numbers in float64. The plain bf16 head itself is off by about 1e-2 here.
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight_VD = (torch.randn(50, 32, generator=generator) / 4).bfloat16().to(weight_dtype).requires_grad_()
    ids_TJ = torch.randint(50, (64, 4), generator=generator)
    exact_hidden_TD = hidden_TD.detach().double().requires_grad_()
    exact_weight_VD = weight_VD.detach().double().requires_grad_()
    found = gather_logprobs(hidden_TD, weight_VD, ids_TJ, chunk_tokens=8)
    assert found.logprobs_TJ.dtype == torch.float32
    assert found.entropy_T.dtype == torch.float32
    exact_TJ = plain(exact_hidden_TD, exact_weight_VD, None, ids_TJ, 1.0)
    torch.testing.assert_close(found.logprobs_TJ.double(), exact_TJ, rtol=0, atol=3e-2)
    found.logprobs_TJ.sum().backward()
    exact_TJ.sum().backward()
    assert weight_VD.grad.dtype == weight_dtype  # type: ignore[union-attr]
    for leaf, exact in ((hidden_TD, exact_hidden_TD), (weight_VD, exact_weight_VD)):
        assert leaf.grad is not None
        assert exact.grad is not None
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert float(error) < 1e-2


def test_late_chunks_are_not_lost_in_a_bfloat16_weight_gradient() -> None:
    # 512 chunks of equal gradient: a bf16 running sum would stop growing at 256 times one chunk.
    hidden_TD = torch.ones(512, 1, dtype=torch.bfloat16)
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    ids_TJ = torch.zeros(512, 1, dtype=torch.int64)
    gather_logprobs(hidden_TD, weight_VD, ids_TJ, chunk_tokens=1).logprobs_TJ.sum().backward()
    assert weight_VD.grad.tolist() == [[256.0], [-256.0]]  # type: ignore[union-attr]


def test_autocast_does_not_change_the_gradient() -> None:
    # Autocast is on in forward and off in backward: the recomputed softmax would be another one.
    hidden_TD, weight_VD, _, ids_TJ = inputs()
    leaves = (hidden_TD.detach().float().requires_grad_(), weight_VD.detach().float().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside_TJ = gather_logprobs(*leaves, ids_TJ, chunk_tokens=4).logprobs_TJ
    outside_TJ = gather_logprobs(*leaves, ids_TJ, chunk_tokens=4).logprobs_TJ
    assert torch.equal(inside_TJ, outside_TJ)


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


def test_no_tensor_of_all_tokens_by_vocabulary_is_ever_made() -> None:
    num_tokens, vocab_size, chunk_tokens = 256, 64, 16
    hidden_TD, weight_VD, bias_V, ids_TJ = inputs(num_tokens, vocab_size, 4, 2)

    def largest(chunk_tokens: int) -> int:
        with _LargestTensor() as largest:
            found = gather_logprobs(hidden_TD, weight_VD, ids_TJ, bias_V=bias_V, chunk_tokens=chunk_tokens)
            found.logprobs_TJ.sum().backward()
        return largest.num_elements

    # hidden [256, 4] and its gradient are as large as a chunk [16, 64].
    assert largest(chunk_tokens) == chunk_tokens * vocab_size
    assert largest(num_tokens) == num_tokens * vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_TJ": torch.zeros(3, 1, dtype=torch.int64)}, "must be \\[T, D\\] and \\[T, J\\]"),
        ({"weight_VD": torch.zeros(13, 6, dtype=torch.float64)}, "must be \\[V, 5\\]"),
        ({"bias_V": torch.zeros(12, dtype=torch.float64)}, "must be \\[13\\]"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens 0"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, object], message: str) -> None:
    hidden_TD, weight_VD, bias_V, ids_TJ = inputs()
    arguments = {"hidden_TD": hidden_TD, "weight_VD": weight_VD, "ids_TJ": ids_TJ, "bias_V": bias_V, **change}
    with pytest.raises(ShapeError, match=message):
        gather_logprobs(**arguments)  # type: ignore[arg-type]
