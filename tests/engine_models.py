"""One small byte-level model that transformers and vLLM both serve (heads of 32), and samplers and scorers of it.

vLLM engines take half a minute to start, so tests share one (shared_engine.py) and give it other weights instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from hf_models import weights
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from asyncopd.config.engines import VllmEngine, VllmSampling
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import Sampler, SampleRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.types import Trajectory

VOCAB_SIZE, PAD_ID, BOS_ID, EOS_ID = 259, 256, 257, 258
MAX_CONTEXT = 96
LAW: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
CANDIDATES: dict[str, Any] = {"head": 2, "num_draws": 3, "law": "tail"}
SMALL_CACHE: dict[str, Any] = {"kv_cache_bytes": 64 << 20, "compile": False, "dtype": "float32"}
ARCHITECTURE = architecture_of_size(
    num_layers=2, hidden_size=64, num_heads=2, vocab_size=VOCAB_SIZE, max_positions=128, eos_id=EOS_ID, pad_id=PAD_ID
)


def byte_model(seed: int = 0, *, sharpness: float = 3.0, eos_bias: float = 0.0) -> PreTrainedModel:
    """A random model. `sharpness` scales its logits (1000 is greedy); `eos_bias` makes EOS likelier or not at all."""
    model = build_causal_lm(ARCHITECTURE, seed=seed)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(sharpness)
        # A constant component of the last hidden state, which only EOS's embedding sees.
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[EOS_ID, 0] = eos_bias
    return model


def requests(count: int, *, max_new_tokens: int = 24, first: int = 0) -> list[SampleRequest]:
    """Prompts of 1 to 6 bytes."""
    rng = np.random.default_rng(first)
    return [
        SampleRequest(index, rng.integers(0, 256, rng.integers(1, 7)).astype(np.int32), max_new_tokens)
        for index in range(first, first + count)
    ]


def architecture() -> dict[str, Any]:
    """As the learner stores it."""
    config: dict[str, Any] = byte_model().config.to_dict()
    return config


@contextlib.asynccontextmanager
async def sampler_of(engine: str, model: PreTrainedModel, **settings: Any) -> AsyncIterator[Sampler]:
    """A sampler engine with the model's weights as version 0; closed at the end."""
    shared: dict[str, Any] = {
        "slots": 16,
        "max_context": MAX_CONTEXT,
        "stop_ids": (EOS_ID,),
        "seed": 5,
        **LAW,
        **CANDIDATES,
    }
    sampler: Sampler
    if engine == "hf":
        sampler = HfSampler(build_causal_lm(ARCHITECTURE, seed=9), SamplerSettings(**shared))
    else:
        sampler = vllm_sampler(**shared, **settings)
    try:
        await sampler.refresh(weights(model))
        yield sampler
    finally:
        await sampler.close()


def vllm_sampler(in_flight: str = "rebuild", **settings: Any) -> Any:
    from asyncopd.vllm.sampler import VllmSampler

    vllm = VllmSampling.model_validate({**SMALL_CACHE, "in_flight": in_flight})
    return VllmSampler(architecture(), SamplerSettings(**settings), settings=vllm)


def save_teacher(folder: Path, model: PreTrainedModel) -> str:
    """A model directory as users have them, tokenizer included."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def byte_tokenizer(alphabet: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Every byte its own token, as Hugging Face tokenizers know bytes."""
    alphabet = alphabet or sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def engine_processes(parent: psutil.Process) -> list[psutil.Process]:
    """vLLM's processes under `parent`; they title themselves."""
    return [process for process in parent.children(recursive=True) if is_engine(process)]


def is_engine(process: psutil.Process) -> bool:
    try:
        return "VLLM::" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def vllm_teacher_settings() -> VllmEngine:
    return VllmEngine.model_validate(SMALL_CACHE)


def logprob_errors(trajectory: Trajectory, rows_TV: NDArray[np.float64]) -> dict[str, float]:
    """Largest difference of each recorded log-prob from a reference [T, V], nats."""
    at = np.arange(len(rows_TV))
    candidates = trajectory.candidates
    head_ids, draw_ids = candidates.head_ids_TK, candidates.draw_ids_TN

    def difference(found: NDArray[np.float32], ids: NDArray[np.int32]) -> float:
        expected = np.maximum(rows_TV[at[:, None], ids], -100.0)
        return float(np.abs(found - expected).max())

    return {
        "behaviour": difference(trajectory.behaviour_logprobs_T[:, None], trajectory.response_ids[:, None]),
        "head": difference(candidates.head_logprobs_TK, head_ids),
        "draws": difference(candidates.draw_logprobs_TN, draw_ids),
    }
