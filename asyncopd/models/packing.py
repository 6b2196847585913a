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
NO_PREFIX = -2
"""In `prefixes_RC` of cells whose sequence shares no prompt; no segment has this number."""


@dataclass(frozen=True)
class PackedTokens:
    """Sequences laid into rows for one block-diagonal causal forward pass, and where its predictions are."""

    ids_RC: NDArray[np.int64]
    """[R, C] token ids; `FILL_ID` in padding. A sequence holds prompt and response without the last response
    token, after which nothing is predicted."""
    positions_RC: NDArray[np.int64]
    """[R, C] position inside the sequence, from 0; 0 in padding."""
    segments_RC: NDArray[np.int64]
    """[R, C] which sequence of the argument a cell belongs to; −1 is padding. A prompt that several sequences share is
    a segment of its own, numbered behind the sequences."""
    prefixes_RC: NDArray[np.int64]
    """[R, C] the segment of the shared prompt that a cell's sequence continues; −2 where there is none."""
    prompts_S: NDArray[np.int64]
    """[S] the segment that a sequence's prompt is in: its own number, or that of the shared prompt."""
    predict_rows_T: NDArray[np.int64]
    """[T] flat index r·C + c of the cell whose output predicts each response token: first all tokens of the
    first sequence, then of the second, and so on, whatever the rows look like."""


def pack(sequences: Sequence[TokenPair], capacity: int, *, share_prompts: bool = True) -> PackedTokens:
    """Lay sequences into as few rows as first-fit-decreasing finds; deterministic.

    Args:
        sequences: prompt and response ids; a sequence occupies P + T − 1 cells.
        capacity: most cells in a row. The rows are as wide as the fullest one, which may be less.
        share_prompts: consecutive sequences with equal prompts stand behind one copy of it, where they fit a row.
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
    units, lengths_U = _units(sequences, lengths_S, capacity if share_prompts else 0)
    rows_U = np.zeros(len(units), np.int64)
    starts_U = np.zeros(len(units), np.int64)
    used_R = np.zeros(len(units), np.int64)
    # Stable: equal lengths keep their order, so the layout is a function of the argument alone.
    for unit in np.argsort(-lengths_U, kind="stable"):
        row = int(np.argmax(used_R + lengths_U[unit] <= capacity))
        rows_U[unit], starts_U[unit] = row, used_R[row]
        used_R[row] += lengths_U[unit]
    return _lay_out(sequences, units, rows_U, starts_U, num_columns=int(used_R.max()))


def pad(sequences: Sequence[TokenPair]) -> PackedTokens:
    """One sequence per row, padded on the right to the longest: what packing must be equal to.

    Raises:
        ShapeError: no sequence, or an empty prompt or response.
    """
    rows_S, num_columns = np.arange(len(sequences)), int(_lengths(sequences).max())
    units = [range(number, number + 1) for number in rows_S.tolist()]
    return _lay_out(sequences, units, rows_S, np.zeros_like(rows_S), num_columns=num_columns)


def _lengths(sequences: Sequence[TokenPair]) -> NDArray[np.int64]:
    """[S] cells of each sequence; refuses sequences without anything to predict or anything to predict from."""
    if not sequences:
        raise ShapeError("there is no sequence to lay out; pass at least one (prompt_ids, response_ids) pair.")
    for number, (prompt_ids, response_ids) in enumerate(sequences):
        if len(prompt_ids) == 0 or len(response_ids) == 0:
            raise ShapeError(
                f"sequence {number} has {len(prompt_ids)} prompt and {len(response_ids)} response tokens; "
                "both need at least one."
            )
    return np.array([len(prompt_ids) + len(response_ids) - 1 for prompt_ids, response_ids in sequences], np.int64)


def _units(
    sequences: Sequence[TokenPair], lengths_S: NDArray[np.int64], capacity: int
) -> tuple[list[range], NDArray[np.int64]]:
    """Consecutive sequences that share one prompt and together fit `capacity` cells; and the cells of each unit."""
    units: list[range] = []
    lengths: list[int] = []
    before = b""
    for number, (length, (prompt_ids, _)) in enumerate(zip(lengths_S.tolist(), sequences, strict=True)):
        own, prompt = length - len(prompt_ids), prompt_ids.tobytes()
        is_shared, before = prompt == before, prompt
        if units and is_shared and lengths[-1] + own <= capacity:
            units[-1] = range(units[-1].start, number + 1)
            lengths[-1] += own
        else:
            units.append(range(number, number + 1))
            lengths.append(length)
    return units, np.array(lengths, np.int64)


def _lay_out(
    sequences: Sequence[TokenPair],
    units: Sequence[range],
    rows_U: NDArray[np.int64],
    starts_U: NDArray[np.int64],
    *,
    num_columns: int,
) -> PackedTokens:
    """Fill the cells of each unit from its start in its row: its prompt, then its responses one behind the other."""
    pieces: list[IntArray] = []
    lengths: list[int] = []
    positions_P: list[int] = []
    segments_P: list[int] = []
    prefixes_P: list[int] = []
    prompts_S: list[int] = []
    prompt_pieces_S: list[int] = []
    for number, unit in enumerate(units):
        prompt_ids = sequences[unit.start][0]
        is_shared, prompt_segment = len(unit) > 1, unit.start
        if is_shared:
            prompt_segment = len(sequences) + number
        pieces += [prompt_ids, *(sequences[member][1][:-1] for member in unit)]
        positions_P += [0] + [len(prompt_ids)] * len(unit)
        segments_P += [prompt_segment, *unit]
        prefixes_P += [NO_PREFIX] + [prompt_segment if is_shared else NO_PREFIX] * len(unit)
        prompts_S += [prompt_segment] * len(unit)
        prompt_pieces_S += [len(lengths)] * len(unit)
        lengths += [len(piece) for piece in pieces[len(lengths) :]]
    # Pieces of a unit lie side by side, so that a piece starts where those before it end.
    lengths_P = np.array(lengths, np.int64)
    before_P = np.cumsum(lengths_P) - lengths_P
    sizes_U = np.array([1 + len(unit) for unit in units])
    shift_U = rows_U * num_columns + starts_U - before_P[np.cumsum(sizes_U) - sizes_U]
    starts_P = before_P + np.repeat(shift_U, sizes_U)
    offsets = np.arange(lengths_P.sum()) - np.repeat(before_P, lengths_P)
    cells = np.repeat(starts_P, lengths_P) + offsets

    shape = (int(rows_U.max()) + 1, num_columns)
    ids = np.full(shape[0] * shape[1], FILL_ID, np.int64)
    positions, segments, prefixes = np.zeros_like(ids), np.full_like(ids, -1), np.full_like(ids, NO_PREFIX)
    ids[cells] = np.concatenate(pieces)
    positions[cells] = offsets + np.repeat(positions_P, lengths_P)
    segments[cells] = np.repeat(segments_P, lengths_P)
    prefixes[cells] = np.repeat(prefixes_P, lengths_P)

    # A sequence's predictions: the last cell of its prompt, then the cells of its response.
    prompts = np.array(prompt_pieces_S)
    responses = np.delete(np.arange(len(lengths_P)), np.cumsum(sizes_U) - sizes_U)
    num_predictions_S = 1 + lengths_P[responses]
    firsts_S = np.cumsum(num_predictions_S) - num_predictions_S
    predict_rows = np.repeat(starts_P[responses] - firsts_S - 1, num_predictions_S) + np.arange(num_predictions_S.sum())
    predict_rows[firsts_S] = starts_P[prompts] + lengths_P[prompts] - 1
    return PackedTokens(
        ids_RC=ids.reshape(shape),
        positions_RC=positions.reshape(shape),
        segments_RC=segments.reshape(shape),
        prefixes_RC=prefixes.reshape(shape),
        prompts_S=np.array(prompts_S),
        predict_rows_T=predict_rows,
    )
