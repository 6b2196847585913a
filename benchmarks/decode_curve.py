"""What `asyncopd plan` must be told about this machine: decode steps by active slots, cache rebuilds, shared cores.

    python benchmarks/decode_curve.py

The quickstart's student (head 4 + tail 4, as recorded) in the run's own decoder, one thread a process. Prints the
options for `asyncopd plan`: --decode, --prefill-token-s, and --speeds from 1, 2 and 3 processes that decode at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from statistics import median

# Before torch: OpenMP reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest
from asyncopd.rollout.decoding import Decoder
from asyncopd.tasks.walk import WalkTask
from asyncopd.types import PolicyVersion, PolicyWeights

ACTIVE = (1, 8, 16, 32, 64, 96, 128)
NUM_STEPS = 90
CORUN_S = 8.0


def decoder(num_slots: int) -> tuple[Decoder, PolicyWeights]:
    """The quickstart's sampler with `num_slots` responses in it that do not end."""
    torch.set_num_threads(1)
    task = WalkTask(0)
    architecture = architecture_of_size(
        num_layers=2,
        hidden_size=48,
        num_heads=4,
        vocab_size=task.tokenizer.vocab_size,
        max_positions=256,
        eos_id=task.tokenizer.eos_id,
        pad_id=task.tokenizer.pad_id,
    )
    model = build_causal_lm(architecture, seed=0)
    weights = PolicyWeights(PolicyVersion(0), to_safetensors(model))
    made = Decoder(
        model,
        SamplerSettings(slots=num_slots, max_context=224, stop_ids=(), seed=0, head=4, num_draws=4, law="tail"),
    )
    made.refresh(weights)
    for index in range(num_slots):
        made.admit(SampleRequest(index, task.prompt(index, "train").ids, 200))
    return made, weights


def step_s(decoding: Decoder) -> float:
    started = time.perf_counter()
    decoding.step()
    return time.perf_counter() - started


@torch.inference_mode()
def curve() -> tuple[list[float], float]:
    """(seconds of a step for each of ACTIVE, seconds for each token whose cache is rebuilt)."""
    seconds, rebuilt = [], 0.0
    for num_slots in ACTIVE:
        decoding, weights = decoder(num_slots)
        seconds.append(median([step_s(decoding) for _ in range(NUM_STEPS)][5:]))
        loading = time.perf_counter()
        decoding.refresh(weights)
        loading = time.perf_counter() - loading
        rebuilt = (step_s(decoding) - seconds[-1]) / (num_slots * (NUM_STEPS + 3))
        print(
            f"{num_slots:4d} active: {1000 * seconds[-1]:.2f} ms a step; refresh {1000 * loading:.1f} ms and "
            f"{1e6 * rebuilt:.1f} µs for each token in flight",
            flush=True,
        )
    return seconds, rebuilt


@torch.inference_mode()
def decode_for(duration_s: float, together: Barrier, done: multiprocessing.Queue[int]) -> None:
    """Count the decode steps one process makes while the others make theirs."""
    num_steps, decoding = 0, decoder(64)[0]
    together.wait()
    ends = time.perf_counter() + duration_s
    while time.perf_counter() < ends:
        if num_steps % 150 == 149:
            decoding = decoder(64)[0]  # out of context; the others are interrupted as often
        decoding.step()
        num_steps += 1
    done.put(num_steps)


def speeds() -> list[float]:
    """Speed of each of 1, 2, 3 processes that decode at once, relative to one alone."""
    context = multiprocessing.get_context("spawn")
    rates = []
    for count in (1, 2, 3):
        together, done = context.Barrier(count), context.Queue()
        workers = [context.Process(target=decode_for, args=(CORUN_S, together, done)) for _ in range(count)]
        for worker in workers:
            worker.start()
        rates.append(sum(done.get() for _ in workers) / count)
        for worker in workers:
            worker.join()
    return [rate / rates[0] for rate in rates]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    seconds, rebuilt = curve()
    shared = speeds()
    shape = ",".join(f"{active}:{value:.5f}" for active, value in zip(ACTIVE, seconds, strict=True))
    print(
        f"--decode {shape} --prefill-token-s {rebuilt:.2e} --speeds "
        + ",".join(f"{min(1.0, speed):.2f}" for speed in shared)
    )


if __name__ == "__main__":
    main()
