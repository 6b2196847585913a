"""Whether the engines agree about one model, and what training it would take: `asyncopd check-model` (docs/models.md).

files --load_pretrained--> float32 model --+--> transformers' own forward pass, each sequence alone: the reference
                                           +--> LogprobModel, as the learner computes
                                           +--weights()--> skeleton --> HfSampler, then HfScorer, in --dtype
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from asyncopd.config.engines import EngineDtype
from asyncopd.config.schema import Learner
from asyncopd.learner.optimize import LogprobModel
from asyncopd.models.causal_lm import num_ids, to_safetensors
from asyncopd.models.files import ModelFiles
from asyncopd.models.load import build_causal_lm, load_pretrained, resolved_dtype
from asyncopd.models.packing import pack
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.tasks.tokenizers_hf import HfTokenizer
from asyncopd.teacher.hf import HfScorer
from asyncopd.types import IntArray, PolicyVersion, PolicyWeights, Trajectory

NEW_TOKENS = 16
PROMPTS = (
    "What is 17 + 25?",
    "Name three rivers of Europe.",
    "Write a sentence about the sea.",
    "Tom has 4 boxes with 6 apples each and gives 5 apples away. How many are left?",
    "def fibonacci(n):",
    "Übersetze ins Englische: Der Zug fährt um acht Uhr ab.",
    "水は何度で沸騰しますか。",
    "Solve for x: 3x - 7 = 11",
    "Once upon a time",
    "Why is the sky blue? Answer in one sentence.",
)
TOLERANCE_NATS = {torch.float32: 2e-3, torch.bfloat16: 0.5}
"""Largest difference of one token's log-prob that rounding explains in models of some dozen layers."""


@dataclass(frozen=True)
class Agreement:
    """What the engines said about the same sampled tokens."""

    trajectories: tuple[Trajectory, ...]
    differences: dict[str, float]
    """Engine -> its largest difference from the reference at a sampled token, nats."""
    activation_bytes: float
    """What the learner's forward pass keeps for its backward pass, per token."""
    published_bytes: int
    scorer: HfScorer


def check(models: Sequence[ModelFiles], asked: EngineDtype, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Facts of each model by its role; `difference_nats` and `tolerance_nats` among them.

    Args:
        models: a student and, if there is one, its teacher, which scores the student's responses too.
        say: called before and after what may take long.
    Raises:
        ConfigError: a model that no run would take.
    """
    found: dict[str, dict[str, Any]] = {}
    sampled: tuple[Trajectory, ...] = ()
    for files in models:
        found[files.role], agreement = _facts(files, asked, say)
        if sampled:
            with _timed(say, f"{files.role}: scoring the responses of the {models[0].role}"):
                scores = asyncio.run(agreement.scorer.score(sampled, ScoreRequest(0, 0, temperature=1.0, seed=0)))
            gaps = [t.behaviour_logprobs_T - s.sampled_logprobs_T for t, s in zip(sampled, scores, strict=True)]
            found[files.role]["kl_of_student_nats"] = float(np.concatenate(gaps).mean())
        sampled = agreement.trajectories
    return found


def agree(
    causal_lm: PreTrainedModel, prompts: Sequence[IntArray], *, stop_ids: Sequence[int], dtype: torch.dtype
) -> Agreement:
    """Sample a response to every prompt as a rollout worker does, and ask scorer, learner and transformers about it.

    Args:
        causal_lm: float32, as the learner has it.
        dtype: of sampler and scorer; the learner computes in it too.
    """
    published = to_safetensors(causal_lm, dtype)
    skeleton = build_causal_lm(json.loads(json.dumps(causal_lm.config.to_dict())), seed=0, dtype=dtype)
    skeleton.to(causal_lm.device)
    context = max(map(len, prompts)) + NEW_TOKENS
    settings = SamplerSettings(slots=len(prompts), max_context=context, stop_ids=tuple(stop_ids), seed=0)
    sampler = HfSampler(skeleton, settings)
    trajectories = asyncio.run(_sample(sampler, PolicyWeights(PolicyVersion(0), published), prompts))
    # A sampler gives the model another attention.
    skeleton.set_attn_implementation("sdpa")
    scorer = HfScorer(skeleton, name="checked", tokenizer_digest="")
    scores = asyncio.run(scorer.score(trajectories, ScoreRequest(0, 0, temperature=1.0, seed=0)))

    packed = pack([(t.prompt_ids, t.response_ids) for t in trajectories], max(128, context))
    ids_T1 = torch.from_numpy(np.concatenate([t.response_ids for t in trajectories]).astype(np.int64))[:, None]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast(causal_lm.device.type, dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner_T1, _ = LogprobModel(causal_lm, 1.0)(packed, ids_T1.to(causal_lm.device))
    for weight in causal_lm.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)

    reference_T = np.concatenate([_reference(causal_lm, trajectory) for trajectory in trajectories])
    by_engine = {
        "sampler": np.concatenate([t.behaviour_logprobs_T for t in trajectories]),
        "scorer": np.concatenate([s.sampled_logprobs_T for s in scores]),
        "learner": learner_T1[:, 0].detach().float().cpu().numpy(),
    }
    return Agreement(
        trajectories=tuple(trajectories),
        differences={name: float(np.abs(found_T - reference_T).max()) for name, found_T in by_engine.items()},
        activation_bytes=sum(kept.values()) / packed.ids_RC.size,
        published_bytes=len(published),
        scorer=scorer,
    )


async def _sample(sampler: HfSampler, weights: PolicyWeights, prompts: Sequence[IntArray]) -> list[Trajectory]:
    try:
        await sampler.refresh(weights)
        asked = [SampleRequest(index, ids, NEW_TOKENS) for index, ids in enumerate(prompts)]
        return await asyncio.gather(*map(sampler.sample, asked))
    finally:
        await sampler.close()


@torch.no_grad()
def _reference(causal_lm: PreTrainedModel, trajectory: Trajectory) -> np.ndarray:
    """[T] log-probs of the response: one plain forward pass of this sequence alone, over the ids that exist."""
    ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64)
    ids_1C = torch.from_numpy(ids)[None].to(causal_lm.device)
    logits_CV = causal_lm(input_ids=ids_1C, attention_mask=torch.ones_like(ids_1C), use_cache=False).logits[0]
    first = len(trajectory.prompt_ids)
    logprobs_TV = torch.log_softmax(logits_CV[first - 1 : -1, : num_ids(causal_lm)].double(), dim=-1)
    return logprobs_TV.gather(1, ids_1C[0, first:, None])[:, 0].cpu().numpy()


def _facts(files: ModelFiles, asked: EngineDtype, say: Callable[[str], None]) -> tuple[dict[str, Any], Agreement]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolved_dtype(asked, pretrained=True, device=device)
    with _timed(say, f"{files.role}: tokenizer of {files.where}"):
        tokenizer = HfTokenizer(files, stop_ids=files.stop_ids, chat_date=date(2026, 1, 1))
    with _timed(say, f"{files.role}: loading {files.where}"):
        causal_lm = load_pretrained(files).to(device)
    encode = tokenizer.encode_chat if files.chat_template else tokenizer.encode_prompt
    options: tuple[Any, ...] = ({},) if files.chat_template else ()
    room = (files.num_positions or 1024) - NEW_TOKENS
    prompts = [np.array(encode(text, "{question}", *options)[-room:], np.int32) for text in PROMPTS]
    with _timed(say, f"{files.role}: sampling, scoring and computing {len(prompts)} × {NEW_TOKENS} tokens"):
        agreement = agree(causal_lm, prompts, stop_ids=sorted(tokenizer.stop_ids), dtype=dtype)
    num_parameters, settings = causal_lm.num_parameters(), Learner()
    num_tokens = settings.row_capacity * settings.rows_per_micro_batch
    rows = causal_lm.get_output_embeddings().weight.shape[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {
        "architecture": causal_lm.config.model_type,
        "parameters": num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "ids": files.tokenizer.num_ids,
        "rows": rows,
        "positions": files.num_positions,
        "stop_ids": {token_id: tokenizer.token_text(token_id) for token_id in sorted(tokenizer.stop_ids)},
        "tokenizer_digest": files.tokenizer.digest,
        "differences_nats": agreement.differences,
        "difference_nats": max(agreement.differences.values()),
        "tolerance_nats": TOLERANCE_NATS[dtype],
        "example": tokenizer.decode(list(map(int, agreement.trajectories[0].response_ids))),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak,
        "step_bytes": {
            "master weights, float32": 4 * num_parameters,
            "gradients, float32": 4 * num_parameters,
            "AdamW's two moments, float32": 8 * num_parameters,
            f"activations of a micro-batch of {num_tokens:,} tokens": round(agreement.activation_bytes * num_tokens),
            "logits of 512 tokens, twice": 2 * 512 * rows * 4,
        },
        "published_bytes": agreement.published_bytes,
    }
    return facts, agreement


@contextlib.contextmanager
def _timed(say: Callable[[str], None], what: str) -> Iterator[None]:
    say(f"{what} …")
    started = time.monotonic()
    yield
    say(f"  {time.monotonic() - started:.1f} s")
