"""`OpenAIScorer`: a teacher behind one or more vLLM-compatible HTTP servers, behind the Scorer port.

    trajectories --POST /v1/completions: token ids, prompt_logprobs--> server 1 | server 2 | ...  --> TeacherScores
                     bounded concurrency; a transient failure goes to the next server after a growing pause

Before the first score every server is asked for its model, context, tokenizer, vocabulary and number of log-probs.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from asyncopd.errors import EngineError
from asyncopd.ports import ScoreRequest, Tokenizer
from asyncopd.teacher.prompt_logprobs import FULL, PromptAnswer, all_answers, num_logprobs, scores_of
from asyncopd.types import TeacherScores, Trajectory

logger = logging.getLogger(__name__)

_PROBES = ("Natalia sold 48/2 = 24 clips.\n", "naïve café, 東京 🙂", "  def f(x):\n\treturn x\n")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class OpenAIScorer:
    """Implements `ports.Scorer`. Scores candidates, temperatures and draws only where the server gives all ids."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str,
        name: str,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_context: int,
        compare_text: bool = True,
        concurrency: int = 32,
        timeout_s: float = 120.0,
        max_retries: int = 6,
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            urls: base URLs such as `http://teacher-0:8000`, all serving the same model.
            model: the name they serve it under.
            name: names the score shards.
            tokenizer: the student's; the servers must split text as it does.
            vocab_size: ids the teacher must know: the student's.
            max_context: most tokens of prompt and response together.
            compare_text: compare tokenizers by text. Off for tasks whose ids no tokenizer makes from text.
            concurrency: requests under way at once, over all servers.
            timeout_s: of one request.
            max_retries: further tries of one request after transient failures.
        """
        self.name = name
        self.tokenizer_digest = tokenizer.digest
        self.digest = hashlib.sha256(f"openai/{model}/{name}".encode()).hexdigest()
        self._urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._model, self._tokenizer, self._vocab_size = model, tokenizer, vocab_size
        self._max_context, self._compare_text = max_context, compare_text
        self._max_retries = max_retries
        self._turns = asyncio.Semaphore(concurrency)
        self._turn = itertools.count()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=concurrency + len(self._urls))
        self._client = httpx.AsyncClient(timeout=timeout_s, headers=headers, limits=limits)
        self._checking = asyncio.Lock()
        self._checked: set[int] = set()
        """Values of `prompt_logprobs` that every server accepted."""

    async def score(self, trajectories: Sequence[Trajectory], request: ScoreRequest) -> list[TeacherScores]:
        """Score every response token; see `ports.Scorer`.

        Raises:
            EngineError: the servers do not fit the run, refuse a request, or stay away longer than the retries last.
        """
        number = num_logprobs(trajectories, request, vocab_size=self._vocab_size, scores_ids=False, teacher=self.name)
        await self.check(number)
        answers = await all_answers([self._answer(trajectory, number) for trajectory in trajectories])
        return [
            scores_of(trajectory, answer, request, full=number == FULL, teacher=self.name, digest=self.digest)
            for trajectory, answer in zip(trajectories, answers, strict=True)
        ]

    async def check(self, number: int) -> None:
        """Ask every server once whether it can serve this run with `prompt_logprobs = number`.

        Raises:
            EngineError: what does not fit, on which server, and what to change.
        """
        async with self._checking:
            if number not in self._checked:
                await asyncio.gather(*(self._check_server(url, number) for url in self._urls))
                self._checked.add(number)

    async def close(self) -> None:
        """Close the connections; harmless when repeated."""
        await self._client.aclose()

    # -- start-up checks --------------------------------------------------------------------------------------------
    async def _check_server(self, url: str, number: int) -> None:
        models = {model["id"]: model for model in (await self._ask(url, "GET", "/v1/models", None))["data"]}
        if self._model not in models:
            raise EngineError(
                f"teacher {self.name}: {url} serves {sorted(models)}, not {self._model!r}. Correct teacher.model or "
                "start it with --served-model-name."
            )
        room = models[self._model].get("max_model_len")
        if room is not None and room < self._max_context + 1:
            raise EngineError(
                f"teacher {self.name}: {url} has a context of {room} tokens; this run needs {self._max_context} and "
                f"one more. Start it with --max-model-len {self._max_context + 1}."
            )
        if self._compare_text:
            await self._check_tokenizer(url)
        try:
            # The student's last id: an id the teacher does not know is refused.
            answer = await self._ask(url, "POST", "/v1/completions", self._body([0, self._vocab_size - 1], number))
        except _RefusedError as error:
            raise EngineError(
                f"teacher {self.name}: {url} refuses ids up to {self._vocab_size - 1} (the student's vocabulary) with "
                f"prompt_logprobs {number}: {error}. Serve a model with the student's tokenizer, with --max-logprobs "
                f"{'-1' if number == FULL else number} or more."
            ) from error
        rows = answer["choices"][0].get("prompt_logprobs")
        if rows is None:
            raise EngineError(
                f"teacher {self.name}: {url} answers completions without prompt_logprobs. Expected a server that "
                "extends OpenAI's completions by them, as vLLM does."
            )
        found = len(rows[1])
        if number == FULL and found != self._vocab_size:
            raise EngineError(
                f"teacher {self.name}: {url} has a vocabulary of {found} ids, the student {self._vocab_size}. Scores "
                "from the full vocabulary need the same one."
            )

    async def _check_tokenizer(self, url: str) -> None:
        for text in _PROBES:
            body = {"model": self._model, "prompt": text, "add_special_tokens": False}
            try:
                found = (await self._ask(url, "POST", "/tokenize", body))["tokens"]
            except _RefusedError as error:
                raise EngineError(
                    f"teacher {self.name}: {url} does not tell how it splits text ({error}), so its tokenizer cannot "
                    "be compared with the student's. Use a server with POST /tokenize, or set teacher.compare_text to "
                    "false if you know that they are the same."
                ) from error
            if found != (expected := self._tokenizer.encode(text)):
                raise EngineError(
                    f"teacher {self.name}: {url} splits {text!r} into {found}, the student's tokenizer into "
                    f"{expected}. Distillation compares log-probs of the same ids; serve a model of the same family."
                )

    # -- requests ---------------------------------------------------------------------------------------------------
    def _body(self, ids: list[int], number: int) -> dict[str, Any]:
        return {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": number}

    async def _answer(self, trajectory: Trajectory, number: int) -> PromptAnswer:
        ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).tolist()
        async with self._turns:
            try:
                answer = await self._ask(None, "POST", "/v1/completions", self._body(ids, number))
            except _RefusedError as error:
                raise EngineError(
                    f"index {trajectory.index}: teacher {self.name} refused {len(ids)} tokens with prompt_logprobs "
                    f"{number}: {error}"
                ) from error
        rows = answer["choices"][0].get("prompt_logprobs")
        if rows is None or len(rows) != len(ids):
            raise EngineError(
                f"index {trajectory.index}: teacher {self.name} answered {len(rows or ())} rows of prompt_logprobs for "
                f"{len(ids)} tokens. Expected a server that extends completions by prompt_logprobs, as vLLM does."
            )
        return _parsed(rows[len(trajectory.prompt_ids) :], trajectory, number, self._vocab_size)

    async def _ask(self, url: str | None, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """One answer, of `url` or of any server; tries again after transient failures."""
        problem = ""
        pause_s = _FIRST_PAUSE_S
        first = next(self._turn)
        for attempt in range(1 + self._max_retries):
            if attempt:
                # Jitter: a server that comes back is not hit by everybody at once.
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            base = url or self._urls[(first + attempt) % len(self._urls)]
            try:
                response = await self._client.request(method, base + path, json=body)
            except httpx.TransportError as error:
                problem = f"{base}{path}: {type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return response.json()
                problem = f"{base}{path}: status {response.status_code}: {response.text[:300]}"
                if response.status_code not in _TRANSIENT:
                    raise _RefusedError(problem)
            logger.warning("teacher %s, try %d of %d: %s", self.name, attempt + 1, 1 + self._max_retries, problem)
        raise EngineError(
            f"teacher {self.name} did not answer in {1 + self._max_retries} tries; the last: {problem}. Is the server "
            "up? What is unscored stays in storage; go on with the same run when it is."
        )


class _RefusedError(Exception):
    """A server answered that it will never do this."""


def _parsed(
    rows: Sequence[Mapping[str, Mapping[str, Any]]], trajectory: Trajectory, number: int, vocab_size: int
) -> PromptAnswer:
    """Rows of {id: {logprob, rank}}; the prompt token's own entry is among them, in or beside the top k."""
    width = vocab_size if number == FULL else number
    num_tokens = len(rows)
    ids_TJ = np.zeros((num_tokens, width), np.int32)
    logprobs_TJ = np.full((num_tokens, width), np.nan, np.float32)
    sampled_T = np.full(num_tokens, np.nan, np.float32)
    for t, (row, token_id) in enumerate(zip(rows, trajectory.response_ids.tolist(), strict=True)):
        sampled_T[t] = row[str(token_id)]["logprob"]
        ranked = sorted(row.items(), key=lambda entry: -entry[1]["logprob"])[:width]
        ids_TJ[t, : len(ranked)] = [int(entry[0]) for entry in ranked]
        logprobs_TJ[t, : len(ranked)] = [entry[1]["logprob"] for entry in ranked]
    return PromptAnswer(sampled_logprobs_T=sampled_T, ids_TJ=ids_TJ, logprobs_TJ=logprobs_TJ)
