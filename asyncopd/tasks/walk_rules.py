"""The walk on Z_p: operations, shortest paths, vocabulary, demonstrator, and its law in closed form. Needs numpy only.

A walk goes from a start to a goal by operations on a state; the demonstrator's law depends on nothing but the
noise level, the goal and the present state. Suffixes: Z noise levels, G goals, S states, O operations.

The oracle is the demonstrator's next-token distribution for every prefix there is. What has been written decides in
which of three situations the next token stands; each is one row of a table:

    an operation is due at x   the demonstrator's law at x; EOS with certainty when x is the goal
    a state is due after op    op(x) with certainty, x being the state written last (or the start)
    the response is over       EOS with certainty

The law is total and always leads back to the goal, so that a student is taught at every prefix it can reach. A wrong
state is a state: the walk goes on from what was written last. Of several operations in a row the last one counts, of
several states too; pads and noise levels change nothing. An operation at the goal starts another walk to it. The
response is over after an EOS, and from the start for a prompt that is not (noise level, state, state).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asyncopd.tasks.tokenizers import VocabTokenizer
from asyncopd.types import IntArray

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


class WalkOracle:
    """q = (1 − smoothing) · demonstrator + smoothing / V, tabulated.

    Args:
        rules: the walk.
        smoothing: in (0, 1); keeps every log-prob finite.
    """

    def __init__(self, rules: WalkRules, smoothing: float) -> None:
        self.rules = rules
        self.smoothing = smoothing
        self.probabilities_RV = self._tabulate()
        """[R, V] float64, rows sum to 1: Z·p·p rows for operations, p for states (by the state due), 1 for the end."""

    def logprobs_TV(self, prompt_ids: IntArray, response_ids: IntArray) -> NDArray[np.float64]:
        """[T, V] float64, nats: row t is log q at the prefix that produced `response_ids[t]`."""
        rows_T = self.rows([prompt_ids], [response_ids])[0]
        logprobs_TV: NDArray[np.float64] = np.log(self.probabilities_RV[rows_T])
        return logprobs_TV

    def rows(self, prompts: Sequence[IntArray], responses: Sequence[IntArray]) -> list[NDArray[np.int64]]:
        """For every response [T], the rows of `probabilities_RV` at its positions. Never fails on what ids say."""
        lengths = [len(response) for response in responses]
        ids_BT = np.full((len(responses), max(lengths, default=0)), PAD_ID, np.int64)
        for ids_T, response in zip(ids_BT, responses, strict=True):
            ids_T[: len(response)] = response
        rows_BT = self._rows_BT(_prompt_matrix(prompts), ids_BT)
        return [rows_T[:length] for rows_T, length in zip(rows_BT, lengths, strict=True)]

    def _rows_BT(self, prompts_B3: NDArray[np.int64], ids_BT: NDArray[np.int64]) -> NDArray[np.int64]:
        rules, p = self.rules, self.rules.p
        noise_B = prompts_B3[:, 0] - FIRST_NOISE_ID
        start_B, goal_B = (prompts_B3[:, column] - rules.first_state_id for column in (1, 2))
        broken_B = ~(_within(noise_B, len(rules.noise_levels)) & _within(start_B, p) & _within(goal_B, p))

        operation_BT = ids_BT - rules.first_operation_id
        state_BT = ids_BT - rules.first_state_id
        over_BT = np.logical_or.accumulate(np.column_stack([broken_B, ids_BT == EOS_ID]), axis=1)[:, :-1]
        state_position_BT, at_BT = _latest(_within(state_BT, p), state_BT, start_B)
        operation_position_BT, chosen_BT = _latest(_within(operation_BT, NUM_OPERATIONS), operation_BT, 0 * start_B)
        state_is_due_BT = operation_position_BT > state_position_BT

        at_BT = np.where(broken_B[:, None], 0, at_BT)
        context_B = np.where(broken_B, 0, (noise_B * p + goal_B) * p)
        operation_rows_BT = context_B[:, None] + at_BT
        state_rows_BT = len(rules.noise_levels) * p**2 + rules.successors_SO[at_BT, chosen_BT]
        rows_BT = np.where(state_is_due_BT, state_rows_BT, operation_rows_BT)
        return np.where(over_BT, len(self.probabilities_RV) - 1, rows_BT)

    def _tabulate(self) -> NDArray[np.float64]:
        rules, p = self.rules, self.rules.p
        num_levels = len(rules.noise_levels)
        operations_ZGSV = np.zeros((num_levels, p, p, rules.vocab_size))
        operations_ZGSV[..., rules.first_operation_id : rules.first_state_id] = rules.demonstrator_ZGSO
        goals = np.arange(p)
        operations_ZGSV[:, goals, goals] = np.eye(rules.vocab_size)[EOS_ID]
        states_SV = np.eye(rules.vocab_size)[rules.first_state_id :]
        end_1V = np.eye(rules.vocab_size)[[EOS_ID]]
        certain_RV = np.concatenate([operations_ZGSV.reshape(-1, rules.vocab_size), states_SV, end_1V])
        return np.asarray((1.0 - self.smoothing) * certain_RV + self.smoothing / rules.vocab_size)


def _prompt_matrix(prompts: Sequence[IntArray]) -> NDArray[np.int64]:
    """[B, 3] ids; a prompt of another length becomes pads, which no well-formed prompt contains."""
    prompts_B3 = np.full((len(prompts), 3), PAD_ID, np.int64)
    for ids_3, prompt in zip(prompts_B3, prompts, strict=True):
        if len(prompt) == 3:
            ids_3[:] = prompt
    return prompts_B3


def _latest(
    is_one_BT: NDArray[np.bool_], values_BT: NDArray[np.int64], initial_B: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Before each position: where the last marked token stands (0 for none, else 1 + its position), and its value."""
    positions_T = np.arange(1, is_one_BT.shape[1] + 1)
    marked_BT = np.maximum.accumulate(np.where(is_one_BT, positions_T, 0), axis=1)
    latest_BT = np.column_stack([np.zeros_like(initial_B), marked_BT])[:, : is_one_BT.shape[1]]
    with_initial_BT = np.column_stack([initial_B, values_BT])
    return latest_BT, np.take_along_axis(with_initial_BT, latest_BT, axis=1)


def _within(values: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    return (values >= 0) & (values < count)
