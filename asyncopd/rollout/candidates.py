"""Candidates for old rollouts: the sampling student's head and draws, recomputed from its published weights.

    trajectory --version runs--> weights of each version --packed forward--> log p_old at every position
        --draw(seed, index, position)--> head and draws, the ones the sampler would have recorded

The emitted tokens are checked on the way: weights that do not reproduce their recorded log-probs are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.causal_lm import load_safetensors, num_ids, output_embedding, packed_hidden
from asyncopd.models.packing import pack
from asyncopd.models.sampling import CandidateRule, check_law, draw, law_logprobs, policy_key
from asyncopd.types import Candidates, Trajectory

REPRODUCED_NATS = 0.02
"""Largest mean |difference| between recorded and recomputed log p_old of a response's tokens. Float32 engines agree to
1e-5; bfloat16 ones to about 1e-2; the weights of a neighbouring version differ by more."""
_CHUNK_LOGPROBS = 1 << 24


class CandidateSource:
    """Recomputes candidates from published policy versions. Holds one set of weights at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        read_weights: Callable[[int], bytes],
        *,
        rule: CandidateRule,
        temperature: float,
        top_p: float,
        seed: int,
        row_capacity: int,
    ) -> None:
        """
        Args:
            model: the student's architecture, owned from here on.
            read_weights: policy version number -> serialised weights.
            temperature, top_p: of the law that was sampled.
            seed: the run's; draws are those its sampler would have made.
            row_capacity: tokens of one packed row.
        Raises:
            ConfigError: candidates that do not fit the vocabulary.
        """
        check_law(temperature=temperature, top_p=top_p, rule=rule, vocab_size=num_ids(model))
        self._model, self._read_weights = model.eval(), read_weights
        self._rule, self._temperature, self._top_p, self._seed = rule, temperature, top_p, seed
        self._row_capacity = row_capacity
        self._version: int | None = None

    @torch.inference_mode()
    def candidates(self, trajectories: Sequence[Trajectory]) -> dict[int, Candidates]:
        """Candidates of every trajectory, by index.

        Raises:
            EngineError: published weights do not reproduce the recorded log-probs.
            ObjectMissingError: weights of a version that produced tokens are gone.
        """
        num_columns = 1 + self._rule.head + self._rule.num_draws
        ids = {t.index: np.zeros((len(t.response_ids), num_columns), np.int32) for t in trajectories}
        logprobs = {t.index: np.zeros((len(t.response_ids), num_columns + 1), np.float32) for t in trajectories}
        for version in sorted({run.version for t in trajectories for run in t.version_runs}):
            if version != self._version:
                load_safetensors(self._model, self._read_weights(version))
                self._version = version
            chosen = [t for t in trajectories if any(run.version == version for run in t.version_runs)]
            for trajectory, positions_A, ids_AC, logprobs_AC in self._recomputed(chosen, version):
                ids[trajectory.index][positions_A] = ids_AC
                logprobs[trajectory.index][positions_A] = logprobs_AC
        return {t.index: self._assembled(t, ids[t.index], logprobs[t.index]) for t in trajectories}

    def _recomputed(
        self, trajectories: Sequence[Trajectory], version: int
    ) -> list[tuple[Trajectory, NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]]:
        """Of each trajectory the positions that `version` produced, with their ids and log-probs."""
        pairs = [(t.prompt_ids, t.response_ids) for t in trajectories]
        longest = max(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in pairs)
        hidden_TD = packed_hidden(self._model, pack(pairs, max(self._row_capacity, longest)))
        positions = [np.flatnonzero(t.versions_T == version) for t in trajectories]
        starts = np.cumsum([0] + [len(t.response_ids) for t in trajectories[:-1]])
        rows_A = torch.from_numpy(np.concatenate([start + own for start, own in zip(starts, positions, strict=True)]))
        keys_A = np.concatenate(
            [
                np.full(len(own), policy_key(self._seed, t.index), np.uint64)
                for t, own in zip(trajectories, positions, strict=True)
            ]
        )
        emitted_A = np.concatenate([t.response_ids[own] for t, own in zip(trajectories, positions, strict=True)])
        ids_AC, logprobs_AC = self._drawn(
            hidden_TD[rows_A.to(hidden_TD.device)], emitted_A, keys_A, np.concatenate(positions)
        )
        stops = np.cumsum([len(own) for own in positions])
        return [
            (t, own, ids_AC[stop - len(own) : stop], logprobs_AC[stop - len(own) : stop])
            for t, own, stop in zip(trajectories, positions, stops, strict=True)
        ]

    def _drawn(
        self,
        hidden_AD: torch.Tensor,
        emitted_A: NDArray[np.int32],
        keys_A: NDArray[np.uint64],
        positions_A: NDArray[np.int64],
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Recorded token, head, draws; and log p_old of each with the tail mass last; a chunk of rows at a time."""
        weight_VD, bias_V = output_embedding(self._model)
        size = max(1, _CHUNK_LOGPROBS // weight_VD.shape[0])
        ids, logprobs = [], []
        for start in range(0, len(hidden_AD), size):
            chunk = slice(start, start + size)
            logits_AV = torch.nn.functional.linear(hidden_AD[chunk], weight_VD, bias_V)
            logprobs_AV = law_logprobs(logits_AV, temperature=self._temperature, top_p=self._top_p)
            draws = draw(logprobs_AV, keys_A[chunk], positions_A[chunk], self._rule)
            # What was emitted is on record; drawn again, a uniform on the edge of an id could fall to the other side.
            emitted_A1 = torch.from_numpy(emitted_A[chunk].astype(np.int64))[:, None].to(logprobs_AV.device)
            ids.append(torch.cat([emitted_A1, draws.ids_AC[:, 1:]], dim=1).int().cpu().numpy())
            columns = [logprobs_AV.gather(1, emitted_A1), draws.logprobs_AC[:, 1:], draws.tail_logmass_A[:, None]]
            logprobs.append(torch.cat(columns, dim=1).cpu().numpy())
        return np.concatenate(ids), np.concatenate(logprobs)

    def _assembled(
        self, trajectory: Trajectory, ids_TC: NDArray[np.int32], logprobs_TC: NDArray[np.float32]
    ) -> Candidates:
        difference = float(np.abs(logprobs_TC[:, 0] - trajectory.behaviour_logprobs_T).mean())
        # -inf, where top-p excludes a recorded token, and NaN fail too.
        if not difference <= REPRODUCED_NATS:
            raise EngineError(
                f"index {trajectory.index}: the published weights of versions {trajectory.version_first} to "
                f"{trajectory.version_last} give its tokens log-probs that differ by {difference:.3g} nats on average "
                f"from the recorded ones; expected at most {REPRODUCED_NATS}. They are not the weights that sampled it "
                "(was the run sampled by another engine, or rewound with another result?), so candidates drawn from "
                "them would follow another law. Back-fill without --candidates, or start a new run that records them."
            )
        if self._rule.law == "policy" and self._rule.num_draws:
            # The emitted token is draw 0, with the log-prob that was recorded.
            ids_TC[:, 1 + self._rule.head] = trajectory.response_ids
            logprobs_TC[:, 1 + self._rule.head] = trajectory.behaviour_logprobs_T
        return self._rule.candidates(ids_TC, logprobs_TC)
