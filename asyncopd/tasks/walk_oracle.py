"""The walk demonstrator's next-token distribution in closed form, for every prefix there is. Relies on numpy only.

What has been written decides in which of three situations the next token stands; each is one row of a table:

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

from asyncopd.tasks.walk_rules import EOS_ID, FIRST_NOISE_ID, NUM_OPERATIONS, PAD_ID, WalkRules
from asyncopd.types import IntArray


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

    def next_logprobs_V(self, prompt_ids: IntArray, prefix_ids: IntArray) -> NDArray[np.float64]:
        """[V] float64, nats: log q of the token after `prefix_ids`, which may be empty."""
        padded_ids = np.append(np.asarray(prefix_ids, np.int32), np.int32(PAD_ID))
        return np.asarray(self.logprobs_TV(prompt_ids, padded_ids)[-1])

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
        state_rows_BT = self._first_state_row + rules.successors_SO[at_BT, chosen_BT]
        rows_BT = np.where(state_is_due_BT, state_rows_BT, operation_rows_BT)
        return np.where(over_BT, len(self.probabilities_RV) - 1, rows_BT)

    @property
    def _first_state_row(self) -> int:
        return len(self.rules.noise_levels) * self.rules.p**2

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
