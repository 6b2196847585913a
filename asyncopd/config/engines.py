"""Settings of the vLLM engines and of teachers behind HTTP. Which of them run where: docs/engines.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asyncopd.config.base import Frozen


class VllmEngine(Frozen):
    """One vLLM engine, as far as a run decides about it."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations. `auto` is what the model's config.json says; log-probs are float32 either way."""
    memory_fraction: float = Field(0.4, gt=0, le=1)
    """Share of a device's memory the engine takes, weights and KV cache together. 0.4 leaves room on one GPU for the
    learner and a teacher; a GPU of its own deserves 0.9. Without effect when `kv_cache_bytes` is set."""
    kv_cache_bytes: int | None = Field(None, ge=1)
    """Size of the KV cache instead of what is left of `memory_fraction`; CPUs want it, or vLLM takes a share of the
    whole machine."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs that one engine spreads its weights over."""
    devices: tuple[str, ...] = ()
    """GPUs for the workers of this role on this machine, one entry for each worker in turn, as in
    CUDA_VISIBLE_DEVICES: `["1", "2"]`, or `["0,1"]` with tensor_parallel 2. Empty: the engine sees them all."""
    compile: bool = True
    """torch.compile and CUDA graphs. Worth their minute or so of start-up on a GPU; on a CPU switch them off."""
    max_batched_tokens: int = Field(8192, ge=1)
    """Tokens of one forward pass, prefill and decoding together; bounds activations."""


class VllmSampling(VllmEngine):
    """The vLLM engine of a rollout worker."""

    in_flight: Literal["rebuild", "keep", "finish"] = "rebuild"
    """What newer weights mean for responses in progress. `rebuild`: finished tokens stay and the KV cache is made again
    under the new weights, as the hf engine does. `keep`: they go on with the cache the old weights made, which saves
    the prefill and makes their log-probs those of a mixture of versions that nothing can recompute. `finish`: they end
    under the old weights first, so every response has one version; the engine drains meanwhile."""


class OpenAITeacher(Frozen):
    """A teacher behind HTTP servers that speak vLLM's extension of OpenAI's completions."""

    engine: Literal["openai"] = "openai"
    name: str = Field("teacher", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Names the score shards; two teachers of one run need two names, and two models behind one name mix."""
    urls: tuple[str, ...] = Field(min_length=1)
    """Base URLs, for example `http://10.0.0.5:8000`. All must serve the same weights; requests take turns."""
    model: str
    """The name they serve the model under."""
    compare_text: bool = True
    """Refuse a server that splits text otherwise than the student. Off for tasks whose ids no text tokenizer makes."""
    concurrency: int = Field(32, ge=1)
    """Requests under way at once, over all servers, from each score worker."""
    timeout_s: float = Field(120.0, gt=0)
    """Of one request; a full batch ahead of it in the server's queue counts."""
    max_retries: int = Field(6, ge=0)
    """Further tries after transient failures, with pauses from 0.25 s that double up to 30 s: some 15 s in all."""
    api_key_variable: str | None = None
    """Environment variable of the score process that holds the API key; the key itself is never stored."""
