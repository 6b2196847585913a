"""Continuous batching: the synchronous engine inside `HfSampler`. One `step` gives every active slot one token.

    admit --> uncached --step: packed prefill--> cached --step: one token--> ... --> finished Trajectory, slot free
                 ^                                  |
                 +--------- refresh (all slots) ----+      finished tokens stay, the cache is made again

A token depends on seed, trajectory index, position and weights, never on the slot or on what runs beside it. Invariant
during a step: slots 0 ... num_active−1 are occupied, so that the cache is read through views. Suffixes: S slots or
rows of the host's records, A active slots, U uncached ones, T response positions, C columns (emitted token, head,
draws; then the tail mass).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.packing import PackedTokens, TokenPair, pack
from asyncopd.models.sampling import CandidateRule, check_law, draw, law_logprobs, policy_key
from asyncopd.ports import SampleRequest
from asyncopd.rollout.slots import SlotModel
from asyncopd.types import FinishReason, IntArray, PolicyVersion, PolicyWeights, Trajectory, VersionRun

# Short rows keep the block-causal mask small: attention over C cells costs C² whatever the segments are.
_ROW_CAPACITY = 128
# Tokens prefilled in one pass; bounds activations when a refresh makes all caches again.
_PREFILL_CELLS = 8192
# `pack` lays out what predicts a response; what comes next is not known yet, only that it is one token.
_NEXT_TOKEN = np.zeros(1, np.int32)


class Decoder:
    """Slots, their cache and their host-side records. Not thread-safe; `HfSampler` gives it a thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_context: int,
        temperature: float,
        top_p: float,
        rule: CandidateRule,
        seed: int,
        eos_id: int,
    ) -> None:
        """
        Args:
            model: owned from here on.
        Raises:
            ConfigError: a sampling law that is no distribution.
            EngineError: the model cannot serve `max_context` or be given slots.
        """
        check_law(temperature=temperature, top_p=top_p, rule=rule, vocab_size=model.config.vocab_size)
        self._model = SlotModel(model, num_slots=num_slots, max_context=max_context)
        self._temperature, self._top_p, self._rule = temperature, top_p, rule
        self._seed, self._eos_id = seed, eos_id
        self.version: PolicyVersion | None = None
        self.num_slots, self.max_context = num_slots, max_context
        self.vocab_size = self._model.vocab_size

        # A response keeps its row of the records when its slot moves.
        self._records = TokenRecords(num_slots, max_context, rule)
        # All by slot.
        self._responses: list[OpenResponse | None] = [None] * num_slots
        self._rows_S = np.arange(num_slots)
        self._keys_S = np.zeros(num_slots, np.uint64)
        self._prompt_lengths_S = np.zeros(num_slots, np.int64)
        self._counts_S = np.zeros(num_slots, np.int64)
        self._limits_S = np.zeros(num_slots, np.int64)
        self._last_ids_S = np.zeros(num_slots, np.int64)
        self._is_cached_S = np.zeros(num_slots, np.bool_)
        self._end = 0
        self._holes: list[int] = []
        self._num_admitted = 0

    @property
    def num_active(self) -> int:
        return self._end - len(self._holes)

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_active

    def admit(self, request: SampleRequest) -> int:
        """Give a checked request a free slot; its first token comes with the next step. Returns its ticket."""
        assert self.version is not None
        if self._holes:
            slot = self._holes.pop()
        else:
            slot, self._end = self._end, self._end + 1
        self._responses[slot] = OpenResponse(self._num_admitted, request, int(self._rows_S[slot]), self.version.number)
        self._keys_S[slot] = policy_key(self._seed, request.index)
        self._prompt_lengths_S[slot] = len(request.prompt_ids)
        self._limits_S[slot] = request.max_new_tokens
        self._counts_S[slot] = 0
        self._is_cached_S[slot] = False
        self._num_admitted += 1
        return self._num_admitted - 1

    def refresh(self, weights: PolicyWeights) -> None:
        """Go on under other weights: active responses keep their tokens, their cache is made again.

        Raises:
            EngineError: the weights do not fit; nothing changed.
        """
        self._model.load(weights.safetensors)
        self.version = weights.version
        self._is_cached_S[:] = False
        for slot, response in enumerate(self._responses):
            if response is not None:
                response.start_version(weights.version.number, int(self._counts_S[slot]))

    def step(self) -> list[tuple[int, Trajectory]]:
        """One token for every active slot (at least one); returns tickets and responses that this finished.

        Raises:
            EngineError: the model produced NaN.
        """
        self._fill_holes()
        active = slice(0, self._end)
        logits_AV = self._model.logits(self._hidden())
        logprobs_AV = law_logprobs(logits_AV, temperature=self._temperature, top_p=self._top_p)
        draws = draw(logprobs_AV, self._keys_S[active], self._counts_S[active], self._rule)
        ids_AC = draws.ids_AC.cpu().numpy()
        logprobs_AC = torch.cat([draws.logprobs_AC, draws.tail_logmass_A[:, None]], dim=1).cpu().numpy()
        if not np.isfinite(logprobs_AC).all():
            raise EngineError(
                f"the student produced NaN under policy version {self.version}; generation stopped. "
                "Check the published weights and the learner's last steps."
            )
        self._records.write(self._rows_S[active], self._counts_S[active], ids_AC, logprobs_AC)
        self._last_ids_S[active] = ids_AC[:, 0]
        self._is_cached_S[active] = True
        self._counts_S[active] += 1
        is_finished_A = (ids_AC[:, 0] == self._eos_id) | (self._counts_S[active] >= self._limits_S[active])
        return [self._finish(int(slot)) for slot in np.flatnonzero(is_finished_A)]

    def _hidden(self) -> Tensor:
        """[A, D] hidden states that predict the next token of every active slot; fills the cache on the way."""
        is_cached_A = self._is_cached_S[: self._end]
        ids_A = self._last_ids_S[: self._end]
        positions_A = np.where(is_cached_A, (self._prompt_lengths_S + self._counts_S)[: self._end] - 1, -1)
        uncached_U = np.flatnonzero(~is_cached_A)
        if len(uncached_U) == 0:
            return self._model.forward_pass(ids_A, positions_A, None, uncached_U)
        # Decoding rides on the first prefill pass, unless nothing is cached. Uncached slots are computed too:
        # that costs a row each and keeps the cache a view.
        num_decode = self._end if is_cached_A.any() else 0
        hidden_AD: Tensor | None = None
        for slots_U, packed in self._prefill_groups(uncached_U):
            output_PD = self._model.forward_pass(ids_A[:num_decode], positions_A[:num_decode], packed, slots_U)
            if hidden_AD is None:
                hidden_AD = output_PD.new_empty(self._end, output_PD.shape[-1])
                hidden_AD[:num_decode] = output_PD[:num_decode]
            hidden_AD[self._model.on_device(slots_U)] = output_PD[num_decode:]
            num_decode = 0
        assert hidden_AD is not None
        return hidden_AD

    def _prefill_groups(self, uncached_U: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], PackedTokens]]:
        """Slots and packed tokens of each prefill pass: prompt and response so far, at most `_PREFILL_CELLS` a pass
        unless a single response is longer."""
        pairs: list[TokenPair] = []
        for slot in uncached_U:
            response = self._responses[slot]
            assert response is not None
            so_far = self._records.response_ids(response.row, int(self._counts_S[slot]))
            pairs.append((np.concatenate([response.request.prompt_ids, so_far]), _NEXT_TOKEN))
        ends_U = np.cumsum([len(ids) for ids, _ in pairs])
        for group in np.unique(ends_U // _PREFILL_CELLS):
            members = np.flatnonzero(ends_U // _PREFILL_CELLS == group)
            chosen = [pairs[member] for member in members]
            yield uncached_U[members], pack(chosen, max(_ROW_CAPACITY, max(len(ids) for ids, _ in chosen)))

    def _fill_holes(self) -> None:
        """Move the last slots into holes, so that active slots are contiguous. Rare: new requests fill holes first."""
        for hole in sorted(self._holes, reverse=True):
            self._end -= 1
            last = self._end
            if hole == last:
                continue
            length = int(self._prompt_lengths_S[last] + self._counts_S[last]) - 1
            self._model.cache.move(last, hole, length)
            # Swapped, not copied: rows stay a permutation, so a freed slot owns a free row.
            self._rows_S[[hole, last]] = self._rows_S[[last, hole]]
            self._responses[hole], self._responses[last] = self._responses[last], None
            for by_slot in (
                self._keys_S,
                self._prompt_lengths_S,
                self._counts_S,
                self._limits_S,
                self._last_ids_S,
                self._is_cached_S,
            ):
                by_slot[hole] = by_slot[last]
        self._holes.clear()

    def _finish(self, slot: int) -> tuple[int, Trajectory]:
        """Free the slot and turn its records into a Trajectory."""
        response = self._responses[slot]
        assert response is not None
        self._responses[slot] = None
        self._holes.append(slot)
        reason: FinishReason = "stop" if self._last_ids_S[slot] == self._eos_id else "length"
        return response.ticket, self._records.trajectory(response, int(self._counts_S[slot]), reason)


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
        return self._rule.trajectory(
            response.request.index,
            response.request.prompt_ids,
            ids_TC,
            logprobs_TC,
            version_runs=response.version_runs(count),
            finish_reason=finish_reason,
        )


def check_request(request: SampleRequest, *, max_context: int, vocab_size: int, has_weights: bool) -> None:
    """Refuse what an engine cannot serve.

    Raises:
        EngineError: no weights yet, an empty or invalid prompt, or no room for the response; names the index.
    """
    ids, index = request.prompt_ids, request.index
    if not has_weights:
        raise EngineError(f"index {index}: the sampler has no weights yet; await refresh(weights) first.")
    if len(ids) == 0 or request.max_new_tokens < 1:
        raise EngineError(
            f"index {index}: {len(ids)} prompt tokens and max_new_tokens {request.max_new_tokens}; "
            "both must be at least 1."
        )
    if len(ids) + request.max_new_tokens > max_context:
        raise EngineError(
            f"index {index}: {len(ids)} prompt + {request.max_new_tokens} new tokens exceed max_context "
            f"{max_context}. Lower the response limit or raise max_context."
        )
    if np.min(ids) < 0 or np.max(ids) >= vocab_size:
        raise EngineError(
            f"index {index}: prompt ids reach from {np.min(ids)} to {np.max(ids)}, the model's vocabulary has "
            f"{vocab_size}. Do task and student use the same tokenizer?"
        )
