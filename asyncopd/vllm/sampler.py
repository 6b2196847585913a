"""`VllmSampler`: vLLM's AsyncLLM behind the Sampler port. One engine process, fed with as many requests as there are.

    sample()  --prompt ids, random key--> engine process: RecordingDraw --token ids, version spans--> RequestOutput
       ^------------ ids, log-probs, candidates <--collective RPC: take_records ---------------------------+
    refresh() --pause, reload_weights from a file, version label, resume--> engine process

Tokens are a function of seed, index, position and weights, as in the hf engine, up to rounding: another batch may round
a logit differently, and a draw that falls on the edge between two ids then goes to the other one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from asyncopd.config.engines import VllmSampling
from asyncopd.errors import EngineAwayError, EngineError
from asyncopd.models.sampling import SamplerSettings, policy_key
from asyncopd.ports import InFlight, SampleRequest
from asyncopd.rollout.decoding import check_request
from asyncopd.types import PolicyVersion, PolicyWeights, Trajectory
from asyncopd.vllm.engine import final_output, start_engine, stop_engine
from asyncopd.vllm.recorder import KEY, LAW, NUM_IDS, TICKET
from asyncopd.vllm.student_files import StudentFiles, trajectory_of

logger = logging.getLogger(__name__)
STARTING = "starts its vLLM engine, which loads the weights, compiles and makes its cache"
HEALTH_S = 0.5
"""How often a call that is not answered yet asks whether the engine process is alive."""


class VllmSampler:
    """Implements `ports.Sampler`. The engine starts with the first `refresh`, whose weights it loads."""

    def __init__(
        self, architecture: Mapping[str, Any], sampling: SamplerSettings, *, settings: VllmSampling | None = None
    ) -> None:
        """
        Args:
            architecture: the student's transformers configuration, `model_type` and `vocab_size` included.
            settings: of the engine.
        Raises:
            ConfigError: a sampling law that is no distribution.
            EngineError: transformers does not know the architecture.
        """
        # The recorder is a logits processor of the V1 runner; the V2 runner has another interface for them.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        self._files = StudentFiles(architecture)
        self._vocab_size = int(architecture.get("num_ids", architecture["vocab_size"]))
        self._rule, self._sampling = sampling.rule(self._vocab_size), sampling
        self._settings = settings or VllmSampling()
        self._engine: AsyncLLM | None = None
        self._version: PolicyVersion | None = None
        self._closed = False
        self._refreshing = asyncio.Lock()
        self._running: set[asyncio.Task[RequestOutput]] = set()
        self._finished: dict[str, asyncio.Future[tuple[bytes, bytes]]] = {}
        self._abandoned: list[str] = []
        self._fetching: asyncio.Task[None] | None = None
        self._busy: list[tuple[float, float]] = []
        self._busy_since = 0.0
        self._doing: str | None = None
        self._num_finished_tokens = 0

    @property
    def version(self) -> PolicyVersion | None:
        return self._version

    @property
    def num_active(self) -> int:
        """Responses in the engine, its own queue included."""
        return len(self._running)

    def in_flight(self) -> InFlight:
        """See `ports.Sampler`. Tokens reach this process as they are made; only outputs come at their end."""
        states = list(self._engine.output_processor.request_states.values()) if self._engine else []
        lengths = [state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None]
        num_prefilling = lengths.count(0)
        doing = f"prefills {num_prefilling} prompt{'s' * (num_prefilling > 1)}" if num_prefilling else None
        return InFlight(self._doing or doing, self.num_active, self._num_finished_tokens + sum(lengths))

    def busy_intervals(self) -> list[tuple[float, float]]:
        """(start, end) of the stretches in which the engine had responses to make since the last call, Unix seconds."""
        now = time.time()
        drained, self._busy = self._busy, []
        if self._running:
            drained.append((self._busy_since, now))
            self._busy_since = now
        return drained

    async def weight_version(self) -> str:
        """The label the engine process itself gives its weights: `number.rewind` of a PolicyVersion."""
        label: str = await self._started().get_weight_version()
        return label

    async def sample(self, request: SampleRequest) -> Trajectory:
        """Generate one response; see `ports.Sampler`.

        Raises:
            EngineError: no weights yet, an empty or invalid prompt, no room for the response, or a failed engine.
        """
        if self._closed:
            raise EngineError("the sampler was closed; make a new one.")
        check_request(
            request,
            max_context=self._sampling.max_context,
            vocab_size=self._vocab_size,
            has_weights=self._version is not None,
        )
        ticket = uuid.uuid4().hex
        try:
            output = await self._generate(request, ticket)
            self._num_finished_tokens += len(output.outputs[0].token_ids)
            ids_bytes, logprobs_bytes = await self._records_of(ticket)
        except BaseException:
            self._abandoned.append(ticket)
            raise
        return trajectory_of(
            request, output.outputs[0], ids_bytes, logprobs_bytes, rule=self._rule, stop_ids=self._sampling.stop_ids
        )

    async def refresh(self, weights: PolicyWeights) -> None:
        """Switch to other weights; what happens to responses in progress is `settings.in_flight`.

        Raises:
            EngineError: the weights do not fit the architecture (the engine goes on with the old ones), or a failed
                engine.
        """
        async with self._refreshing:
            self._doing = f"loads version {weights.version.number}"
            try:
                await self._switch(weights)
            finally:
                self._doing = None

    async def close(self) -> None:
        """End the engine process and fail what is pending; harmless when repeated."""
        self._closed = True
        for task in [*self._running, *([self._fetching] if self._fetching else [])]:
            task.cancel()
        engine, self._engine = self._engine, None
        if engine is not None:
            await stop_engine(engine)
        _fail(self._finished.values(), _closed_error())
        self._files.folder.remove()

    # -- engine ---------------------------------------------------------------------------------------------------
    async def _switch(self, weights: PolicyWeights) -> None:
        await asyncio.to_thread(self._files.write, weights)
        if self._engine is None:
            self._doing = STARTING
            self._engine = await self._start()
        else:
            await self._reload(self._engine)
        self._files.folder.drop_weights()
        engine = self._started()
        label = engine.update_weight_version(_label(weights.version))
        await self._calling(engine, label, "label its weights")
        self._version = weights.version
        await self._calling(engine, engine.resume_generation(), "resume generation")

    async def _start(self) -> AsyncLLM:
        if self._closed:
            raise EngineError("the sampler was closed; make a new one.")
        return await start_engine(
            self._files.path,
            self._settings,
            name="sampler",
            max_context=self._sampling.max_context,
            max_sequences=self._sampling.slots,
            logits_processors=["asyncopd.vllm.recorder:RecordingDraw"],
            num_ids=self._vocab_size,
            additional_config={LAW: asdict(self._sampling), NUM_IDS: self._vocab_size},
        )

    async def _reload(self, engine: AsyncLLM) -> None:
        """Pause, load the file just written, and leave the engine paused."""
        in_flight = self._settings.in_flight
        mode = "wait" if in_flight == "finish" else "keep"
        pause = engine.pause_generation(mode=mode, clear_cache=in_flight != "keep")
        await self._calling(engine, pause, "pause generation")
        reload = engine.collective_rpc("reload_weights", kwargs={"weights_path": self._files.path})
        await self._calling(engine, reload, "reload its weights")

    async def _generate(self, request: SampleRequest, ticket: str) -> RequestOutput:
        """The final output of one request. A task of its own, so that `close` can end it."""
        if not self._running:
            self._busy_since = time.time()
        task = asyncio.create_task(self._final_output(request, ticket))
        self._running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self._closed:
                raise _closed_error() from None
            # Our caller was cancelled, and with it the task: vLLM aborts the request.
            raise
        finally:
            self._running.discard(task)
            if not self._running:
                self._busy.append((self._busy_since, time.time()))

    async def _final_output(self, request: SampleRequest, ticket: str) -> RequestOutput:
        params = SamplingParams(
            # The recorder leaves one id possible; taking the largest logit skips vLLM's own samplers.
            temperature=0.0,
            max_tokens=request.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=list(self._sampling.stop_ids),
            detokenize=False,
            # Tokens are fetched with their records; nothing needs them one by one.
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={TICKET: ticket, KEY: policy_key(self._sampling.seed, request.index)},
        )
        # Salted: no version reads prefix blocks that another one wrote.
        prompt = {"prompt_token_ids": request.prompt_ids.tolist(), "cache_salt": _label(self._version)}
        name = f"the vLLM sampler's engine under version {self._version}"
        return await final_output(self._started(), prompt, params, request_id=ticket, index=request.index, name=name)

    async def _records_of(self, ticket: str) -> tuple[bytes, bytes]:
        """What the engine process recorded for a finished response. One RPC serves all that finished meanwhile."""
        future = self._finished[ticket] = asyncio.get_running_loop().create_future()
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch())
        records: tuple[bytes, bytes] = await future
        return records

    async def _fetch(self) -> None:
        while self._finished:
            asked, self._finished = self._finished, {}
            abandoned, self._abandoned = self._abandoned, []
            try:
                engine = self._started()
                call = engine.collective_rpc("take_records", args=(list(asked), abandoned))
                # Every worker of a tensor-parallel engine draws the same; the first one's records are enough.
                records = (await self._calling(engine, call, "hand out its records"))[0]
            except Exception as error:
                _fail(asked.values(), error)
                continue
            except asyncio.CancelledError:
                _fail(asked.values(), _closed_error())
                raise
            for future, (ids_bytes, logprobs_bytes) in zip(asked.values(), records, strict=True):
                if not future.done():
                    future.set_result((ids_bytes, logprobs_bytes))

    def _started(self) -> AsyncLLM:
        if self._engine is None or self._closed:
            raise EngineError("the vLLM sampler's engine does not run: it starts with the first refresh.")
        return self._engine

    async def _calling(self, engine: AsyncLLM, call: Coroutine[Any, Any, Any], what: str) -> Any:
        """The answer to a call of the engine process, or an EngineError: vLLM leaves it unanswered when that dies."""
        calling = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({calling}, timeout=HEALTH_S))[0]:
                await engine.check_health()
            return calling.result()
        except Exception as error:
            raise EngineAwayError(
                f"the vLLM sampler's engine under version {self._version} could not {what}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            calling.cancel()


def _fail(futures: Iterable[asyncio.Future[Any]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)


def _closed_error() -> EngineError:
    return EngineError("the sampler was closed; its unfinished responses are lost and can be sampled again.")


def _label(version: PolicyVersion | None) -> str:
    assert version is not None  # check_request refused before
    return f"{version.number}.{version.rewind}"
