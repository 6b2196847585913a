"""What `in_flight_updates: false` costs the hf sampler: tokens per CPU-second with and without, on walk lengths.

A newer version arrives after every `--tokens` generated tokens, as a learner publishes them. With in-flight updates the
cache of what is in a slot is made again; without, the batch runs empty first. CPU-seconds of the whole process, so that
other load on the machine matters little; rounds alternate.

    python benchmarks/in_flight.py --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time

# Before torch: OpenMP reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.tasks.walk import WalkTask
from asyncopd.types import PolicyVersion, PolicyWeights


async def tokens_per_cpu_s(*, in_flight_updates: bool, num_prompts: int, tokens: int, slots: int) -> tuple[float, int]:
    """Serve the task's first prompts, each as long as its demonstration; also how many versions were loaded."""
    task = WalkTask(0)
    architecture = architecture_of_size(
        num_layers=2,
        hidden_size=48,
        num_heads=4,
        vocab_size=task.tokenizer.vocab_size,
        max_positions=256,
        eos_id=task.tokenizer.eos_id,
        pad_id=task.tokenizer.pad_id,
        model_type="gpt2",
    )
    model = build_causal_lm(architecture, seed=0)
    body = to_safetensors(model)
    sampler = HfSampler(
        model,
        SamplerSettings(slots=slots, max_context=256, stop_ids=(), seed=0, head=4, num_draws=4, law="tail"),
        in_flight_updates=in_flight_updates,
    )
    await sampler.refresh(PolicyWeights(PolicyVersion(0), body))
    lengths = [len(task.demonstration(index, "train").response_ids) for index in range(num_prompts)]
    requests = [SampleRequest(i, task.prompt(i, "train").ids, length) for i, length in enumerate(lengths)]
    started, version = time.process_time(), 0
    serving = asyncio.gather(*map(sampler.sample, requests))
    while not serving.done():
        await asyncio.sleep(0.002)
        if sampler.num_generated_tokens >= (version + 1) * tokens and not serving.done():
            version += 1
            await sampler.refresh(PolicyWeights(PolicyVersion(version), body))
    used_s = time.process_time() - started
    await sampler.close()
    return sum(lengths) / used_s, version


def main() -> None:
    """Print a line per round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2400, help="generated per version (default 2400: the quickstart)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios = []
    for number in range(arguments.rounds):
        rates = {}
        for in_flight in (True, False):
            rates[in_flight], versions = asyncio.run(
                tokens_per_cpu_s(
                    in_flight_updates=in_flight,
                    num_prompts=arguments.prompts,
                    tokens=arguments.tokens,
                    slots=arguments.slots,
                )
            )
            print(f"round {number}, in-flight {in_flight}: {rates[in_flight]:,.0f} tokens/CPU-s, {versions} versions")
        ratios.append(rates[False] / rates[True])
    print(f"drained / in-flight, median: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
