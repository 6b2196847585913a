"""The walk task: prompts (noise level, start, goal), responses of (operation, state) pairs up to the goal, then EOS.

    prompt    ~0.05  3  14            3 tokens: noise level, start, goal; start ≠ goal
    response  +11  14  <eos>          operation, state, operation, state, ..., EOS at the goal

Training prompts are i.i.d. over the (start, goal) pairs that are not held out. Evaluation prompts run through the
held-out pairs in a fixed order in which every stretch of 100 has the noise levels in the proportion of their weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import ConfigError
from asyncopd.models.random import derive, permutation, stream_key, uniform
from asyncopd.ports import Demonstration, Tokenizer
from asyncopd.tasks.walk_rules import EOS_ID, FIRST_NOISE_ID, NUM_OPERATIONS, WalkRules
from asyncopd.types import IntArray, Prompt, Split

_EVAL_CYCLE = 100
"""Evaluation prompts after which the sequence of noise levels repeats."""
_MAX_ATTEMPTS = 10_000
"""Walks drawn for one demonstration before its length cap is called impossible."""


class WalkTask:
    """Implements `ports.Task`. Two tasks with equal arguments give equal prompts and demonstrations, on any machine.

    Args:
        seed: order of training prompts and demonstrations; evaluation does not depend on it.
        p: number of states.
        noise_levels, noise_weights: ε of every level and its share of the prompts.
        eval_fraction: share of (start, goal) pairs held out; at least one pair is on either side.
        split_seed: decides which pairs are held out and the order of evaluation.
        max_demo_tokens: longest demonstration, EOS included. A longer walk is drawn again for the same question.
    Raises:
        ConfigError: the shortest path between the two farthest states does not fit `max_demo_tokens`.
    """

    name = "walk"
    max_prompt_tokens = 3

    def __init__(
        self,
        seed: int = 0,
        *,
        p: int = 31,
        noise_levels: Sequence[float] = (0.05, 0.35, 0.65, 0.85),
        noise_weights: Sequence[float] = (0.5, 0.28, 0.15, 0.07),
        eval_fraction: float = 0.1,
        split_seed: int = 0,
        max_demo_tokens: int = 192,
    ) -> None:
        self.rules = WalkRules(p, noise_levels)
        self.tokenizer: Tokenizer = self.rules.tokenizer
        self.groups = tuple(f"noise {level:g}" for level in noise_levels)
        needed = 2 * int(self.rules.distances_GS.max()) + 1
        if max_demo_tokens < needed:
            raise ConfigError(
                f"task.max_demo_tokens {max_demo_tokens}: the longest shortest path on Z_{p} has {needed} tokens, "
                f"EOS included. Set it to {needed} or more."
            )
        self._max_demo_tokens = max_demo_tokens
        self._cumulative_weights = np.cumsum(noise_weights).tolist()
        self._train_pairs, self._eval_pairs = _split_pairs(p, eval_fraction, split_seed)
        self._eval_levels = _eval_levels(noise_weights)
        self._eval_orders = [
            permutation(stream_key("walk eval order", split_seed, level), len(self._eval_pairs)).tolist()
            for level in range(len(noise_levels))
        ]
        self._train_key = stream_key("walk prompts", seed)
        self._demo_keys = {
            "train": stream_key("walk demonstrations", seed, 0),
            "eval": stream_key("walk demonstrations", split_seed, 1),
        }
        self._questions = self._tabulate_questions()
        self._cumulative_ZGS: list[list[list[list[float]]]] = self.rules.demonstrator_ZGSO.cumsum(-1).tolist()
        self._successors_SO: list[list[int]] = self.rules.successors_SO.tolist()

    def prompt(self, index: int, split: Split) -> Prompt:
        """The `index`-th prompt. Costs a few microseconds; the ids are shared and read-only."""
        level, pair = self._train_question(self._train_key, index) if split == "train" else self._eval_question(index)
        prompt_id, ids, reference, group = self._questions[level][pair]
        return Prompt(index, prompt_id, ids, reference, group)

    def verify(self, prompt: Prompt, response_ids: Sequence[int]) -> bool:
        """True when operations and states alternate, every state is what its operation gives, and the walk ends the
        first time it is at the goal, followed by EOS and nothing else."""
        first_state = self.rules.first_state_id
        first_operation = self.rules.first_operation_id
        ids = [int(token_id) for token_id in response_ids]
        state, goal = int(prompt.ids[1]) - first_state, int(prompt.ids[2]) - first_state
        position = 0
        while state != goal:
            if position + 2 > len(ids):
                return False
            operation = ids[position] - first_operation
            if not 0 <= operation < NUM_OPERATIONS:
                return False
            state = self._successors_SO[state][operation]
            if ids[position + 1] != first_state + state:
                return False
            position += 2
        return ids[position:] == [EOS_ID]

    def demonstration(self, index: int, split: Split) -> Demonstration:
        """The `index`-th question of the demonstration stream with a walk of the demonstrator.

        The `train` stream asks questions of its own, drawn like training prompts; the `eval` stream asks the
        evaluation prompts in their order.
        """
        key = derive(self._demo_keys[split], index)
        level, pair = self._train_question(key, 0) if split == "train" else self._eval_question(index)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            response = self._walk(level, pair, derive(key, attempt))
            if response is not None:
                return Demonstration(self._questions[level][pair][1], np.array(response, np.int32))
        raise ConfigError(
            f"task.max_demo_tokens {self._max_demo_tokens}: {_MAX_ATTEMPTS} walks in a row were longer, at noise "
            f"{self.rules.noise_levels[level]:g}. Raise it, or remove that noise level."
        )

    def _train_question(self, key: int, index: int) -> tuple[int, int]:
        key = derive(key, index)
        level = bisect_right(self._cumulative_weights, uniform(key, 0))
        pair = self._train_pairs[int(uniform(key, 1) * len(self._train_pairs))]
        # The weights may add up to a little less than 1.
        return min(level, len(self.groups) - 1), pair

    def _eval_question(self, index: int) -> tuple[int, int]:
        cycle, place = divmod(index, _EVAL_CYCLE)
        level, before, per_cycle = self._eval_levels[place]
        order = self._eval_orders[level]
        return level, self._eval_pairs[order[(cycle * per_cycle + before) % len(order)]]

    def _walk(self, level: int, pair: int, key: int) -> list[int] | None:
        """Response ids of one walk; None when it is longer than the cap."""
        start, goal = divmod(pair, self.rules.p)
        cumulative_SO = self._cumulative_ZGS[level][goal]
        first_operation, first_state = self.rules.first_operation_id, self.rules.first_state_id
        response: list[int] = []
        state = start
        while state != goal:
            if len(response) + 3 > self._max_demo_tokens:
                return None
            draw = uniform(key, len(response))
            operation = min(bisect_right(cumulative_SO[state], draw), NUM_OPERATIONS - 1)
            state = self._successors_SO[state][operation]
            response += (first_operation + operation, first_state + state)
        response.append(EOS_ID)
        return response

    def _tabulate_questions(self) -> list[dict[int, tuple[str, IntArray, str, str]]]:
        """By noise level and pair: prompt id, read-only ids, reference, group."""
        p, first_state = self.rules.p, self.rules.first_state_id
        tables: list[dict[int, tuple[str, IntArray, str, str]]] = []
        for level, group in enumerate(self.groups):
            table: dict[int, tuple[str, IntArray, str, str]] = {}
            for pair in [*self._train_pairs, *self._eval_pairs]:
                start, goal = divmod(pair, p)
                ids = np.array([FIRST_NOISE_ID + level, first_state + start, first_state + goal], np.int32)
                ids.flags.writeable = False
                noise = self.rules.noise_levels[level]
                table[pair] = (f"walk-{p}-{noise:g}-{start}-{goal}", ids, f"a walk from {start} to {goal}", group)
            tables.append(table)
        return tables


def _split_pairs(p: int, eval_fraction: float, split_seed: int) -> tuple[list[int], list[int]]:
    """Pairs start · p + goal with start ≠ goal: (training, held out), each in ascending order."""
    pairs = [start * p + goal for start in range(p) for goal in range(p) if start != goal]
    num_eval = min(max(1, round(eval_fraction * len(pairs))), len(pairs) - 1)
    order = permutation(stream_key("walk split", split_seed), len(pairs))
    held_out = {pairs[place] for place in order[:num_eval]}
    return [pair for pair in pairs if pair not in held_out], sorted(held_out)


def _eval_levels(weights: Sequence[float]) -> list[tuple[int, int, int]]:
    """For every place of a cycle: its level, how often the level came before in the cycle, its count per cycle.

    The next level is always the one farthest behind its share, so every prefix has the mix of the weights to ±1.
    """
    share_Z: NDArray[np.float64] = np.asarray(weights, np.float64) / np.sum(weights)
    count_Z = np.zeros(len(share_Z), np.int64)
    places: list[tuple[int, int]] = []
    for place in range(_EVAL_CYCLE):
        level = int(np.argmax(np.round(share_Z * (place + 1) - count_Z, 9)))
        places.append((level, int(count_Z[level])))
        count_Z[level] += 1
    return [(level, before, int(count_Z[level])) for level, before in places]
