"""Tokens per second of `HfSampler` against transformers' `generate`: same model, prompts, lengths and law, one thread.

    python benchmarks/sampler.py [--prompts 2048] [--rounds 3] [--family gpt2]

Both engines serve the 2 × 48 student the walk recipe's length mix: response i is as long as the task's i-th
demonstration (mean 11, p99 69), by a per-request limit here and a stopping criterion there, EOS being switched off. So
both make exactly the same number of tokens, whatever the weights are. `generate` gets batches of 64 prompts (three
tokens each, so nothing is padded); a batch lasts until its longest response ends. `HfSampler` has 64 slots and records
head and tail candidates too. Rounds alternate between the two, because other load on a machine comes and goes.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import os
import statistics
import time
from typing import Any

# Before torch: OpenMP reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, StoppingCriteria

from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.tasks.walk import WalkTask
from asyncopd.types import PolicyVersion, PolicyWeights

BATCH_SIZE = 64
MAX_NEW_TOKENS = 192


class LengthsReached(StoppingCriteria):  # type: ignore[misc]
    """Stops row i of a batch after its own number of new tokens."""

    def __init__(self, num_prompt_tokens: int, lengths_B: NDArray[np.int64]) -> None:
        self._ends_B = torch.from_numpy(num_prompt_tokens + lengths_B)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self._ends_B


def main() -> None:
    parser = argparse.ArgumentParser(description="HfSampler against generate, tokens per second.")
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--family", default="gpt2", choices=("gpt2", "llama", "qwen3"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    task = WalkTask(0)
    model, owned = (student(task, arguments.family) for _ in range(2))
    prompts_BP = np.stack([task.prompt(index, "train").ids for index in range(arguments.prompts)])
    lengths_B = np.array(
        [len(task.demonstration(index, "train").response_ids) for index in range(arguments.prompts)]
    ).clip(max=MAX_NEW_TOKENS)
    print(
        f"{arguments.family} 2 x 48, {model.num_parameters():,} parameters; {arguments.prompts} responses of mean "
        f"{lengths_B.mean():.1f}, p99 {np.percentile(lengths_B, 99):.0f}, longest {lengths_B.max()} tokens"
    )
    ratios = []
    for number in range(arguments.rounds):
        theirs = lengths_B.sum() / seconds_of_generate(model, prompts_BP, lengths_B)
        ours = lengths_B.sum() / asyncio.run(seconds_of_sampler(owned, prompts_BP, lengths_B))
        ratios.append(ours / theirs)
        print(
            f"round {number}: generate {theirs:7,.0f} tokens/s   HfSampler {ours:7,.0f} tokens/s   "
            f"ratio {ratios[-1]:.2f}"
        )
    print(f"ratio: median {statistics.median(ratios):.2f}, worst {min(ratios):.2f}, best {max(ratios):.2f}")


def student(task: WalkTask, family: str) -> PreTrainedModel:
    """The quickstart's student at its random initialisation."""
    architecture = architecture_of_size(
        num_layers=2,
        hidden_size=48,
        num_heads=4,
        vocab_size=task.tokenizer.vocab_size,
        max_positions=256,
        eos_id=task.tokenizer.eos_id,
        pad_id=task.tokenizer.pad_id,
        model_type=family,  # type: ignore[arg-type]
    )
    return build_causal_lm(architecture, seed=0)


def seconds_of_generate(model: PreTrainedModel, prompts_BP: NDArray[np.int32], lengths_B: NDArray[np.int64]) -> float:
    """All prompts through `generate`, 64 at a time."""
    started = time.perf_counter()
    for start in range(0, len(prompts_BP), BATCH_SIZE):
        ids = torch.from_numpy(prompts_BP[start : start + BATCH_SIZE].astype(np.int64))
        lengths = lengths_B[start : start + BATCH_SIZE]
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            stopping_criteria=[LengthsReached(ids.shape[1], lengths)],
            eos_token_id=None,
            pad_token_id=model.config.pad_token_id,
        )
        assert output.shape[1] - ids.shape[1] == lengths.max()
    return time.perf_counter() - started


async def seconds_of_sampler(
    model: PreTrainedModel, prompts_BP: NDArray[np.int32], lengths_B: NDArray[np.int64]
) -> float:
    """All prompts at once through the engine; loading the weights is not timed."""
    weights = PolicyWeights(PolicyVersion(0), to_safetensors(model))
    sampling = SamplerSettings(slots=BATCH_SIZE, max_context=256, stop_ids=(), seed=0, head=4, num_draws=4, law="tail")
    # The sampler keeps its model, whose attention it replaces.
    sampler = HfSampler(copy.deepcopy(model), sampling)
    await sampler.refresh(weights)
    requests = [
        SampleRequest(index, ids, int(length))
        for index, (ids, length) in enumerate(zip(prompts_BP, lengths_B, strict=True))
    ]
    started = time.perf_counter()
    trajectories = await asyncio.gather(*(sampler.sample(request) for request in requests))
    seconds = time.perf_counter() - started
    await sampler.close()
    assert [len(trajectory.response_ids) for trajectory in trajectories] == lengths_B.tolist()
    return seconds


if __name__ == "__main__":
    main()
