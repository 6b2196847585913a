"""Tiny random transformers models for the engine tests, and the cache-free forward pass they are compared with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from asyncopd.config import PretrainedModel
from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.files import ModelFiles
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.types import Candidates, PolicyVersion, PolicyWeights, Trajectory, VersionRun

torch.set_num_threads(1)

VOCAB_SIZE, EOS_ID, MAX_CONTEXT = 24, 1, 96
FAMILIES = ("gpt2", "llama", "qwen3")


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """2 layers of width 32; grouped queries where the family has them. Logits spread enough to tell laws apart."""
    architecture = architecture_of_size(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        vocab_size=VOCAB_SIZE,
        max_positions=128,
        eos_id=EOS_ID,
        pad_id=0,
        model_type=family,  # type: ignore[arg-type]
    )
    if family != "gpt2":
        architecture["num_key_value_heads"] = 2
    model = build_causal_lm({**architecture, **changes}, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    return model


def weights(model: PreTrainedModel, version: int = 0) -> PolicyWeights:
    return PolicyWeights(PolicyVersion(version), to_safetensors(model))


def requests(count: int, *, max_new_tokens: int = 40, seed: int = 0) -> list[SampleRequest]:
    """Prompts of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    return [
        SampleRequest(index, rng.integers(2, VOCAB_SIZE, rng.integers(1, 7)).astype(np.int32), max_new_tokens)
        for index in range(count)
    ]


@contextlib.asynccontextmanager
async def running_sampler(model: PreTrainedModel, **changes: Any) -> AsyncIterator[HfSampler]:
    """A sampler with the model's own weights as version 0; closed at the end."""
    settings: dict[str, Any] = {"slots": 8, "max_context": MAX_CONTEXT, "stop_ids": (EOS_ID,), "seed": 5}
    initial = weights(model)
    sampler = HfSampler(model, SamplerSettings(**{**settings, **changes}))
    try:
        await sampler.refresh(initial)
        yield sampler
    finally:
        await sampler.close()


async def sample_all(sampler: HfSampler, asked: Sequence[SampleRequest]) -> dict[int, Trajectory]:
    made = await asyncio.gather(*(sampler.sample(request) for request in asked))
    return {trajectory.index: trajectory for trajectory in made}


def law_rows(
    model: PreTrainedModel,
    prompt_ids: NDArray[np.int32],
    response_ids: NDArray[np.int32],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> NDArray[np.float64]:
    """[T, V] float64 log-probs at every response position: one forward pass of this sequence alone, no cache."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits_CV = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    rows_TV = logits_CV[len(prompt_ids) - 1 : -1].double().numpy() / temperature
    rows_TV -= rows_TV.max(1, keepdims=True)
    probs_TV = np.exp(rows_TV) / np.exp(rows_TV).sum(1, keepdims=True)
    for probs_V in probs_TV:
        order = np.argsort(-probs_V, kind="stable")
        before = np.cumsum(probs_V[order]) - probs_V[order]
        probs_V[order[before >= top_p]] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(probs_TV / probs_TV.sum(1, keepdims=True))


def trajectory_of(
    index: int,
    num_tokens: int,
    *,
    head: int = 2,
    num_draws: int = 3,
    vocab_size: int = VOCAB_SIZE,
) -> Trajectory:
    """A trajectory of arbitrary ids: scorers must not care where ids come from."""
    rng = np.random.default_rng(index)

    def ids(*shape: int) -> NDArray[np.int32]:
        return rng.integers(0, vocab_size, shape).astype(np.int32)

    def zeros(*shape: int) -> NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    return Trajectory(
        index=index,
        prompt_id="p",
        prompt_ids=ids(1 + index % 5),
        response_ids=ids(num_tokens),
        behaviour_logprobs_T=zeros(num_tokens),
        version_runs=(VersionRun(0, num_tokens),),
        finish_reason="length",
        candidates=Candidates(
            head_ids_TK=ids(num_tokens, head),
            head_logprobs_TK=zeros(num_tokens, head),
            tail_logmass_T=zeros(num_tokens),
            draw_ids_TN=ids(num_tokens, num_draws),
            draw_logprobs_TN=zeros(num_tokens, num_draws),
            law="tail",
        ),
    )


def save_model(folder: Path, model: PreTrainedModel, *, num_ids: int | None = None, first: int = 0x4E00) -> Path:
    """The model and a tokenizer of `num_ids` one-letter tokens as files, as `save_pretrained` writes them.

    Args:
        num_ids: those of the tokenizer; as many as the model has rows by default.
        first: code point of id 0; the letter of id 1 ends a response.
    """
    model.save_pretrained(folder)
    words = {chr(first + number): number for number in range(num_ids or model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token=chr(first)))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=chr(first + EOS_ID)).save_pretrained(folder)
    return folder


def files_of(folder: Path, **settings: Any) -> ModelFiles:
    return ModelFiles(PretrainedModel(path=str(folder), **settings), "student")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_chat_tokenizer(folder: Path, *, template: str = CHATML, added: Sequence[str] = ()) -> Path:
    """A tokenizer as Qwen's: bytes 0 to 255, 256 `<|endoftext|>` that ends a text, 257 and 258 that enclose a turn.

    Args:
        added: further tokens, which are no control tokens, as Qwen's `<think>`.
    """
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(_ALPHABET)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    backend.add_tokens(list(added))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIALS[0])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
