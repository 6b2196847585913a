"""Starting, asking and ending a vLLM engine: one place for what both roles share, public names only.

config.json + model.safetensors --AsyncLLM--> engine process (weights, KV cache, scheduler; recorder.EngineWorker)
   token ids in, token ids out: vLLM's tokenizer is never loaded
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from asyncopd.config.engines import VllmEngine
from asyncopd.errors import EngineAwayError, EngineError


async def start_engine(
    model: str,
    settings: VllmEngine,
    *,
    name: str,
    max_context: int,
    max_sequences: int,
    num_ids: int,
    **changes: Any,
) -> AsyncLLM:
    """An engine that serves `model`, loaded in its own process. Takes 10 to 60 s; the event loop goes on meanwhile.

    Args:
        model: directory in Hugging Face format, or a hub name.
        name: names the engine in errors.
        max_context: most tokens of prompt and response together.
        max_sequences: responses in one batch.
        num_ids: ids that exist; other rows of the model's head get no mass.
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
        worker_extension_cls="asyncopd.vllm.recorder.EngineWorker",
        **changes,
    )
    try:
        # In a thread: the role's heartbeats go on, and vLLM starts its output loop at the first request.
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        await engine.collective_rpc("end_with", args=(os.getpid(),))
        await engine.collective_rpc("keep_ids", args=(num_ids,))
        return engine
    except Exception as error:
        # vLLM judges configuration and architecture here, by ValueErrors; memory may be free the next time.
        kind = EngineError if isinstance(error, ValueError) else EngineAwayError
        raise kind(
            f"{name}: vLLM could not serve {model}: {type(error).__name__}: {error}. The engine process's own lines "
            "are above in this role's log. Expected an architecture vLLM knows (heads of at least 32 on a CPU) and "
            "memory for weights and KV cache."
        ) from error


async def final_output(
    engine: AsyncLLM, prompt: Any, params: SamplingParams, *, request_id: str, index: int, name: str
) -> RequestOutput:
    """The last output of one request for trajectory `index`.

    Args:
        name: names the engine in errors.
    Raises:
        EngineError: the engine process ended or failed, or vLLM refuses the request.
    """
    final: RequestOutput | None = None
    try:
        async for output in engine.generate(prompt, params, request_id=request_id):
            final = output
    except (EngineDeadError, EngineGenerateError) as error:
        raise EngineAwayError(
            f"index {index}: {name} ended or failed ({type(error).__name__}). The last lines of its process are in "
            "this role's log; the role starts it again, and what it had not finished is done again."
        ) from error
    except ValueError as error:
        raise EngineError(f"index {index}: {name} refused the request: {error}") from error
    assert final is not None
    return final


async def stop_engine(engine: AsyncLLM) -> None:
    """End the engine process. Nobody may wait for an answer of it any more."""
    # Else it may see the process end first and log that as a failure, with a traceback.
    if engine.output_handler is not None:
        engine.output_handler.cancel()
    await asyncio.to_thread(engine.shutdown)
