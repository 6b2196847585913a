"""`VllmScorer`: a teacher in a vLLM engine process behind the Scorer port. Responses are scored as prompts.

    trajectories --prompt + response as one prompt, prompt_logprobs--> engine process --flat log-probs--> TeacherScores

Scores at given ids come from `prompt_logprob_token_ids` on GPUs (vLLM's V2 runner), from the full vocabulary elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine.async_llm import AsyncLLM

from asyncopd.config.engines import VllmEngine
from asyncopd.errors import EngineError
from asyncopd.ports import ScoreRequest
from asyncopd.teacher.prompt_logprobs import FULL, PromptAnswer, all_answers, num_logprobs, scores_of
from asyncopd.teacher.rows import asked_ids
from asyncopd.types import TeacherScores, Trajectory
from asyncopd.vllm.engine import final_output, start_engine, stop_engine
from asyncopd.vllm.model_folder import ModelFolder


class VllmScorer:
    """Implements `ports.Scorer`. The engine starts with `start` or the first `score`."""

    def __init__(
        self,
        model: str,
        *,
        name: str,
        tokenizer_digest: str,
        vocab_size: int,
        max_context: int,
        max_sequences: int = 64,
        settings: VllmEngine | None = None,
        owned_folder: ModelFolder | None = None,
    ) -> None:
        """
        Args:
            model: directory in Hugging Face format, or a hub name; loaded by the engine process.
            name: names the score shards.
            tokenizer_digest: of the tokenizer the teacher was trained with; must equal the student's.
            vocab_size: ids that exist; the rows of the model's head may be more.
            max_context: most tokens of prompt and response together.
            max_sequences: trajectories in one batch.
            owned_folder: emptied of weights once they are loaded, removed by `close`.
        """
        self.name = name
        self.tokenizer_digest = tokenizer_digest
        self._settings = settings or VllmEngine()
        self.digest = model_digest(model, self._settings.dtype)
        self._model, self._vocab_size = model, vocab_size
        self._max_context, self._max_sequences = max_context, max_sequences
        self._owned_folder = owned_folder
        self._starting: asyncio.Task[AsyncLLM] | None = None
        self._num_requests = 0

    async def start(self) -> None:
        """Start the engine, unless it runs; see `ports.Scorer`.

        Raises:
            EngineError: vLLM cannot serve the model, or did not start.
        """
        await self._started()

    async def score(self, trajectories: Sequence[Trajectory], request: ScoreRequest) -> list[TeacherScores]:
        """Score every response token; see `ports.Scorer`.

        Raises:
            EngineError: a request that cannot be answered exactly, a trajectory that exceeds the teacher's context, or
                a failed engine.
        """
        engine = await self._started()
        scores_ids = bool(engine.vllm_config.use_v2_model_runner)
        number = num_logprobs(
            trajectories, request, vocab_size=self._vocab_size, scores_ids=scores_ids, teacher=self.name
        )
        for trajectory in trajectories:
            num_tokens = len(trajectory.prompt_ids) + len(trajectory.response_ids)
            if num_tokens > self._max_context:
                raise EngineError(
                    f"index {trajectory.index}: {num_tokens} tokens exceed the {self._max_context} of teacher "
                    f"{self.name}. Lower rollout.max_new_tokens or use a teacher with a longer context."
                )
        answers = await all_answers([self._answer(engine, trajectory, number) for trajectory in trajectories])
        return [
            scores_of(trajectory, answer, request, full=number == FULL, teacher=self.name, digest=self.digest)
            for trajectory, answer in zip(trajectories, answers, strict=True)
        ]

    async def close(self) -> None:
        """End the engine process, waiting for one that is starting; harmless when repeated."""
        starting, self._starting = self._starting, None
        if starting is not None:
            with contextlib.suppress(EngineError):
                engine = await starting
                await stop_engine(engine)
        if self._owned_folder is not None:
            self._owned_folder.remove()

    async def _started(self) -> AsyncLLM:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        # A cancelled call must not end the engine of the others.
        return await asyncio.shield(self._starting)

    async def _start(self) -> AsyncLLM:
        engine = await start_engine(
            self._model,
            self._settings,
            name=f"teacher {self.name}",
            # vLLM keeps room for one generated token, which is thrown away.
            max_context=self._max_context + 1,
            max_sequences=self._max_sequences,
            num_ids=self._vocab_size,
            max_logprobs=FULL,
            enable_prefix_caching=False,
        )
        if self._owned_folder is not None:
            self._owned_folder.drop_weights()
        return engine

    async def _answer(self, engine: AsyncLLM, trajectory: Trajectory, number: int) -> PromptAnswer:
        num_prompt = len(trajectory.prompt_ids)
        asked: dict[str, Any] = {}
        if number != FULL and asked_ids(trajectory).shape[1] > 1:
            asked = {"prompt_logprob_token_ids": asked_ids(trajectory), "prompt_logprob_start": num_prompt - 1}
        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=number, flat_logprobs=True, detokenize=False, **asked
        )
        ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).tolist()
        self._num_requests += 1
        output = await final_output(
            engine,
            {"prompt_token_ids": ids},
            params,
            request_id=f"score-{trajectory.index}-{self._num_requests}",
            index=trajectory.index,
            name=f"the vLLM engine of teacher {self.name}",
        )
        flat = output.prompt_logprobs
        assert isinstance(flat, FlatLogprobs)
        width = 1 + (engine.model_config.get_vocab_size() if number == FULL else number)
        # Descending, so that rows of the head that are no ids, and have no mass, come last.
        kept = slice(1, 1 + self._vocab_size)
        # Row i of the answer predicts prompt token i; the first has none. The token itself comes first in its row.
        start = flat.start_indices[num_prompt]
        ids_TJ = np.array(flat.token_ids[start:], np.int32).reshape(-1, width)
        logprobs_TJ = np.array(flat.logprobs[start:], np.float32).reshape(-1, width)
        return PromptAnswer(
            sampled_logprobs_T=logprobs_TJ[:, 0],
            ids_TJ=ids_TJ[:, kept],
            logprobs_TJ=logprobs_TJ[:, kept],
            asked_logprobs_TA=output.prompt_token_id_logprobs,
        )


def model_digest(model: str, *facts: str) -> str:
    """sha256 (hex) of what decides a teacher's numbers: configuration and weights of a directory, or the hub name."""
    folder = Path(model)
    parts = hashlib.sha256(json.dumps(["vllm", *facts]).encode())
    if not folder.is_dir():
        parts.update(model.encode())
        return parts.hexdigest()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            parts.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return parts.hexdigest()
