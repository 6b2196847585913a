"""Starting a vLLM engine for a model directory: one place for the settings both roles share, public names only.

config.json + model.safetensors --AsyncLLM--> engine process (weights, KV cache, scheduler)
   token ids in, token ids out: vLLM's tokenizer is never loaded

`EngineWorker` is what each of its worker processes does besides: it ends when the process that started the engine is
gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from typing import Any

import psutil
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from asyncopd.config.engines import VllmEngine
from asyncopd.errors import EngineError


async def start_engine(
    model: str,
    settings: VllmEngine,
    *,
    name: str,
    max_context: int,
    max_sequences: int,
    worker_extension: str = "asyncopd.vllm.engine.EngineWorker",
    **changes: Any,
) -> AsyncLLM:
    """An engine that serves `model`, loaded in its own process. Takes 10 to 60 s; the event loop goes on meanwhile.

    Args:
        model: directory in Hugging Face format, or a hub name.
        name: names the engine in errors.
        max_context: most tokens of prompt and response together.
        max_sequences: responses in one batch.
        worker_extension: a subclass of `EngineWorker`.
        changes: further engine arguments.
    Raises:
        EngineError: vLLM cannot serve the model, or did not start.
    """
    if settings.devices:
        number = int(os.environ.get("ASYNCOPD_ROLE_NUMBER", "0"))
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.devices[number % len(settings.devices)]
    if current_platform.is_cpu():
        # Bound threads of several engines would all sit on the machine's first cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    arguments = AsyncEngineArgs(
        model=model,
        runner="generate",
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        max_model_len=max_context,
        max_num_seqs=max_sequences,
        max_num_batched_tokens=max(max_context, min(settings.max_batched_tokens, max_sequences * max_context)),
        gpu_memory_utilization=settings.memory_fraction,
        kv_cache_memory_bytes=settings.kv_cache_bytes,
        tensor_parallel_size=settings.tensor_parallel,
        enforce_eager=not settings.compile,
        # Sampling defaults of generation_config.json must not change the law.
        generation_config="vllm",
        disable_log_stats=True,
        worker_extension_cls=worker_extension,
        **changes,
    )
    try:
        # In a thread: the role's heartbeats go on, and vLLM starts its output loop at the first request.
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        await engine.collective_rpc("end_with", args=(os.getpid(),))
        return engine
    except Exception as error:
        raise EngineError(
            f"{name}: vLLM could not serve {model}: {type(error).__name__}: {error}. The engine process's own lines "
            "are above in this role's log. Expected an architecture vLLM knows (heads of at least 32 on a CPU) and "
            "memory for weights and KV cache."
        ) from error


async def stop_engine(engine: AsyncLLM) -> None:
    """End the engine process. Nobody may wait for an answer of it any more."""
    # Else it may see the process end first and log that as a failure, with a traceback.
    if engine.output_handler is not None:
        engine.output_handler.cancel()
    await asyncio.to_thread(engine.shutdown)


_LOOK_EVERY_S = 1.0


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
