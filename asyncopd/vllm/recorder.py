"""What AsyncOPD runs inside vLLM's engine process: draws tokens, keeps what was drawn, and ends with its role.

    logits --RecordingDraw.apply--> law, draws (models/sampling, the hf engine's own) --> all logits −inf but one
                       |                                                                    vLLM's argmax emits that
                       +--> store --EngineWorker.take_records (collective RPC)---> VllmSampler

A logits processor and worker extensions are vLLM's official extension points; its processes import them by name, so
this module imports no engine. vLLM's samplers are not used because they hand out no draws, their seeds crash the CPU
engine, and top-p kernels hide the truncated law.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from asyncopd.models.sampling import CandidateRule, SamplerSettings, draw, law_logprobs

TICKET, KEY, LAW, NUM_IDS = "asyncopd_ticket", "asyncopd_key", "asyncopd_law", "asyncopd_num_ids"
"""Names in a request's `extra_args` (its ticket and random key) and in the engine's `additional_config`."""
_LOOK_EVERY_S = 1.0


_Recording = dict[int, tuple[Tensor, Tensor, int]]
"""Where each token of one response is, by position: ids_AC and logprobs_AC of its step's whole batch, on their way to
the host or there, and its row in them."""


@dataclass(frozen=True)
class _Row:
    """One request in vLLM's batch."""

    recording: _Recording
    key: int
    output_ids: list[int]
    """vLLM's own list of the tokens so far; it grows by itself, also while a step is still in flight."""


_recordings: dict[str, _Recording] = {}
"""By ticket. One engine to a process, so one store."""


class RecordingDraw(LogitsProcessor):  # type: ignore[misc]  # vLLM is optional, so mypy does not read it
    """Draws every request's next token by its own random key, and lets vLLM emit exactly that."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._law = SamplerSettings(**vllm_config.additional_config[LAW])
        self._num_ids = int(vllm_config.additional_config[NUM_IDS])
        self._rule = CandidateRule(self._law.head, self._law.num_draws, self._law.law)
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _new_row)

    def apply(self, logits: Tensor) -> Tensor:
        """[A, V] float32: 0 at the drawn id, −inf elsewhere. Rows of no request of ours (vLLM's warm-up) stay."""
        batch_rows = sorted(row for row in self._rows if row < len(logits))
        if not batch_rows:
            return logits
        rows = [self._rows[row] for row in batch_rows]
        # vLLM counts for us: a preempted request goes on where it was, a chunk of a prompt draws position 0 in vain.
        positions_A = np.array([len(row.output_ids) for row in rows], np.int64)
        keys_A = np.array([row.key for row in rows], np.uint64)
        chosen = slice(None) if len(batch_rows) == len(logits) else torch.tensor(batch_rows, device=logits.device)
        logprobs_AV = law_logprobs(
            logits[chosen, : self._num_ids], temperature=self._law.temperature, top_p=self._law.top_p
        )
        draws = draw(logprobs_AV, keys_A, positions_A, self._rule)
        ids_AC = draws.ids_AC.int().to("cpu", non_blocking=True)
        logprobs_AC = torch.cat([draws.logprobs_AC, draws.tail_logmass_A[:, None]], dim=1)
        logprobs_AC = logprobs_AC.to("cpu", non_blocking=True)
        for place, (row, position) in enumerate(zip(rows, positions_A.tolist(), strict=True)):
            row.recording[position] = (ids_AC, logprobs_AC, place)
        logits[chosen] = torch.full_like(logits[chosen], -torch.inf).scatter_(1, draws.ids_AC[:, :1], 0.0)
        return logits


class EngineWorker:
    """Mixed into vLLM's worker class by `worker_extension_cls`; called through `AsyncLLM.collective_rpc`."""

    def end_with(self, pid: int) -> None:
        """End the engine within a second or so of process `pid`, however that ends: vLLM itself does not notice.

        The engine is this process and those between it and `pid`: with its own worker processes vLLM has two layers.
        """
        role = psutil.Process(pid)
        ancestors = psutil.Process().parents()
        between = ancestors[: ancestors.index(role)] if role in ancestors else []
        watch = threading.Thread(target=_end_with, args=(role, between), name="end-with-role", daemon=True)
        watch.start()

    def keep_ids(self, num_ids: int) -> None:
        """Give rows of the head beyond the ids that exist no mass in the log-probs of prompts."""
        # vLLM has no hook that these pass.
        model = self.model_runner.model  # type: ignore[attr-defined]  # of the worker this is mixed into
        compute_logits = model.compute_logits

        def of_existing(*args: Any, **kwargs: Any) -> Tensor | None:
            logits: Tensor | None = compute_logits(*args, **kwargs)
            if logits is not None and logits.shape[-1] > num_ids:
                logits[..., num_ids:] = -torch.inf
            return logits

        model.compute_logits = of_existing

    def take_records(self, tickets: Sequence[str], abandoned: Sequence[str]) -> list[list[bytes]]:
        """Remove what is stored for `tickets` and return it; forget `abandoned` ones.

        Returns:
            For every ticket: ids [T, C] int32 and log-probs [T, C + 1] float32 as raw bytes, C = 1 + K + N.
        """
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        for ticket in abandoned:
            _recordings.pop(ticket, None)
        return [_bytes_of(_recordings.pop(ticket)) for ticket in tickets]


def _new_row(params: SamplingParams, _prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
    extra = params.extra_args or {}
    if TICKET not in extra:
        return None
    # A preempted request comes again under its ticket.
    recording = _recordings.setdefault(extra[TICKET], {})
    return _Row(recording, int(extra[KEY]), output_ids)


def _bytes_of(recording: _Recording) -> list[bytes]:
    places = [recording[position] for position in sorted(recording)]
    ids_TC = np.stack([ids_AC[row].numpy() for ids_AC, _, row in places])
    logprobs_TC = np.stack([logprobs_AC[row].numpy() for _, logprobs_AC, row in places])
    return [ids_TC.tobytes(), logprobs_TC.tobytes()]


def _end_with(role: psutil.Process, between: list[psutil.Process]) -> None:
    while _runs(role):
        time.sleep(_LOOK_EVERY_S)
    # Nobody is left to hand anything to, and an orderly shutdown would wait for that nobody.
    for process in between:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
