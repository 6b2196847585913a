"""`HfSampler`: a transformers student behind the Sampler port. One engine thread owns the model and its slots.

    sample() ---request---> inbox --admit--> Decoder --step--> Trajectory ---> the caller's future
    refresh() --weights---> inbox --between two steps--^                       (call_soon_threadsafe, once per step)
                                    without in-flight updates: admit waits, load once the last slot is free

The engine thread waits on a condition when nothing is active and nothing is in the inbox. An error in a step ends the
engine: every caller, present and future, gets it as EngineError. Needs no lock but the inbox's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from asyncopd.errors import AsyncOPDError, EngineAwayError, EngineError
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import InFlight, SampleRequest
from asyncopd.rollout.decoding import Decoder, check_request
from asyncopd.types import PolicyVersion, PolicyWeights, Trajectory

logger = logging.getLogger(__name__)

_CLOSE_DEADLINE_S = 1.0
# Pauses shorter than this between two steps belong to one busy interval.
_COALESCE_S = 0.02


@dataclass(frozen=True)
class _Pending:
    """A call that waits, and where its answer goes."""

    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    work: SampleRequest | PolicyWeights


class HfSampler:
    """Sampler engine on a transformers model; continuous batching, seeded per trajectory index."""

    def __init__(self, model: PreTrainedModel, settings: SamplerSettings, *, in_flight_updates: bool = True) -> None:
        """Start the engine thread. Nothing can be sampled before the first `refresh`.

        Args:
            model: the student's architecture on its device and in its dtype; owned by the sampler from here on.
            in_flight_updates: whether responses in progress go on under new weights. Otherwise a refresh lets them end
                first, with no new ones beside them, so the batch runs empty once per refresh.
        Raises:
            ConfigError: a sampling law that is no distribution.
            EngineError: the model cannot serve `max_context` or be given slots.
        """
        self._decoder = Decoder(model, settings)
        self._in_flight_updates = in_flight_updates
        self._waiting: deque[_Pending] = deque()
        self._refreshes: deque[_Pending] = deque()
        self._running: dict[int, _Pending] = {}
        self._wake = threading.Condition()
        self._failure: EngineError | None = None
        self._busy: list[tuple[float, float]] = []
        self._loading: PolicyVersion | None = None
        self.num_generated_tokens = 0
        """Tokens of finished and unfinished responses since construction."""
        self._thread = threading.Thread(target=self._serve, name="hf-sampler", daemon=True)
        self._thread.start()

    @property
    def version(self) -> PolicyVersion | None:
        return self._decoder.version

    @property
    def num_active(self) -> int:
        """Responses in a slot right now."""
        return self._decoder.num_active

    @property
    def num_waiting(self) -> int:
        """Requests without a slot; 0 means that the batch may be running empty."""
        return len(self._waiting)

    def in_flight(self) -> InFlight:
        """See `ports.Sampler`."""
        loading, num_prefilling = self._loading, self._decoder.num_prefilling
        doing = f"prefills {num_prefilling} prompt{'s' * (num_prefilling > 1)}" if num_prefilling else None
        if loading is not None:
            doing = f"loads version {loading.number}"
        return InFlight(doing, self._decoder.num_active, self.num_generated_tokens)

    def busy_intervals(self) -> list[tuple[float, float]]:
        """(start, end) of the engine's busy stretches since the last call, Unix seconds, in order."""
        with self._wake:
            drained, self._busy = self._busy, []
        return drained

    async def sample(self, request: SampleRequest) -> Trajectory:
        """Generate one response; see `ports.Sampler`.

        Raises:
            EngineError: no weights yet, an empty or invalid prompt, no room for the response, or a failed engine.
        """
        decoder = self._decoder
        check_request(
            request,
            max_context=decoder.max_context,
            vocab_size=decoder.vocab_size,
            has_weights=decoder.version is not None,
        )
        trajectory: Trajectory = await self._submit(request, self._waiting)
        return trajectory

    async def refresh(self, weights: PolicyWeights) -> None:
        """Switch to other weights between two steps; see `ports.Sampler`.

        Raises:
            EngineError: the weights do not fit the model (which goes on with the old ones), or a failed engine.
        """
        await self._submit(weights, self._refreshes)

    async def close(self) -> None:
        """Stop the engine thread and fail what is pending, within a second; harmless when repeated."""
        self._stop(EngineError("the sampler was closed; its unfinished responses are lost and can be sampled again."))
        await asyncio.to_thread(self._thread.join, _CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            logger.warning("hf-sampler: still in a forward pass %.0f s after close; it ends with it", _CLOSE_DEADLINE_S)

    async def _submit(self, work: SampleRequest | PolicyWeights, inbox: deque[_Pending]) -> Any:
        loop = asyncio.get_running_loop()
        pending = _Pending(loop.create_future(), loop, work)
        with self._wake:
            if self._failure is not None:
                raise type(self._failure)(*self._failure.args)
            inbox.append(pending)
            self._wake.notify()
        return await pending.future

    # -- engine thread ------------------------------------------------------------------------------------------
    def _serve(self) -> None:
        try:
            with torch.inference_mode():
                while self._take():
                    if self._decoder.num_active:
                        self._step()
        except Exception as error:
            logger.exception("hf-sampler: the engine failed")
            reason = str(error) if isinstance(error, AsyncOPDError) else f"{type(error).__name__}: {error}"
            # Not ours: out of memory, a driver's error.
            kind = EngineError if isinstance(error, AsyncOPDError) else EngineAwayError
            self._stop(kind(f"the sampler's engine failed: {reason}"))

    def _take(self) -> bool:
        """Wait for work, load pending weights, fill free slots. False when the engine is to stop."""
        decoder = self._decoder
        with self._wake:
            while not (self._failure or self._refreshes or self._waiting or decoder.num_active):
                self._wake.wait()
            if self._refreshes and decoder.num_active and not self._in_flight_updates:
                # What is in a slot ends under the weights it started with; nothing may start under those any more.
                return self._failure is None
            refreshes = list(self._refreshes)
            self._refreshes.clear()
        for pending in refreshes:
            self._load(pending)
        with self._wake:
            while self._waiting and decoder.num_free and not self._failure:
                pending = self._waiting.popleft()
                if not pending.future.cancelled():
                    assert isinstance(pending.work, SampleRequest)
                    self._running[decoder.admit(pending.work)] = pending
            return self._failure is None

    def _load(self, pending: _Pending) -> None:
        """Give the decoder other weights; weights that do not fit fail their `refresh` call and nothing else."""
        assert isinstance(pending.work, PolicyWeights)
        start, problem = time.time(), None
        self._loading = pending.work.version
        try:
            self._decoder.refresh(pending.work)
        except EngineError as error:
            problem = error
        self._loading = None
        _answer([(pending, problem)])
        self._record_busy(start, time.time())

    def _step(self) -> None:
        start = time.time()
        num_active = self._decoder.num_active
        finished = self._decoder.step()
        self.num_generated_tokens += num_active
        self._record_busy(start, time.time())
        if finished:
            with self._wake:
                # Gone from `_running` when the sampler was closed meanwhile.
                answers = [(self._running.pop(ticket), made) for ticket, made in finished if ticket in self._running]
            _answer(answers)

    def _record_busy(self, start: float, end: float) -> None:
        with self._wake:
            if self._busy and start - self._busy[-1][1] < _COALESCE_S:
                start = self._busy.pop()[0]
            self._busy.append((start, end))

    def _stop(self, failure: EngineError) -> None:
        """Fail everything pending and everything to come; the first failure is kept."""
        with self._wake:
            self._failure = self._failure or failure
            pending = [*self._running.values(), *self._waiting, *self._refreshes]
            self._running.clear()
            self._waiting.clear()
            self._refreshes.clear()
            self._wake.notify()
        _answer([(each, type(failure)(*failure.args)) for each in pending])


def _answer(answers: Iterable[tuple[_Pending, Any]]) -> None:
    """Resolve futures in their own loops, one wake-up for each loop; an exception as answer is raised there."""
    by_loop = defaultdict(list)
    for pending, answer in answers:
        by_loop[pending.loop].append((pending.future, answer))
    for loop, resolved in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, resolved)
        except RuntimeError:
            # The loop was closed, so nobody awaits these any more.
            logger.info("hf-sampler: %d answers for a closed event loop were dropped", len(resolved))


def _resolve(resolved: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in resolved:
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
