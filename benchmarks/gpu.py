"""Trained tokens/s of τ = 0 against τ = 2, and the learner's MFU, on one GPU: random-weight Qwen3 shapes, hf engines.

Student as Qwen3-0.6B, teacher as Qwen3-1.7B, the real stages in three processes that share the device. Random weights
almost never emit EOS, so responses end at a cap of their index: log-normal, median 512, at most 2,048 tokens.
MFU counts 6 operations for each parameter that multiplies and each response token, over the seconds of the optimizer
steps and `--peak-tflops` (989: dense bfloat16 of an H100 or H200). Attention and the prompts' few tokens are left out.

    python benchmarks/gpu.py                 # on a GPU of 80 GB
    python benchmarks/gpu.py --tiny          # a minute on a CPU; shows that it works, its figures say nothing
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from asyncopd.config import RunConfig, load_config
from asyncopd.ports import Sampler, SampleRequest
from asyncopd.rollout.stage import RolloutStage
from asyncopd.types import PolicyVersion, PolicyWeights, Trajectory
from asyncopd.worker import Worker
from flows import roles
from flows.wiring import OpenRun, open_stored_run, rollout_stage
from storage.runs import create_run, new_record
from storage.stores import open_store

WARM_UP_STEPS = 2
"""Left out of every figure: compilation, allocation, and at τ = 2 the filling of the pipeline."""


@dataclass(frozen=True)
class Size:
    """Models, lengths and batch of one scale."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    vocab_size: int
    longest: int
    median: int
    batch_size: int
    slots: int


def _shape(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,
        "head_dim": head_dim,
    }


QWEN3 = Size(_shape(1024, 3072, 28, 16, 128), _shape(2048, 6144, 28, 16, 128), 151_936, 2048, 512, 64, 128)
TINY = Size(_shape(32, 64, 2, 2, 16), _shape(64, 128, 2, 2, 32), 512, 64, 16, 8, 8)


class CappedSampler:
    """The run's sampler, with a heavy-tailed cap on each response."""

    def __init__(self, sampler: Any, size: Size) -> None:
        self._sampler, self._size = sampler, size

    @property
    def version(self) -> PolicyVersion | None:
        return self._sampler.version  # type: ignore[no-any-return]

    async def sample(self, request: SampleRequest) -> Trajectory:
        spread = np.random.default_rng(request.index).lognormal(np.log(self._size.median), 1.0)
        cap = int(np.clip(spread, 1, self._size.longest))
        trajectory: Trajectory = await self._sampler.sample(replace(request, max_new_tokens=cap))
        return trajectory

    async def refresh(self, weights: PolicyWeights) -> None:
        await self._sampler.refresh(weights)

    async def close(self) -> None:
        await self._sampler.close()


# -- roles, one process each --------------------------------------------------------------------------------------
def be_role(role: str, root: str, run_id: str, size: Size) -> None:
    def capped_stage(run: OpenRun, worker: Worker) -> tuple[RolloutStage, Sampler]:
        stage, sampler = rollout_stage(run, worker)
        stage._sampler = CappedSampler(sampler, size)
        return stage, sampler

    roles.rollout_stage = capped_stage
    asyncio.run(roles.BODIES[role](open_stored_run(root, run_id)))


# -- one run ------------------------------------------------------------------------------------------------------
def make_model(folder: Path, shape: dict[str, Any], size: Size) -> int:
    """Save a random model. Returns how many of its parameters multiply: all but the input embedding, which is tied."""
    config = AutoConfig.for_model(
        "qwen3",
        **shape,
        vocab_size=size.vocab_size,
        max_position_embeddings=size.longest + 64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(shape["hidden_size"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def config_of(root: Path, size: Size, max_staleness: int, steps: int) -> RunConfig:
    def pretrained(name: str) -> dict[str, Any]:
        return {"kind": "pretrained", "path": str(root / name)}

    return load_config(
        {
            "name": "gpu",
            "storage": {"root": str(root / "runs")},
            "student": pretrained("student"),
            "teacher": {"engine": "hf", "model": pretrained("teacher")},
            "rollout": {"slots": size.slots, "shard_size": size.batch_size // 4, "max_new_tokens": size.longest},
            "score": {"row_capacity": 2 * size.longest},
            "learner": {
                "num_steps": steps,
                "batch_size": size.batch_size,
                "lr": 1e-6,
                "compute_dtype": "bfloat16",
                "row_capacity": 2 * size.longest,
                "rows_per_micro_batch": 1,
                "checkpoint_every": steps,
            },
            "staleness": {"max_staleness": max_staleness},
            "evaluate": {"every": 0},
            # Models of gigabytes take a while to load, and the learner is silent inside a step.
            "limits": {"lease_s": 120, "heartbeat_s": 5},
        },
        {},
    )


def measure(root: Path, size: Size, tiny: bool, max_staleness: int, steps: int) -> tuple[float, float, float]:
    """Trained tokens/s, tokens/s of the learner while it trains, and the run's largest staleness."""
    config = config_of(root, size, max_staleness, steps)
    run_id = f"gpu-{time.time_ns()}"
    log = create_run(open_store(config.storage.root), run_id, new_record(config))
    command = [sys.executable, __file__, "--root", config.storage.root, "--run-id", run_id, *(["--tiny"] * tiny)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = {
        role: subprocess.Popen([*command, "--role", role], env=environment) for role in ("learn", "rollout", "score")
    }
    try:
        for role, process in processes.items():
            if process.wait():
                raise SystemExit(f"{role} of {run_id} ended with status {process.returncode}")
    finally:
        for process in processes.values():
            process.kill()
    all_steps = log.steps()
    measured = all_steps[WARM_UP_STEPS:]
    num_tokens = sum(step.num_tokens for step in measured)
    wall_s = measured[-1].finished - all_steps[WARM_UP_STEPS - 1].finished
    train_s = sum(step.metrics["train/seconds"] for step in measured)
    largest = max(max(step.staleness_tokens) for step in all_steps)
    return num_tokens / wall_s, num_tokens / train_s, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="learner steps of each run (default 8)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each τ, interleaved (default 2)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device (default 989)")
    parser.add_argument("--tiny", action="store_true", help="models and lengths for a CPU")
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--run-id", help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=("learn", "rollout", "score"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else QWEN3
    if arguments.role:
        be_role(arguments.role, arguments.root, arguments.run_id, size)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with tempfile.TemporaryDirectory(prefix="asyncopd-gpu-") as folder:
        root = Path(folder)
        num_parameters = make_model(root / "student", size.student, size)
        make_model(root / "teacher", size.teacher, size)
        print(f"{device}, torch {torch.__version__}; student of {num_parameters:,} parameters", flush=True)
        rates: dict[int, list[float]] = {0: [], 2: []}
        for number in range(arguments.rounds):
            for tau in rates:
                rate, learner_rate, largest = measure(root, size, arguments.tiny, tau, arguments.steps)
                rates[tau].append(rate)
                mfu = 6 * num_parameters * learner_rate / (arguments.peak_tflops * 1e12)
                print(
                    f"round {number + 1}, τ={tau}: {rate:,.0f} trained tokens/s; learner {learner_rate:,.0f} tokens/s "
                    f"in its steps, MFU {mfu:.1%}; largest staleness {largest}",
                    flush=True,
                )
    ratios = [after / before for before, after in zip(rates[0], rates[2], strict=True)]
    print(f"τ=2 against τ=0, medians: {statistics.median(ratios):.2f} times the trained tokens/s")


if __name__ == "__main__":
    main()
