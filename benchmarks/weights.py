"""What a policy version costs to publish and to read: full weights against deltas, float32 against bfloat16.

    python benchmarks/weights.py --lr 1e-6            # 38M-parameter Qwen3 shape, random weights
    python benchmarks/weights.py --walk --lr 1e-3     # the quickstart's student, pre-trained

Every version comes from a real step: responses sampled under the published weights, scored by a teacher, AdamW on the
head-and-tail loss. The same master weights are published four ways on a local disk, so that the ways can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Literal, TypeVar

# Before torch: OpenMP reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from asyncopd.config import load_config
from asyncopd.config.losses import HeadTailConfig
from asyncopd.config.schema import Learner
from asyncopd.learner.student import Student
from asyncopd.losses import build_estimator
from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest, Scorer, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.tasks.walk import WalkTask
from asyncopd.teacher.hf import HfScorer
from asyncopd.types import PolicyVersion, PolicyWeights, ScoredTrajectory
from flows.study import warm_start
from storage.manifests import read_manifest
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores import open_store

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FULL_EVERY = 16
LOSS = HeadTailConfig(head=4, num_draws=4)
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """What is trained, on what."""

    model: PreTrainedModel
    sampled: PreTrainedModel
    """The sampler's copy of the architecture."""
    scorer: Scorer
    prompt: Callable[[int], np.ndarray]
    eos_id: int
    batch_size: int
    max_new_tokens: int
    task: WalkTask | None


def random_world(num_layers: int, hidden_size: int, vocab_size: int) -> World:
    """A random-weight Qwen3 shape with random prompts; another seed is the teacher."""
    architecture = architecture_of_size(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=8,
        vocab_size=vocab_size,
        max_positions=128,
        eos_id=1,
        pad_id=0,
        model_type="qwen3",
    )
    model, sampled, teacher = (build_causal_lm(architecture, seed=seed) for seed in (0, 0, 1))

    def prompt(index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(2, vocab_size, 16).astype(np.int32)

    scorer = HfScorer(teacher, name="teacher", tokenizer_digest="none", row_capacity=64)
    return World(model, sampled, scorer, prompt, 1, 16, 32, None)


def walk_world(root: Path) -> World:
    """The quickstart's student after its warm start, with the oracle."""
    config = load_config("configs/quickstart.yaml", {"storage.root": str(root)})
    start = warm_start(config, open_store(str(root)))
    task = start.task(0)
    return World(
        model=start.model(),
        sampled=start.model(),
        scorer=start.scorer(),
        prompt=lambda index: task.prompt(index, "train").ids,
        eos_id=task.tokenizer.eos_id,
        batch_size=config.learner.batch_size,
        max_new_tokens=config.rollout.max_new_tokens,
        task=task,
    )


class Ways:
    """One log for every way of publishing, and the figures measured on it."""

    def __init__(self, root: Path, last: dict[Dtype, int]) -> None:
        """`last` is the last version that is published in each dtype."""
        self._last = last
        self.logs: dict[tuple[Dtype, str], StoredRunLog] = {}
        self.readers: dict[tuple[Dtype, str], StoredRunLog] = {}
        self.figures: dict[tuple[Dtype, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for dtype in DTYPES:
            for kind in ("full", "delta"):
                store = open_store(str(root / f"{dtype}-{kind}"))
                self.logs[dtype, kind] = create_run(store, "run", {"config_hash": ""})
                self.readers[dtype, kind] = StoredRunLog(store, "run")
                if kind == "delta":
                    self.logs[dtype, kind].publish_deltas(full_every=FULL_EVERY)

    def publish(self, number: int, bodies: dict[Dtype, bytes], before: dict[Dtype, bytes]) -> None:
        """Publish a version every way, and have an up-to-date reader read it."""
        for (dtype, kind), log in self.logs.items():
            if number > self._last[dtype]:
                continue
            weights = PolicyWeights(PolicyVersion(number), bodies[dtype])
            publish_s, _ = timed(lambda: log.publish_policy(weights, worker="learner"))  # noqa: B023
            read_s, found = timed(lambda: self.readers[dtype, kind].read_policy(weights.version))  # noqa: B023
            assert found == weights
            if number == 0:
                continue  # no version to be against
            figures = self.figures[dtype, kind]
            chain = read_manifest(log.store, log.layout.key("policy", state=weights.version)).facts.chain
            (full_key, *_) = log.store.list(f"{log.layout.folder('policy')}/{number:06d}")
            figures["bytes"].append(len(log.store.get((chain and chain.delta) or full_key)))
            figures["publish_s"].append(publish_s)
            figures["read_s"].append(read_s)
            if kind == "delta":
                figures["changed"].append(chain.num_changed / num_elements(bodies[dtype], dtype))
                figures["overwrite_bytes"].append(overwrite_bytes(before[dtype], bodies[dtype], dtype))

    def join(self) -> None:
        """A reader without anything reads the last versions: full weights, or the first and the chain from there."""
        for (dtype, kind), log in self.logs.items():
            for number in range(self._last[dtype] - 2, self._last[dtype] + 1):
                version = PolicyVersion(number)
                seconds, _ = timed(lambda: StoredRunLog(log.store, "run").read_policy(version))  # noqa: B023
                self.figures[dtype, kind]["join_s"].append(seconds)


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def num_elements(body: bytes, dtype: Dtype) -> int:
    return (len(body) - 8 - int.from_bytes(body[:8], "little")) // DTYPES[dtype].itemsize


def overwrite_bytes(before: bytes, after: bytes, dtype: Dtype) -> int:
    """Compressed size of the same delta with new values in place of differences, to see what differences save."""
    start = 8 + int.from_bytes(after[:8], "little")
    old, new = (np.frombuffer(body, f"<u{DTYPES[dtype].itemsize}", offset=start) for body in (before, after))
    changed = np.flatnonzero(old != new)
    gaps = (np.diff(changed, prepend=-1) - 1).astype(np.uint32)
    codec = pa.Codec("zstd", compression_level=1)
    planes = [np.ascontiguousarray(a.view(np.uint8).reshape(-1, a.itemsize).T) for a in (gaps, new[changed])]
    return sum(len(codec.compress(part)) for part in planes)


async def train(world: World, ways: Ways, *, lr: float, num_steps: int, sampled_dtype: Dtype) -> dict[str, list[float]]:
    """Train and publish; returns the metrics of every step."""
    student = Student(
        world.model,
        build_estimator(LOSS),
        Accelerator(cpu=True),
        Learner(
            lr=lr,
            warmup_steps=5 if world.task else 0,
            num_steps=num_steps,
            row_capacity=64 if world.task is None else 128,
        ),
        temperature=1.0,
    )
    sampling = SamplerSettings(
        slots=world.batch_size,
        max_context=16 + world.max_new_tokens,
        eos_id=world.eos_id,
        seed=0,
        head=LOSS.head,
        num_draws=LOSS.num_draws,
        law="tail",
    )
    sampler = HfSampler(world.sampled, sampling)
    metrics: dict[str, list[float]] = defaultdict(list)
    before = {dtype: to_safetensors(world.model, torch_dtype) for dtype, torch_dtype in DTYPES.items()}
    ways.publish(0, before, before)
    for step in range(num_steps):
        await sampler.refresh(PolicyWeights(PolicyVersion(step), before[sampled_dtype]))
        requests = [
            SampleRequest(index, world.prompt(index), world.max_new_tokens)
            for index in range(step * world.batch_size, (step + 1) * world.batch_size)
        ]
        trajectories = await asyncio.gather(*map(sampler.sample, requests))
        scores = await world.scorer.score(trajectories, ScoreRequest(0, 0, 1.0, 0))
        result = student.train(step, [ScoredTrajectory(t, s) for t, s in zip(trajectories, scores, strict=True)])
        for name, value in result.metrics.items():
            metrics[name].append(value)
        after = {dtype: to_safetensors(world.model, torch_dtype) for dtype, torch_dtype in DTYPES.items()}
        ways.publish(step + 1, after, before)
        before = after
    ways.join()
    if world.task is not None:
        await sampler.refresh(PolicyWeights(PolicyVersion(num_steps), before[sampled_dtype]))
        metrics["accuracy"] = [await accuracy(world.task, sampler, world.max_new_tokens)]
    await sampler.close()
    return metrics


async def accuracy(task: WalkTask, sampler: HfSampler, max_new_tokens: int, num_prompts: int = 1000) -> float:
    prompts = [task.prompt(index, "eval") for index in range(num_prompts)]
    requests = [SampleRequest(index, prompt.ids, max_new_tokens) for index, prompt in enumerate(prompts)]
    responses = await asyncio.gather(*map(sampler.sample, requests))
    return fmean(task.verify(p, r.response_ids.tolist()) for p, r in zip(prompts, responses, strict=True))


def table(ways: Ways, title: str) -> Table:
    shown = Table(title=title)
    for heading in (
        "published",
        "kind",
        "bytes/version",
        "of full",
        "changed",
        "overwrite bytes",
        "publish ms",
        "follow ms",
        "join ms",
    ):
        shown.add_column(heading, justify="right")
    for (dtype, kind), figures in ways.figures.items():
        full = median(ways.figures[dtype, "full"]["bytes"])
        cells = [f"{median(figures['bytes']):,.0f}", f"{median(figures['bytes']) / full:.1%}"]
        if kind == "delta":
            changed = figures["changed"]
            cells += [f"{median(changed):.2%} ({min(changed):.2%}–{max(changed):.2%})"]
            cells += [f"{median(figures['overwrite_bytes']):,.0f}"]
        else:
            cells += ["", ""]
        cells += [f"{1000 * median(figures[name]):.1f}" for name in ("publish_s", "read_s", "join_s")]
        shown.add_row(dtype, kind, *cells)
    return shown


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, default=FULL_EVERY - 1, help="learner steps (default 15)")
    parser.add_argument("--shape", type=int, nargs=3, default=[8, 512, 8192], metavar=("LAYERS", "HIDDEN", "VOCAB"))
    parser.add_argument("--walk", action="store_true", help="the quickstart's student instead of the large one")
    parser.add_argument("--sampled", choices=tuple(DTYPES), default="bfloat16", help="what samplers load")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=160)
    with tempfile.TemporaryDirectory(prefix="asyncopd-weights-") as folder:
        world = walk_world(Path(folder) / "models") if arguments.walk else random_world(*arguments.shape)
        # Large float32 deltas are slow and all alike: a few of them are enough.
        last_float32 = min(arguments.steps, FULL_EVERY - 1 if arguments.walk else 4)
        ways = Ways(Path(folder), {"float32": last_float32, "bfloat16": min(arguments.steps, FULL_EVERY - 1)})
        metrics = asyncio.run(
            train(world, ways, lr=arguments.lr, num_steps=arguments.steps, sampled_dtype=arguments.sampled)
        )
        size = world.model.num_parameters()
        console.print(table(ways, f"{world.model.config.model_type}, {size:,} parameters, lr {arguments.lr}"))
    tail = {name: fmean(values[len(values) // 2 :]) for name, values in metrics.items()}
    names = [name for name in ("train/drift_nats", "train/ess_fraction", "accuracy") if name in tail]
    console.print(
        f"sampled under {arguments.sampled} weights, {arguments.steps} steps, means over the second half: "
        + ", ".join(f"{name} {tail[name]:.3g}" for name in names)
    )


if __name__ == "__main__":
    main()
