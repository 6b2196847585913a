"""What the host keeps about responses in progress, and how a finished one becomes a Trajectory.

Suffixes: A active slots, S rows, T response positions, C columns (emitted token, head, draws; then the tail mass).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asyncopd.ports import SampleRequest
from asyncopd.sampling import CandidateRule
from asyncopd.types import Candidates, FinishReason, IntArray, Trajectory, VersionRun


class OpenResponse:
    """One response in progress: its request, the row of its tokens, and which versions produced them."""

    def __init__(self, ticket: int, request: SampleRequest, row: int, version: int) -> None:
        self.ticket = ticket
        self.request = request
        self.row = row
        self._runs: list[tuple[int, int]] = [(version, 0)]
        # (version, first response position it produces), in order.

    def start_version(self, version: int, count: int) -> None:
        """Tokens from response position `count` on come from `version`; a run that got no token is forgotten."""
        self._runs = [run for run in self._runs if run[1] < count]
        self._runs.append((version, count))

    def version_runs(self, count: int) -> tuple[VersionRun, ...]:
        """The runs of the first `count` tokens."""
        ends = [start for _, start in self._runs[1:]] + [count]
        return tuple(VersionRun(version, end - start) for (version, start), end in zip(self._runs, ends, strict=True))


class TokenRecords:
    """Ids and log-probs of every response in progress, one row each, filled one position per step."""

    def __init__(self, num_rows: int, max_tokens: int, rule: CandidateRule) -> None:
        num_columns = 1 + rule.head + rule.num_draws
        self._rule = rule
        # Memory is committed by the operating system as positions are written, not here.
        self._ids_STC = np.zeros((num_rows, max_tokens, num_columns), np.int32)
        self._logprobs_STC = np.zeros((num_rows, max_tokens, num_columns + 1), np.float32)

    def write(
        self,
        rows_A: NDArray[np.int64],
        positions_A: NDArray[np.int64],
        ids_AC: NDArray[np.int64],
        logprobs_AC: NDArray[np.float32],
    ) -> None:
        """Record one position of several rows; the last log-prob column is the tail mass."""
        self._ids_STC[rows_A, positions_A] = ids_AC
        self._logprobs_STC[rows_A, positions_A] = logprobs_AC

    def response_ids(self, row: int, count: int) -> IntArray:
        """[count] tokens so far; a view."""
        return self._ids_STC[row, :count, 0]

    def trajectory(self, response: OpenResponse, count: int, finish_reason: FinishReason) -> Trajectory:
        """The finished response; its arrays are views into two copies made here."""
        ids_TC = self._ids_STC[response.row, :count].copy()
        logprobs_TC = self._logprobs_STC[response.row, :count].copy()
        head_end = 1 + self._rule.head
        return Trajectory(
            index=response.request.index,
            prompt_id="",
            prompt_ids=response.request.prompt_ids,
            response_ids=ids_TC[:, 0],
            behaviour_logprobs_T=logprobs_TC[:, 0],
            version_runs=response.version_runs(count),
            finish_reason=finish_reason,
            candidates=Candidates(
                head_ids_TK=ids_TC[:, 1:head_end],
                head_logprobs_TK=logprobs_TC[:, 1:head_end],
                tail_logmass_T=logprobs_TC[:, -1],
                draw_ids_TN=ids_TC[:, head_end:],
                draw_logprobs_TN=logprobs_TC[:, head_end:-1],
                law=self._rule.law,
            ),
        )
