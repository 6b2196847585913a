"""Where token sequences become rows of a model's input, and where logits are aligned with the tokens they predict.

Every forward pass over whole sequences (learner, scorer, prefill) takes its ids, positions and prediction rows from
here, so the alignment contract (row t speaks about the distribution that produced `response_ids[t]`) lives in one
place. Suffixes: R rows, C columns of a row, S sequences, T response tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import ShapeError
from asyncopd.types import IntArray

TokenPair = tuple[IntArray, IntArray]
"""(prompt_ids [P], response_ids [T]) of one sequence, P >= 1 and T >= 1."""
FILL_ID = 0
"""What padding cells hold; no sequence ever attends to them, so any valid id would do."""


@dataclass(frozen=True)
class PackedTokens:
    """Sequences laid into rows for one block-diagonal causal forward pass, and where its predictions are."""

    ids_RC: NDArray[np.int64]
    """[R, C] token ids; `FILL_ID` in padding. A sequence holds prompt and response without the last response
    token, after which nothing is predicted."""
    positions_RC: NDArray[np.int64]
    """[R, C] position inside the sequence, from 0; 0 in padding."""
    segments_RC: NDArray[np.int64]
    """[R, C] which sequence of the argument a cell belongs to; −1 is padding."""
    predict_rows_T: NDArray[np.int64]
    """[T] flat index r·C + c of the cell whose output predicts each response token: first all tokens of the
    first sequence, then of the second, and so on, whatever the rows look like."""


def pack(sequences: Sequence[TokenPair], capacity: int) -> PackedTokens:
    """Lay sequences into as few rows as first-fit-decreasing finds; deterministic.

    Args:
        sequences: prompt and response ids; a sequence occupies P + T − 1 cells.
        capacity: most cells in a row. The rows are as wide as the fullest one, which may be less.
    Raises:
        ShapeError: no sequence, an empty prompt or response, or a sequence longer than `capacity`.
    """
    lengths_S = _lengths(sequences)
    longest = int(lengths_S.argmax())
    if lengths_S[longest] > capacity:
        raise ShapeError(
            f"sequence {longest} needs {lengths_S[longest]} cells (prompt + response − 1) and a row has {capacity}. "
            "Raise the row capacity or lower the response limit."
        )
    rows_S = np.zeros(len(sequences), np.int64)
    starts_S = np.zeros(len(sequences), np.int64)
    used_R = np.zeros(len(sequences), np.int64)
    # Stable: equal lengths keep their order, so the layout is a function of the argument alone.
    for sequence in np.argsort(-lengths_S, kind="stable"):
        row = int(np.argmax(used_R + lengths_S[sequence] <= capacity))
        rows_S[sequence], starts_S[sequence] = row, used_R[row]
        used_R[row] += lengths_S[sequence]
    return _lay_out(sequences, lengths_S, rows_S, starts_S)


def pad(sequences: Sequence[TokenPair]) -> PackedTokens:
    """One sequence per row, padded on the right to the longest: what packing must be equal to.

    Raises:
        ShapeError: no sequence, or an empty prompt or response.
    """
    rows_S = np.arange(len(sequences))
    return _lay_out(sequences, _lengths(sequences), rows_S, np.zeros_like(rows_S))


def _lengths(sequences: Sequence[TokenPair]) -> NDArray[np.int64]:
    """[S] cells each sequence occupies; checks that there is something to predict and something to predict from."""
    if not sequences:
        raise ShapeError("there is no sequence to lay out; pass at least one (prompt_ids, response_ids) pair.")
    for number, (prompt_ids, response_ids) in enumerate(sequences):
        if len(prompt_ids) == 0 or len(response_ids) == 0:
            raise ShapeError(
                f"sequence {number} has {len(prompt_ids)} prompt and {len(response_ids)} response tokens; "
                "both need at least one."
            )
    return np.array([len(prompt_ids) + len(response_ids) - 1 for prompt_ids, response_ids in sequences], np.int64)


def _lay_out(
    sequences: Sequence[TokenPair],
    lengths_S: NDArray[np.int64],
    rows_S: NDArray[np.int64],
    starts_S: NDArray[np.int64],
) -> PackedTokens:
    """Fill the cells [start, start + length) of each sequence's row."""
    num_rows, num_columns = int(rows_S.max()) + 1, int((starts_S + lengths_S).max())
    # Cell numbers of all sequence tokens, one sequence after the other.
    first_cells_S = rows_S * num_columns + starts_S
    offsets = np.arange(lengths_S.sum()) - np.repeat(np.cumsum(lengths_S) - lengths_S, lengths_S)
    cells = np.repeat(first_cells_S, lengths_S) + offsets

    ids = np.full(num_rows * num_columns, FILL_ID, np.int64)
    positions = np.zeros_like(ids)
    segments = np.full_like(ids, -1)
    ids[cells] = np.concatenate([part for prompt, response in sequences for part in (prompt, response[:-1])])
    positions[cells] = offsets
    segments[cells] = np.repeat(np.arange(len(sequences)), lengths_S)

    prompt_lengths_S = np.array([len(prompt_ids) for prompt_ids, _ in sequences], np.int64)
    is_prediction = offsets >= np.repeat(prompt_lengths_S - 1, lengths_S)
    shape = (num_rows, num_columns)
    return PackedTokens(
        ids_RC=ids.reshape(shape),
        positions_RC=positions.reshape(shape),
        segments_RC=segments.reshape(shape),
        predict_rows_T=cells[is_prediction],
    )
