"""Packing: layout, alignment, and equality of packed rows with one sequence per row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_models import FAMILIES, VOCAB_SIZE, law_rows, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncopd.errors import ShapeError
from asyncopd.models.causal_lm import output_embedding, packed_hidden
from asyncopd.models.packing import FILL_ID, TokenPair, pack, pad


def sequences(*lengths: tuple[int, int], vocab_size: int = VOCAB_SIZE) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, vocab_size, prompt).astype(np.int32), rng.integers(0, vocab_size, response).astype(np.int32))
        for prompt, response in lengths
    ]


def test_layout_and_alignment_golden() -> None:
    # Cells needed: 3, 4, 2. Decreasing first fit with 6 cells: row 0 holds the second, then the third; row 1 the first.
    pairs = [
        (np.array([11, 12]), np.array([13, 14])),
        (np.array([21]), np.array([22, 23, 24, 25])),
        (np.array([31, 32]), np.array([33])),
    ]
    packed = pack(pairs, capacity=6)
    assert packed.ids_RC.tolist() == [[21, 22, 23, 24, 31, 32], [11, 12, 13, FILL_ID, FILL_ID, FILL_ID]]
    assert packed.positions_RC.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert packed.segments_RC.tolist() == [[1, 1, 1, 1, 2, 2], [0, 0, 0, -1, -1, -1]]
    # 13 is predicted at 12, 14 at 13; then 22 ... 25 from 21 on; then 33 at 32.
    assert packed.predict_rows_T.tolist() == [7, 8, 0, 1, 2, 3, 5]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=30),
    st.integers(28, 60),
)
def test_every_prediction_sees_exactly_its_own_prefix(lengths: list[tuple[int, int]], capacity: int) -> None:
    pairs = sequences(*lengths)
    packed = pack(pairs, capacity, share_prompts=False)
    assert packed.ids_RC.shape[1] <= capacity
    ids, positions, segments = packed.ids_RC.ravel(), packed.positions_RC.ravel(), packed.segments_RC.ravel()
    predictions = iter(packed.predict_rows_T)
    for number, (prompt, response) in enumerate(pairs):
        for end in range(len(response)):
            row = next(predictions)
            prefix = np.concatenate([prompt, response[:end]])
            cells = slice(row - len(prefix) + 1, row + 1)
            assert ids[cells].tolist() == prefix.tolist()
            assert positions[cells].tolist() == list(range(len(prefix)))
            assert set(segments[cells]) == {number}
    assert next(predictions, None) is None
    assert (segments >= 0).sum() == sum(prompt + response - 1 for prompt, response in lengths)


def test_packing_wastes_less_than_padding() -> None:
    pairs = sequences(*[(3, int(n)) for n in np.random.default_rng(1).geometric(1 / 12, 100)])
    assert pack(pairs, 128).ids_RC.size < 0.4 * pad(pairs).ids_RC.size


def test_a_shared_prompt_is_laid_out_once() -> None:
    first, second = np.array([11, 12]), np.array([21])
    pairs = [
        (first, np.array([13, 14])),
        (first.copy(), np.array([15])),
        (first, np.array([16, 17, 18])),
        (second, np.array([22])),
    ]
    packed = pack(pairs, capacity=8)
    assert packed.ids_RC.tolist() == [[11, 12, 13, 16, 17, 21]]
    assert packed.positions_RC.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert packed.segments_RC.tolist() == [[4, 4, 0, 2, 2, 3]]
    assert packed.prefixes_RC.tolist() == [[-2, -2, 4, 4, 4, -2]]
    assert packed.prompts_S.tolist() == [4, 4, 4, 3]
    # 13 at 12, 14 at 13; 15 at 12; 16 at 12, 17 at 16, 18 at 17; 22 at 21.
    assert packed.predict_rows_T.tolist() == [1, 2, 1, 1, 3, 4, 5]
    # Where they do not fit one row together, each row has its copy.
    assert (pack(pairs, capacity=4).ids_RC == 11).sum() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_change_neither_values_nor_gradients(family: str) -> None:
    model = tiny_model(family)
    alone = sequences((5, 7), (5, 1), (5, 12), (2, 4), (9, 3), (9, 6))
    pairs = [(alone[first][0], response) for (_, response), first in zip(alone, (0, 0, 0, 3, 4, 4), strict=True)]
    hidden, gradients = {}, {}
    for name, packed in (("shared", pack(pairs, 40)), ("padded", pad(pairs))):
        model.zero_grad()
        hidden[name] = packed_hidden(model, packed)
        hidden[name].square().sum().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (hidden["shared"] - hidden["padded"]).abs().max() < 3e-6
    scale = gradients["padded"].abs().max()
    assert (gradients["shared"] - gradients["padded"]).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_hidden_equals_padded_in_value_and_gradient(family: str) -> None:
    model = tiny_model(family)
    pairs = sequences((2, 5), (1, 30), (6, 1), (3, 12), (4, 4), (1, 1))
    hidden, gradients = {}, {}
    for name, packed in (("packed", pack(pairs, 40)), ("padded", pad(pairs))):
        model.zero_grad()
        hidden[name] = packed_hidden(model, packed)
        hidden[name].square().sum().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (hidden["packed"] - hidden["padded"]).abs().max() < 3e-6
    scale = gradients["padded"].abs().max()
    assert (gradients["packed"] - gradients["padded"]).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_each_sequence_alone(family: str) -> None:
    model = tiny_model(family)
    pairs = sequences((2, 5), (1, 30), (6, 1), (3, 12))
    weight_VD, bias_V = output_embedding(model)
    with torch.no_grad():
        logits_TV = torch.nn.functional.linear(packed_hidden(model, pack(pairs, 40)), weight_VD, bias_V)
    alone_TV = np.concatenate([law_rows(model, prompt, response) for prompt, response in pairs])
    np.testing.assert_allclose(logits_TV.log_softmax(-1).numpy(), alone_TV, atol=2e-5)


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ShapeError, match="no sequence"):
        pack([], 8)
    with pytest.raises(ShapeError, match="sequence 1 needs 12 cells"):
        pack(sequences((2, 3), (5, 8)), 11)
    with pytest.raises(ShapeError, match="sequence 1 has 0 prompt"):
        pack(sequences((2, 3), (0, 4)), 8)
    with pytest.raises(ShapeError, match="0 response"):
        pad(sequences((2, 0)))
