"""The walk on Z_p: its operations, shortest paths, demonstrator and vocabulary. Relies on numpy only.

A walk goes from a start to a goal by operations on a state; the demonstrator's law depends on nothing but the
noise level, the goal and the present state. Suffixes: Z noise levels, G goals, S states, O operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asyncopd.tasks.tokenizers import VocabTokenizer

OPERATIONS: tuple[tuple[str, int, int], ...] = (("+1", 1, 1), ("-1", 1, -1), ("×2", 2, 0), ("+11", 1, 11))
"""(name, factor, addend): the operation takes x to factor · x + addend mod p. `×2` leaves 0 where it is, legally."""
NUM_OPERATIONS = len(OPERATIONS)

PAD_ID = 0
EOS_ID = 1
FIRST_NOISE_ID = 2


class WalkRules:
    """Everything about walks on Z_p that no seed decides.

    The vocabulary, of 2 + Z + 4 + p ids (41 by default)::

        0 <pad>   1 <eos>   2.. ~0.05 ~0.35 ~0.65 ~0.85   6.. +1 -1 ×2 +11   10.. 0 1 2 ... p−1

    Args:
        p: number of states.
        noise_levels: ε of every noise level: how often the demonstrator takes any operation rather than a good one.
    """

    def __init__(self, p: int, noise_levels: Sequence[float]) -> None:
        self.p = p
        self.noise_levels = tuple(noise_levels)
        self.first_operation_id = FIRST_NOISE_ID + len(self.noise_levels)
        self.first_state_id = self.first_operation_id + NUM_OPERATIONS
        self.tokenizer = VocabTokenizer(
            [
                "<pad>",
                "<eos>",
                *(f"~{level:g}" for level in self.noise_levels),
                *(name for name, _, _ in OPERATIONS),
                *(str(state) for state in range(p)),
            ]
        )
        self.successors_SO: NDArray[np.int64] = np.array(
            [[(factor * state + addend) % p for _, factor, addend in OPERATIONS] for state in range(p)]
        )
        """[p, 4] the state that each operation leads to."""
        self.distances_GS = _distances(self.successors_SO)
        """[p, p] least number of operations from a state to a goal."""
        self.demonstrator_ZGSO = self._demonstrator()
        """[Z, p, p, 4] float64, probability of each operation; the rows at the goal itself are never used."""

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _demonstrator(self) -> NDArray[np.float64]:
        # An operation is on a shortest path if it comes one step closer; at the goal none does.
        closer_GSO = self.distances_GS[:, self.successors_SO] == self.distances_GS[:, :, None] - 1
        best_GSO = closer_GSO / np.maximum(closer_GSO.sum(-1, keepdims=True), 1)
        noise_Z111 = np.array(self.noise_levels)[:, None, None, None]
        demonstrator_ZGSO: NDArray[np.float64] = (1.0 - noise_Z111) * best_GSO + noise_Z111 / NUM_OPERATIONS
        return demonstrator_ZGSO


def _distances(successors_SO: NDArray[np.int64]) -> NDArray[np.int64]:
    # Bellman iteration for all goals at once; +1 alone connects all states, so p rounds suffice.
    p = len(successors_SO)
    distances_GS = np.where(np.eye(p, dtype=bool), 0, p)
    for _ in range(p):
        nearer_GS = np.minimum(distances_GS, distances_GS[:, successors_SO].min(-1) + 1)
        if np.array_equal(nearer_GS, distances_GS):
            break
        distances_GS = nearer_GS
    return distances_GS
