"""`OpenAIScorer`: a teacher behind one or more vLLM-compatible HTTP servers, behind the Scorer port.

    trajectories --POST /v1/completions: token ids, prompt_logprobs--> server 1 | server 2 | ...  --> TeacherScores
                     bounded concurrency; a transient failure goes to the next server after a growing pause

Before the first score every server is asked for its model, context, tokenizer, vocabulary and number of log-probs.
What is no log-prob in an answer (null, a word, an id left out) is an error that names URL, request and index.
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

from asyncopd.errors import EngineAwayError, EngineError
from asyncopd.ports import ScoreRequest, Tokenizer
from asyncopd.teacher.prompt_logprobs import FULL, PromptAnswer, all_answers, num_logprobs, scores_of
from asyncopd.types import TeacherScores, Trajectory

logger = logging.getLogger(__name__)

_PROBES = ("Natalia sold 48/2 = 24 clips.\n", "naïve café, 東京 🙂", "  def f(x):\n\treturn x\n")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_NUM_FIRST, _NUM_LAST, _NUM_SPREAD = 128, 288, 256
"""Ids whose text is compared: special tokens are the first ids (Gemma) or the last ones (256 of Llama 3)."""
_ROUNDING = 0.01
"""Nats; log-probs in float16 may be this much above 0."""
_EXPECTED = "expected a row of ids with a log-prob each, a number of at most 0"


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
            compare_text: compare tokenizers by texts and ids. Off for tasks whose ids no tokenizer makes from text.
            concurrency: requests under way at once, over all servers.
            timeout_s: of one request.
            max_retries: further tries of one request after transient failures.
        """
        self.name = name
        # Servers tell no digest. It is the student's because `check` compares what both do with texts and ids.
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

    async def start(self) -> None:
        """Nothing to start here: the first score checks the servers."""

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
        try:
            _, answer = await self._ask(url, "GET", "/v1/models", None)
        except _RefusedError as error:
            raise EngineError(
                f"teacher {self.name}: {error}. Expected a server that tells its models, as `vllm serve` does."
            ) from error
        listed = answer.get("data")
        models = {str(m.get("id")): m for m in listed if isinstance(m, dict)} if isinstance(listed, list) else {}
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
            body = self._body([0, self._vocab_size - 1], number)
            address, answer = await self._ask(url, "POST", "/v1/completions", body)
        except _RefusedError as error:
            raise EngineError(
                f"teacher {self.name}: {url} refuses ids up to {self._vocab_size - 1} (the student's vocabulary) with "
                f"prompt_logprobs {number}: {error}. Serve a model with the student's tokenizer, with --max-logprobs "
                f"{'-1' if number == FULL else number} or more."
            ) from error
        row = _rows(answer, 2, f"teacher {self.name}: {address}")[1]
        found = len(row) if isinstance(row, dict) else 0
        if number == FULL and found != self._vocab_size:
            raise EngineError(
                f"teacher {self.name}: {url} has a vocabulary of {found} ids, the student {self._vocab_size}. Scores "
                "from the full vocabulary need the same one."
            )

    async def _check_tokenizer(self, url: str) -> None:
        for text in _PROBES:
            found = await self._ask_tokenizer(url, "/tokenize", "tokens", prompt=text, add_special_tokens=False)
            if found != (expected := self._tokenizer.encode(text)):
                raise EngineError(
                    f"teacher {self.name}: {url} splits {text!r} into {found}, the student's tokenizer into "
                    f"{expected}. Distillation compares log-probs of the same ids; serve a model of the same family."
                )

        # Texts hardly ever become special tokens. These stand first or last, so all ids there, and a spread between.
        num_ids = self._tokenizer.vocab_size
        first, last = range(min(_NUM_FIRST, num_ids)), range(max(0, num_ids - _NUM_LAST), num_ids)
        named = {self._tokenizer.eos_id, self._tokenizer.pad_id}
        await self._compare_ids(url, sorted(named.union(first, last, range(0, num_ids, 1 + num_ids // _NUM_SPREAD))))

    async def _compare_ids(self, url: str, ids: list[int]) -> None:
        """Find an id that is another token for the server than for the student, by halves."""
        found = await self._ask_tokenizer(url, "/detokenize", "prompt", tokens=ids)
        expected = self._tokenizer.decode(ids)
        # Blanks aside: servers may drop those before punctuation.
        if "".join(str(found).split()) == "".join(expected.split()):
            return
        if len(ids) > 1:
            await self._compare_ids(url, ids[: len(ids) // 2])
            await self._compare_ids(url, ids[len(ids) // 2 :])
        raise EngineError(
            f"teacher {self.name}: for {url} the ids {ids[:8]} are {str(found)[:80]!r}, for the student's tokenizer "
            f"{expected[:80]!r}. Distillation compares log-probs of the same ids; serve a model with the student's "
            "tokenizer, special tokens included."
        )

    async def _ask_tokenizer(self, url: str, path: str, field: str, **asked: Any) -> Any:
        try:
            _, answer = await self._ask(url, "POST", path, {"model": self._model, **asked})
            return answer.get(field)
        except _RefusedError as error:
            raise EngineError(
                f"teacher {self.name}: {url} does not tell how it splits text ({error}), so its tokenizer cannot be "
                f"compared with the student's. Use a server with POST {path}, or set teacher.compare_text to false if "
                "you know that they are the same."
            ) from error

    # -- requests ---------------------------------------------------------------------------------------------------
    def _body(self, ids: list[int], number: int) -> dict[str, Any]:
        return {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": number}

    async def _answer(self, trajectory: Trajectory, number: int) -> PromptAnswer:
        ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).tolist()
        async with self._turns:
            try:
                address, answer = await self._ask(None, "POST", "/v1/completions", self._body(ids, number))
            except _RefusedError as error:
                raise EngineError(
                    f"index {trajectory.index}: teacher {self.name} refused {len(ids)} tokens with prompt_logprobs "
                    f"{number}: {error}"
                ) from error
        where = f"index {trajectory.index}: teacher {self.name}: {address} (prompt_logprobs {number})"
        rows = _rows(answer, len(ids), where)[len(trajectory.prompt_ids) :]
        return _parsed(rows, trajectory.response_ids.tolist(), number, self._vocab_size, where)

    async def _ask(
        self, url: str | None, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[str, dict[str, Any]]:
        """Address and answer of `url` or of any server; tries again after transient failures."""
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
                    return base + path, _json_object(response)
                problem = f"{base}{path}: status {response.status_code}: {response.text[:300]}"
                if response.status_code not in _TRANSIENT:
                    raise _RefusedError(problem)
            logger.warning("teacher %s, try %d of %d: %s", self.name, attempt + 1, 1 + self._max_retries, problem)
        raise EngineAwayError(
            f"teacher {self.name} did not answer in {1 + self._max_retries} tries; the last: {problem}. Is the server "
            "up? What is unscored stays in storage; go on with the same run when it is."
        )


class _RefusedError(EngineError):
    """A server answered that it will never do this."""


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise _RefusedError(f"{response.url}: expected a JSON object, found {response.text[:100]!r}")
    return answer


def _rows(answer: Mapping[str, Any], num_tokens: int, where: str) -> list[Any]:
    """The rows of prompt_logprobs, one for each token."""
    try:
        rows = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        rows = None
    if not isinstance(rows, list) or len(rows) != num_tokens:
        found = f"{len(rows)} rows of prompt_logprobs" if isinstance(rows, list) else "no prompt_logprobs"
        raise EngineError(
            f"{where} answers {found} for {num_tokens} tokens. Expected a server that extends OpenAI's completions by "
            "one row for each token, as vLLM does."
        )
    return rows


def _parsed(rows: Sequence[Any], response_ids: Sequence[int], number: int, vocab_size: int, where: str) -> PromptAnswer:
    """Rows of {id: {logprob, rank}}; the prompt token's own entry is among them, in or beside the top k.

    Raises:
        EngineError: a row is none, misses its token or entries, or holds what is no log-prob of a token that exists.
    """
    width = vocab_size if number == FULL else number
    ids_TJ = np.zeros((len(rows), width), np.int32)
    logprobs_TJ = np.zeros((len(rows), width), np.float32)
    sampled_T = np.zeros(len(rows), np.float32)
    for t, (row, token_id) in enumerate(zip(rows, response_ids, strict=True)):
        try:
            logprobs = {int(key): entry["logprob"] for key, entry in row.items()}
            wrong = next((k for k, v in logprobs.items() if type(v) not in (float, int) or not v <= _ROUNDING), None)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise EngineError(f"{where}: response token {t}: {_EXPECTED}, found {str(row)[:200]}.") from None
        if wrong is not None:
            raise EngineError(f"{where}: response token {t}: id {wrong}: {_EXPECTED}, found {logprobs[wrong]!r}.")
        ranked = sorted(logprobs, key=lambda key: -logprobs[key])[:width]
        if token_id not in logprobs or len(ranked) < width or not 0 <= min(logprobs) <= max(logprobs) < vocab_size:
            raise EngineError(
                f"{where}: response token {t}: found {len(logprobs)} ids from {min(logprobs, default=None)} to "
                f"{max(logprobs, default=None)}; expected the token's own, {token_id}, and {width} in all, each below "
                f"{vocab_size}. Does it serve a model with the student's tokenizer?"
            )
        sampled_T[t] = logprobs[token_id]
        ids_TJ[t] = ranked
        logprobs_TJ[t] = [logprobs[key] for key in ranked]
    return PromptAnswer(sampled_logprobs_T=sampled_T, ids_TJ=ids_TJ, logprobs_TJ=logprobs_TJ)
