"""vLLM engines beside the hf ones on this machine: start-up, tokens/s, candidates, newer weights, scores.

Candidates come from the logits processor in vLLM's engine process. The fallback that this saves is measured beside it:
sampling without them, then a prefill pass by a student scorer (an hf engine) at the same version that gives as many.

    python benchmarks/vllm_engines.py                            # walks: 42 ids
    python benchmarks/vllm_engines.py --shape "4 × 256" --vocab-size 32768 --count 64
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from asyncopd.config.engines import VllmEngine, VllmSampling
from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import Sampler, SampleRequest, Scorer, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.teacher.hf import HfScorer
from asyncopd.teacher.prompt_logprobs import MAX_FULL_VOCABULARY
from asyncopd.types import PolicyVersion, PolicyWeights, Trajectory
from asyncopd.vllm.model_folder import ModelFolder
from asyncopd.vllm.sampler import VllmSampler
from asyncopd.vllm.scorer import VllmScorer
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores import open_store

EOS_ID, MAX_CONTEXT = 1, 200
HEAD, NUM_DRAWS = 4, 4
CPU: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 1 << 28, "compile": False}
SHAPES = {"2 × 64": (2, 64), "4 × 256": (4, 256)}
SHARED: dict[str, Any] = {"slots": 64, "max_context": MAX_CONTEXT, "stop_ids": (), "seed": 1}


def show(name: str, value: Any) -> None:
    """Print a figure as soon as it is known: a busy machine may not let the script end."""
    print(f"{name}: {value}", flush=True)


def walk_requests(count: int, vocab_size: int) -> list[SampleRequest]:
    """Lengths as walks have them: geometric, mean 11, at most 170. EOS never comes, so limits decide."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 11, count), 170)
    return [SampleRequest(i, rng.integers(2, vocab_size, 4).astype(np.int32), int(n)) for i, n in enumerate(lengths)]


async def sampled(sampler: Sampler, requests: Sequence[SampleRequest]) -> tuple[float, list[Trajectory]]:
    """Tokens per second, and what was made."""
    start = time.perf_counter()
    made = list(await asyncio.gather(*(sampler.sample(request) for request in requests)))
    return sum(len(t.response_ids) for t in made) / (time.perf_counter() - start), made


async def first_token_after_publish(sampler: VllmSampler, log: StoredRunLog, body: bytes, num_running: int) -> float:
    """Seconds from the start of publishing weights to a token sampled from them, beside running responses."""
    assert sampler.version is not None
    prompt = np.array([2, 3, 4], np.int32)
    running = [asyncio.create_task(sampler.sample(SampleRequest(i, prompt, 190))) for i in range(num_running)]
    await asyncio.sleep(0.5 if num_running else 0)
    weights = PolicyWeights(PolicyVersion(sampler.version.number + 1), body)
    start = time.perf_counter()
    await asyncio.to_thread(log.publish_policy, weights, worker="benchmark")
    latest = await asyncio.to_thread(log.latest_policy)
    assert latest == weights.version
    await sampler.refresh(await asyncio.to_thread(log.read_policy, latest))
    made = await sampler.sample(SampleRequest(1000, prompt, 1))
    elapsed_s = time.perf_counter() - start
    assert made.version_first == weights.version.number
    await asyncio.gather(*running)
    return elapsed_s


async def refreshed(sampler: VllmSampler, body: bytes, rounds: int) -> None:
    """Seconds from publish to first token for every way to treat responses in progress."""
    with tempfile.TemporaryDirectory(prefix="asyncopd-bench-") as root:
        log = create_run(open_store(root), "bench", {"config_hash": "none"})
        for in_flight in ("rebuild", "keep", "finish"):
            sampler._settings = sampler._settings.model_copy(update={"in_flight": in_flight})
            for running in (0, 32):
                times_s = [await first_token_after_publish(sampler, log, body, running) for _ in range(rounds)]
                show(f"publish to first token_s, {in_flight}, {running} running", [round(s, 3) for s in times_s])


async def measure(architecture: dict[str, Any], body: bytes, count: int, rounds: int) -> None:
    requests = walk_requests(count, architecture["vocab_size"])
    rates: dict[str, float] = {}
    trajectories: list[Trajectory] = []
    for label, extra in (("with", {"head": HEAD, "num_draws": NUM_DRAWS, "law": "policy"}), ("without", {})):
        sampling = SamplerSettings(**SHARED, **extra)
        vllm = VllmSampler(architecture, sampling, settings=VllmSampling(**CPU))
        hf = HfSampler(build_causal_lm(architecture, seed=0), sampling)
        start = time.perf_counter()
        await vllm.refresh(PolicyWeights(PolicyVersion(0), body))
        show("sampler start_s", round(time.perf_counter() - start, 1))
        await hf.refresh(PolicyWeights(PolicyVersion(0), body))
        for engine_name, engine in (("vllm", vllm), ("hf", hf)):
            # The first round of an engine is its warm-up.
            found = [await sampled(engine, requests) for _ in range(1 + rounds)][1:]
            rates[f"{engine_name} {label}"] = float(np.median([rate for rate, _ in found]))
            show(f"{engine_name} {label} candidates tokens/s", [round(rate) for rate, _ in found])
        if extra:
            trajectories = found[0][1]
            await refreshed(vllm, body, rounds)
        await vllm.close()
        await hf.close()
    await scored(architecture, body, trajectories, rounds, rates)


async def scored(
    architecture: dict[str, Any], body: bytes, made: Sequence[Trajectory], rounds: int, rates: dict[str, float]
) -> None:
    """Scored tokens/s of both teachers, and of the student scorer that would make candidates afterwards."""
    hf = HfScorer(build_causal_lm(architecture, seed=0), name="t", tokenizer_digest="t", row_capacity=128)
    plain = [_without_candidates(trajectory) for trajectory in made]
    request = ScoreRequest(top_k=0, num_teacher_draws=0, temperature=1.0, seed=0)
    prefill = ScoreRequest(top_k=HEAD, num_teacher_draws=NUM_DRAWS, temperature=1.0, seed=0)
    rate = await scored_rate(hf, plain, prefill, rounds, "hf prefill pass for candidates")
    for_both = 1 / (1 / rates["vllm without"] + 1 / rate)
    show(
        "vllm tokens/s: without, with candidates, with the fallback's prefill pass",
        [round(rates["vllm without"]), round(rates["vllm with"]), round(for_both)],
    )
    folder = ModelFolder(len(body))
    folder.write(architecture, body)
    vllm = VllmScorer(
        str(folder.path),
        name="t",
        tokenizer_digest="t",
        vocab_size=architecture["vocab_size"],
        max_context=MAX_CONTEXT,
        settings=VllmEngine(**CPU),
        owned_folder=folder,
    )
    for name, scorer in (("hf", hf), ("vllm", vllm)):
        if name == "hf" or architecture["vocab_size"] <= MAX_FULL_VOCABULARY:
            await scored_rate(scorer, made, request, rounds, f"{name} scored at candidates")
        top = ScoreRequest(top_k=8, num_teacher_draws=0, temperature=1.0, seed=0)
        await scored_rate(scorer, plain, top, rounds, f"{name} scored top 8")
        await scorer.close()


async def scored_rate(
    scorer: Scorer, asked: Sequence[Trajectory], request: ScoreRequest, rounds: int, label: str
) -> float:
    """Median tokens/s over `rounds`, after one that is not counted."""
    num_tokens = sum(len(trajectory.response_ids) for trajectory in asked)
    await scorer.score(asked, request)
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        await scorer.score(asked, request)
        rates.append(num_tokens / (time.perf_counter() - start))
    show(f"{label} tokens/s", [round(rate) for rate in rates])
    return float(np.median(rates))


def _without_candidates(trajectory: Trajectory) -> Trajectory:
    empty_ids = np.empty((len(trajectory.response_ids), 0), np.int32)
    empty = empty_ids.astype(np.float32)
    fields = vars(trajectory) | {
        "candidates": type(trajectory.candidates)(
            head_ids_TK=empty_ids,
            head_logprobs_TK=empty,
            draw_ids_TN=empty_ids,
            draw_logprobs_TN=empty,
            tail_logmass_T=np.zeros(len(empty), np.float32),
        )
    }
    return Trajectory(**fields)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of every figure (default 3)")
    parser.add_argument("--shape", choices=SHAPES, default="2 × 64", help="layers × width (default 2 × 64)")
    parser.add_argument("--vocab-size", type=int, default=42, help="ids (default 42)")
    parser.add_argument("--count", type=int, default=512, help="responses of one round (default 512)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_layers, hidden_size = SHAPES[arguments.shape]
    model = build_causal_lm(
        architecture_of_size(
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=2,
            vocab_size=arguments.vocab_size,
            max_positions=256,
            eos_id=EOS_ID,
            pad_id=0,
        ),
        seed=0,
    )
    show("shape", f"{arguments.shape}, {arguments.vocab_size} ids; load {os.getloadavg()[0]:.1f}")
    await measure(model.config.to_dict(), to_safetensors(model), arguments.count, arguments.rounds)
    show("load", round(os.getloadavg()[0], 1))


if __name__ == "__main__":
    asyncio.run(main())
