"""Settings of models, of the engines that run them, and of teachers. Which of them run where: docs/engines.md."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from asyncopd.config.base import Frozen


class Pretrain(Frozen):
    """Supervised training on the task's demonstrations; its product is cached by the digest of everything in it."""

    num_steps: int = Field(500, ge=0)
    """Optimizer steps. 500 × 32 walk demonstrations give the 2 × 48 student the 43 % accuracy that leaves room to
    improve; 0 keeps the random initialisation."""
    batch_size: int = Field(32, ge=1)
    """Demonstrations per step."""
    lr: float = Field(3e-3, gt=0)
    """Peak AdamW learning rate; models this small want more than the usual 1e-3."""
    warmup_steps: int = Field(20, ge=0)
    """Linear warm-up; the rate then follows a cosine to 10 % of its peak."""
    seed: int = 0
    """Of initialisation and of the demonstration stream."""


class TinyModel(Frozen):
    """A small decoder made here: random initialisation, then `pretrain`."""

    kind: Literal["tiny"] = "tiny"
    architecture: Literal["gpt2", "llama", "qwen3"] = "gpt2"
    """Learned positions let gpt2 find "the token before last" within 500 steps; rotary ones at this width do not. It
    is also a third faster on a CPU."""
    num_layers: int = Field(2, ge=1)
    """Transformer blocks. 2 × 48 learns walks half-way in seconds, which is what a student should be before OPD."""
    hidden_size: int = Field(48, ge=8)
    """Width of the residual stream; a multiple of 2·num_heads."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    max_context: int = Field(256, ge=8)
    """Positions, prompt and response together. Walks reach 173 tokens."""
    pretrain: Pretrain = Pretrain()

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2·num_heads = {2 * self.num_heads}: heads "
                "divide it evenly, and rotary embeddings turn pairs of head dimensions."
            )
        return self


class PretrainedModel(Frozen):
    """Existing weights: a local directory in Hugging Face format, or a name the local Hugging Face cache resolves."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    """Directory with config.json, *.safetensors and tokenizer files, for example `Qwen/Qwen3-0.6B`, or
    `package:NAME`, the folder of an installed Python package that carries weights."""
    revision: str = "main"
    """Branch, tag or commit when `path` is a hub name."""
    gguf_file: str = ""
    """Name of a GGUF file in `path`, of which weights, configuration and tokenizer are taken; weights are
    de-quantised."""
    drop_layers: tuple[int, ...] = ()
    """Layers to leave out, counted from 0: a shallower student, which distillation then heals."""


EngineDtype = Literal["auto", "float32", "bfloat16"]
"""Of an hf engine's weights and activations. `auto` is bfloat16 for a pretrained model where the processor multiplies
it natively (CUDA, AMX, AVX512-BF16), float32 elsewhere; the role's log says which."""

ModelConfig = Annotated[TinyModel | PretrainedModel, Field(discriminator="kind")]


class VllmEngine(Frozen):
    """One vLLM engine, as far as a run decides about it."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations. `auto` is bfloat16 for a pretrained model where the processor multiplies it
    natively, float32 elsewhere; log-probs are float32 either way."""
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


class Teacher(Frozen):
    """Base of every teacher's section."""

    name: str = Field("teacher", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Names the score shards; two teachers of one run need two names, and two models behind one name mix."""


class OracleTeacher(Teacher):
    """The closed form of the walk task's demonstrator: exact, and free to ask."""

    engine: Literal["oracle"] = "oracle"
    name: str = Field("oracle", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Names the score shards; two teachers of one run need two names."""
    smoothing: float = Field(1e-2, gt=0, lt=1)
    """Weight of the uniform distribution mixed in, so that every log-prob is finite. 1e-4 is the hard variant."""


class HfTeacher(Teacher):
    """A transformers model."""

    engine: Literal["hf"] = "hf"
    model: ModelConfig
    """Its weights: `kind: tiny`, made here by `pretrain`, or `kind: pretrained`."""
    dtype: EngineDtype = "auto"
    """Of weights and activations; log-probs are float32 either way."""


class VllmTeacher(Teacher):
    """A model in a vLLM engine of the score process."""

    engine: Literal["vllm"] = "vllm"
    model: ModelConfig
    vllm: VllmEngine = VllmEngine()
    max_sequences: int = Field(64, ge=1)
    """Trajectories in one batch."""


class OpenAITeacher(Teacher):
    """A teacher behind HTTP servers that speak vLLM's extension of OpenAI's completions."""

    engine: Literal["openai"] = "openai"
    urls: tuple[str, ...] = Field(min_length=1)
    """Base URLs, for example `http://10.0.0.5:8000`. All must serve the same weights; requests take turns."""
    model: str
    """The name they serve the model under."""
    compare_text: bool = True
    """Refuse a server whose tokenizer makes other ids of texts, or other texts of ids, than the student's. Off for
    tasks whose ids no text tokenizer makes."""
    concurrency: int = Field(32, ge=1)
    """Requests under way at once, over all servers, from each score worker."""
    timeout_s: float = Field(120.0, gt=0)
    """Of one request; a full batch ahead of it in the server's queue counts."""
    max_retries: int = Field(6, ge=0)
    """Further tries after transient failures, with pauses from 0.25 s that double up to 30 s: some 15 s in all."""
    api_key_variable: str | None = None
    """Environment variable of the score process that holds the API key; the key itself is never stored."""


TeacherConfig = Annotated[OracleTeacher | HfTeacher | VllmTeacher | OpenAITeacher, Field(discriminator="engine")]
