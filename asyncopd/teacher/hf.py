"""`HfScorer`: a transformers teacher behind the Scorer port. One packed forward pass scores a group of trajectories.

    trajectories --pack--> rows --model--> hidden [T, D] --chunk by chunk--> log q [chunk, V] --gather--> TeacherScores

Full-vocabulary log-probs exist for one chunk of tokens at a time, never for all. Suffixes: T response tokens of all
trajectories together, V vocabulary, J ids asked for at a token (sampled, head, draws), K top-k, M teacher draws.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.causal_lm import num_ids, output_embedding, packed_hidden, weights_digest
from asyncopd.models.packing import pack
from asyncopd.models.sampling import inverse_cdf, lane_uniforms, teacher_key
from asyncopd.ports import ScoreRequest
from asyncopd.teacher.rows import asked_ids, assembled, check_request
from asyncopd.types import FloatArray, IntArray, TeacherScores, Trajectory


class HfScorer:
    """Implements `ports.Scorer`. Numbers do not depend on what is scored together (1e-6)."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        tokenizer_digest: str,
        row_capacity: int = 256,
        tokens_per_pass: int = 16_384,
        logprobs_per_chunk: int = 1 << 24,
    ) -> None:
        """
        Args:
            model: the teacher on its device, in its dtype; used as it is, log-probs are float32.
            name: names the score shards.
            tokenizer_digest: of the tokenizer the teacher was trained with; must equal the student's.
            row_capacity: cells of a packed row; attention costs its square, so a little above the usual length.
            tokens_per_pass: response and prompt tokens in one forward pass; bounds activations.
            logprobs_per_chunk: tokens × vocabulary that exist at once; 2^24 float32 are 64 MiB.
        """
        self.name = name
        self.digest = weights_digest(model)
        self.tokenizer_digest = tokenizer_digest
        self._model = model.eval()
        self._row_capacity = row_capacity
        self._tokens_per_pass = tokens_per_pass
        self._vocab_size = num_ids(model)
        self._chunk_size = max(1, logprobs_per_chunk // self._vocab_size)
        # One pass at a time: two threads would only share the same cores or accelerator.
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Nothing to start: the model was loaded before."""

    async def score(self, trajectories: Sequence[Trajectory], request: ScoreRequest) -> list[TeacherScores]:
        """Score every response token, in a thread; see `ports.Scorer`.

        Raises:
            EngineError: the temperature is not positive, `top_k` exceeds the vocabulary, an id lies outside it,
                a trajectory exceeds the teacher's context, or the teacher produced NaN.
        """
        self._check(trajectories, request)
        async with self._turn:
            return await asyncio.to_thread(self._score, trajectories, request)

    async def close(self) -> None:
        """Nothing to stop: the model lives in this process."""

    def _check(self, trajectories: Sequence[Trajectory], request: ScoreRequest) -> None:
        check_request(request, trajectories, vocab_size=self._vocab_size, teacher=self.name)
        max_positions = getattr(self._model.config, "max_position_embeddings", None)
        for trajectory in trajectories:
            num_tokens = len(trajectory.prompt_ids) + len(trajectory.response_ids)
            if max_positions is not None and num_tokens - 1 > max_positions:
                raise EngineError(
                    f"index {trajectory.index}: {num_tokens} tokens exceed the {max_positions} positions of teacher "
                    f"{self.name}. Lower rollout.max_new_tokens or use a teacher with a longer context."
                )

    @torch.inference_mode()
    def _score(self, trajectories: Sequence[Trajectory], request: ScoreRequest) -> list[TeacherScores]:
        return [scores for group in self._groups(trajectories) for scores in self._score_group(group, request)]

    def _groups(self, trajectories: Sequence[Trajectory]) -> Iterator[list[Trajectory]]:
        """Consecutive trajectories that ask for equally many ids per token and fit one forward pass."""
        group: list[Trajectory] = []
        size, width = 0, -1
        for trajectory in trajectories:
            num_tokens = len(trajectory.prompt_ids) + len(trajectory.response_ids)
            num_asked = asked_ids(trajectory).shape[1]
            if group and (size + num_tokens > self._tokens_per_pass or num_asked != width):
                yield group
                group, size = [], 0
            group.append(trajectory)
            size, width = size + num_tokens, num_asked
        if group:
            yield group

    def _score_group(self, group: Sequence[Trajectory], request: ScoreRequest) -> list[TeacherScores]:
        """One forward pass, then the output embedding in chunks of tokens."""
        pairs = [(trajectory.prompt_ids, trajectory.response_ids) for trajectory in group]
        longest = max(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in pairs)
        hidden_TD = packed_hidden(self._model, pack(pairs, max(self._row_capacity, longest)))
        ids_TJ = np.concatenate([asked_ids(trajectory) for trajectory in group]).astype(np.int64)
        uniforms_TM = np.concatenate([_draw_uniforms(trajectory, request) for trajectory in group])
        chunks = [
            self._answer_chunk(
                hidden_TD[start : start + self._chunk_size],
                ids_TJ[start : start + self._chunk_size],
                uniforms_TM[start : start + self._chunk_size],
                request,
            )
            for start in range(0, len(ids_TJ), self._chunk_size)
        ]
        logprobs_TJ, *columns = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        if np.isnan(logprobs_TJ).any():
            raise EngineError(
                f"teacher {self.name} produced NaN for indices {group[0].index} to "
                f"{group[-1].index}. Check its weights and dtype."
            )
        stops = np.cumsum([len(trajectory.response_ids) for trajectory in group])
        return assembled(
            group,
            np.split(logprobs_TJ, stops[:-1]),
            *columns,
            temperature=request.temperature,
            teacher=self.name,
            teacher_digest=self.digest,
        )

    def _answer_chunk(
        self, hidden_TD: Tensor, ids_TJ: NDArray[np.int64], uniforms_TM: NDArray[np.float64], request: ScoreRequest
    ) -> tuple[FloatArray, IntArray, FloatArray, IntArray, FloatArray]:
        """Log-probs at asked ids; top-k ids and log-probs; draws and their log-probs, of some consecutive tokens."""
        weight_VD, bias_V = output_embedding(self._model)
        logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V).float()
        logprobs_TV = torch.log_softmax(logits_TV / request.temperature, dim=-1)
        device = logprobs_TV.device
        topk = logprobs_TV.topk(request.top_k, dim=-1)
        draw_ids_TM = torch.empty((len(ids_TJ), 0), dtype=torch.int64, device=device)
        if request.num_teacher_draws:
            draw_ids_TM = inverse_cdf(logprobs_TV.exp(), torch.from_numpy(uniforms_TM).to(device))
        return (
            logprobs_TV.gather(1, torch.from_numpy(ids_TJ).to(device)).cpu().numpy(),
            topk.indices.int().cpu().numpy(),
            topk.values.cpu().numpy(),
            draw_ids_TM.int().cpu().numpy(),
            logprobs_TV.gather(1, draw_ids_TM).cpu().numpy(),
        )


def _draw_uniforms(trajectory: Trajectory, request: ScoreRequest) -> NDArray[np.float64]:
    """[T, M] of the trajectory's own random stream."""
    positions_T = np.arange(len(trajectory.response_ids))
    keys_T = np.full(len(positions_T), teacher_key(request.seed, trajectory.index), np.uint64)
    return lane_uniforms(keys_T, positions_T, request.num_teacher_draws)
