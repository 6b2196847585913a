"""Packed against padded rows in the learner: trained tokens per CPU-second on the walk task's length mix, one thread.

    python benchmarks/packing.py [--trajectories 512] [--rounds 5]

Both train the quickstart's student (2 × 48) with head + tail on the same responses, as long as the task's
demonstrations, 64 a step, through `optimizer_step`. Micro-batches have the same number of cells, 32 rows of 128:
packed rows hold several sequences, padded rows one each, as wide as the longest of their micro-batch. Time is the
process's own CPU time, and rounds alternate between the two, because other load on a machine comes and goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

# Before torch: OpenMP reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from accelerate import Accelerator

from asyncopd.config.losses import HeadTailConfig
from asyncopd.learner.optimize import LogprobModel, MicroBatch, micro_batches, optimizer_step
from asyncopd.losses import TokenRows, build_estimator
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.packing import pad
from asyncopd.tasks.walk import WalkTask
from asyncopd.types import Candidates, ScoredTrajectory, TeacherScores, Trajectory, VersionRun

BATCH_SIZE, ROW_CAPACITY, ROWS = 64, 128, 32
HEAD = DRAWS = 4
Cut = Callable[[Sequence[ScoredTrajectory]], list[MicroBatch]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed against padded learner steps, trained tokens per CPU-second.")
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = WalkTask(0)
    batch = [scored(task, index) for index in range(arguments.trajectories)]
    lengths = np.array([len(s.trajectory.response_ids) for s in batch])
    print(
        f"{len(batch)} responses of mean {lengths.mean():.1f}, p99 {np.percentile(lengths, 99):.0f}, longest "
        f"{lengths.max()} tokens; {BATCH_SIZE} a step"
    )
    for name, cut in (("packed", packed), ("padded", padded)):
        cells = sum(m.packed.ids_RC.size for start in steps(batch) for m in cut(start))
        print(f"{name}: {cells:,} cells for {lengths.sum():,} trained tokens")
    ratios = []
    cpu_seconds_of(task, packed, batch[:BATCH_SIZE])
    for number in range(arguments.rounds):
        rates = {cut.__name__: lengths.sum() / cpu_seconds_of(task, cut, batch) for cut in (packed, padded)}
        ratios.append(rates["packed"] / rates["padded"])
        print(
            f"round {number}: packed {rates['packed']:7,.0f}   padded {rates['padded']:7,.0f} tokens per CPU-second   "
            f"ratio {ratios[-1]:.2f}"
        )
    print(f"ratio: median {statistics.median(ratios):.2f}, worst {min(ratios):.2f}, best {max(ratios):.2f}")


def steps(batch: Sequence[ScoredTrajectory]) -> list[Sequence[ScoredTrajectory]]:
    return [batch[start : start + BATCH_SIZE] for start in range(0, len(batch), BATCH_SIZE)]


def packed(batch: Sequence[ScoredTrajectory]) -> list[MicroBatch]:
    """As the learner does it."""
    return micro_batches(batch, row_capacity=ROW_CAPACITY, rows_per_micro_batch=ROWS, device=torch.device("cpu"))


def padded(batch: Sequence[ScoredTrajectory]) -> list[MicroBatch]:
    """Sequences in index order, as many as fit the same number of cells once all are as wide as the longest."""
    groups: list[list[ScoredTrajectory]] = [[]]
    for each in batch:
        widest = max(length(s) for s in [*groups[-1], each])
        if groups[-1] and widest * (len(groups[-1]) + 1) > ROW_CAPACITY * ROWS:
            groups.append([])
        groups[-1].append(each)
    return [
        MicroBatch(
            pad([(s.trajectory.prompt_ids, s.trajectory.response_ids) for s in group]), TokenRows.from_scored(group)
        )
        for group in groups
    ]


def length(scored: ScoredTrajectory) -> int:
    return len(scored.trajectory.prompt_ids) + len(scored.trajectory.response_ids) - 1


def cpu_seconds_of(task: WalkTask, cut: Cut, batch: Sequence[ScoredTrajectory]) -> float:
    """All steps over `batch`, cutting into micro-batches included."""
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
    model = LogprobModel(build_causal_lm(architecture, seed=0).train(), temperature=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    estimator = build_estimator(HeadTailConfig(head=HEAD, num_draws=DRAWS))
    accelerator = Accelerator(cpu=True)
    started = time.process_time()
    for step in steps(batch):
        optimizer_step(model, optimizer, cut(step), estimator, accelerator=accelerator, grad_clip=1.0)
    return time.process_time() - started


def scored(task: WalkTask, index: int) -> ScoredTrajectory:
    """The index-th demonstration as if sampled; head and draws are arbitrary ids, on which time does not depend."""
    demonstration = task.demonstration(index, "train")
    count = len(demonstration.response_ids)
    rng = np.random.default_rng(index)
    ids = np.stack([rng.permutation(task.tokenizer.vocab_size)[: HEAD + DRAWS] for _ in range(count)]).astype(np.int32)
    logprobs = np.full(ids.shape, -4.0, np.float32)
    trajectory = Trajectory(
        index=index,
        prompt_id=str(index),
        prompt_ids=demonstration.prompt_ids,
        response_ids=demonstration.response_ids,
        behaviour_logprobs_T=np.full(count, -1.0, np.float32),
        version_runs=(VersionRun(0, count),),
        finish_reason="stop",
        candidates=Candidates(
            head_ids_TK=ids[:, :HEAD],
            head_logprobs_TK=logprobs[:, :HEAD],
            tail_logmass_T=np.full(count, -1.0, np.float32),
            draw_ids_TN=ids[:, HEAD:],
            draw_logprobs_TN=logprobs[:, HEAD:],
            law="tail",
        ),
    )
    scores = TeacherScores(
        index=index,
        teacher="none",
        teacher_digest="0",
        temperature=1.0,
        sampled_logprobs_T=np.full(count, -1.0, np.float32),
        topk_ids_TK=ids[:, :0],
        topk_logprobs_TK=logprobs[:, :0],
        head_logprobs_TK=logprobs[:, :HEAD],
        draw_logprobs_TN=logprobs[:, HEAD:],
        teacher_draw_ids_TM=ids[:, :0],
        teacher_draw_logprobs_TM=logprobs[:, :0],
    )
    return ScoredTrajectory(trajectory, scores)


if __name__ == "__main__":
    main()
