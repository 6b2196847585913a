"""A run of any size as its roles would have left it, written through our own writers: what benchmarks/queries.py asks.

Student and teacher are random distributions over the walk vocabulary that differ by noise, so every stored log-prob is
one of a real distribution: masses, KL and ratios come out plausible, and top-k ids really are the most likely ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncopd.config import load_config
from asyncopd.records import Facts
from asyncopd.types import (
    Candidates,
    Evaluation,
    IndexRange,
    PolicyVersion,
    PolicyWeights,
    Span,
    TeacherScores,
    TrainStep,
    Trajectory,
    VersionRun,
)
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores.base import ObjectStore

START = 1_790_000_000.0
HEAD, DRAWS, TOPK = 4, 4, 8
VOCABULARY = 41
GROUPS = ("noise 0.05", "noise 0.35", "noise 0.65", "noise 0.85")


@dataclass(frozen=True)
class LogSize:
    """How large a log to write."""

    num_tokens: int = 1_000_000
    """Response tokens, at least."""
    batch_size: int = 64
    shard_size: int = 64
    mean_tokens: int = 30
    """Mean response length; the longest have 192."""


def write_log(store: ObjectStore, run_id: str, size: LogSize, *, seed: int = 0) -> StoredRunLog:
    """Publish policies, shards, scores, claims, steps, evaluations and spans until `size.num_tokens` are there."""
    rng = np.random.default_rng(seed)
    config = load_config(
        {
            "name": "benchmark",
            "learner": {"batch_size": size.batch_size, "num_steps": 100_000},
            "rollout": {"shard_size": size.shard_size},
        }
    )
    record = {"config": config.model_dump(mode="json"), "config_hash": config.digest(), "created": START}
    log = create_run(store, run_id, record)
    _policy(log, 0)
    num_tokens = step = 0
    while num_tokens < size.num_tokens:
        indices = IndexRange(step * size.batch_size, (step + 1) * size.batch_size)
        staleness = int(min(step, rng.integers(0, 3)))
        trained = 0
        for start in range(indices.start, indices.stop, size.shard_size):
            trained += _shard(log, IndexRange(start, start + size.shard_size), step - staleness, size, rng)
        num_tokens += trained
        _step(log, step, indices, staleness, trained, rng)
        step += 1
    _spans(log, step)
    return log


def _shard(log: StoredRunLog, shard: IndexRange, version: int, size: LogSize, rng: np.random.Generator) -> int:
    lengths = np.minimum(rng.geometric(1 / size.mean_tokens, len(shard)), 192)
    num_tokens = int(lengths.sum())
    student_TV = _logsoftmax(rng.normal(0, 2, (num_tokens, VOCABULARY)).astype(np.float32))
    teacher_TV = _logsoftmax(student_TV + rng.normal(0, 0.7, student_TV.shape).astype(np.float32))
    response_T = _draw(student_TV, 1, rng)[:, 0]
    head_TK = np.argsort(-student_TV, axis=1)[:, :HEAD].astype(np.int32)
    draws_TN = _draw(student_TV, DRAWS, rng)
    topk_TK = np.argsort(-teacher_TV, axis=1)[:, :TOPK].astype(np.int32)
    at = np.take_along_axis
    tail_T = np.log1p(-np.minimum(np.exp(at(student_TV, head_TK, 1)).sum(1), 1 - 1e-6))
    trajectories, scores = [], []
    ends = np.cumsum(lengths)
    for index, start, stop in zip(shard.indices, ends - lengths, ends, strict=True):
        rows = slice(int(start), int(stop))
        count = int(stop - start)
        is_split = version > 0 and count > 20
        candidates = Candidates(
            head_TK[rows],
            at(student_TV, head_TK, 1)[rows],
            tail_T[rows],
            draws_TN[rows],
            at(student_TV, draws_TN, 1)[rows],
            "policy",
        )
        trajectories.append(
            Trajectory(
                index=index,
                prompt_id=f"walk-{index % 930}",
                prompt_ids=np.array([2 + index % 4, 10 + index % 31, 10 + index % 29], np.int32),
                response_ids=response_T[rows],
                behaviour_logprobs_T=at(student_TV, response_T[:, None], 1)[rows, 0],
                version_runs=(VersionRun(version - 1, 10), VersionRun(version, count - 10))
                if is_split
                else (VersionRun(version, count),),
                finish_reason="stop" if count < 192 else "length",
                candidates=candidates,
                group=GROUPS[index % 4],
                correct=bool(rng.random() < 0.7 - 0.15 * (index % 4)),
            )
        )
        scores.append(
            TeacherScores(
                index=index,
                teacher="oracle",
                teacher_digest="d1",
                temperature=1.0,
                sampled_logprobs_T=at(teacher_TV, response_T[:, None], 1)[rows, 0],
                topk_ids_TK=topk_TK[rows],
                topk_logprobs_TK=at(teacher_TV, topk_TK, 1)[rows],
                head_logprobs_TK=at(teacher_TV, head_TK, 1)[rows],
                draw_logprobs_TN=at(teacher_TV, draws_TN, 1)[rows],
                teacher_draw_ids_TM=np.zeros((count, 0), np.int32),
                teacher_draw_logprobs_TM=np.zeros((count, 0), np.float32),
            )
        )
    for stage, worker in (("rollout", "rollout-0"), ("score-oracle", "score-0")):
        log.claim(stage, shard, worker=worker, lease_s=60)
    log.publish_trajectories(shard, trajectories, worker="rollout-0", facts=Facts(seconds=num_tokens / 5000))
    log.publish_scores("oracle", shard, scores, worker="score-0", facts=Facts(seconds=num_tokens / 20000))
    return num_tokens


def _step(
    log: StoredRunLog, step: int, indices: IndexRange, staleness: int, num_tokens: int, rng: np.random.Generator
) -> None:
    finished = START + 2.0 * step
    version = PolicyVersion(step + 1)
    _policy(log, step + 1)
    log.publish_step(
        TrainStep(
            step=step,
            rewind=0,
            indices=indices,
            version=version,
            num_tokens=num_tokens,
            metrics={
                "train/loss_nats": float(rng.normal(0.5, 0.05)),
                "train/kl_nats": float(rng.normal(0.3, 0.03)),
                "train/drift_nats": 1e-3 * staleness + 1e-9,
                "train/ess_fraction": 1 - 0.01 * staleness,
                "train/ratio_p01": 1 - 0.1 * staleness - 1e-6,
                "train/ratio_p50": 1.0,
                "train/ratio_p99": 1 + 0.1 * staleness + 1e-6,
                "train/ratio_max": 1 + 0.5 * staleness + 2e-6,
                "train/staleness_mean_versions": float(staleness),
                "train/staleness_max_versions": float(staleness),
                "train/seconds": 0.3,
            },
            staleness_tokens={staleness: num_tokens},
            finished=finished,
        )
    )
    if step % 25 == 0:
        groups = dict.fromkeys(GROUPS, 0.5)
        log.publish_evaluation(Evaluation(version, 300, 0.5, groups, 0.3, 0.01, 30.0, finished))


def _policy(log: StoredRunLog, number: int) -> None:
    log.publish_policy(
        PolicyWeights(PolicyVersion(number), b"w%d" % number), worker="learn-0", facts=Facts(step=number)
    )


def _spans(log: StoredRunLog, num_steps: int) -> None:
    for role, activity in (("rollout", "sample"), ("score", "score"), ("learn", "train")):
        spans = [
            Span(role, f"{role}-0", activity, START + 2.0 * s, START + 2.0 * s + 0.5, f"step {s}")
            for s in range(num_steps)
        ]
        log.publish_spans(f"{role}-0", 1, spans)


def _draw(logprobs_TV: NDArray[np.float32], num_draws: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """[T, N] ids by the Gumbel trick, which is one argmax over all rows for each draw."""
    shape = logprobs_TV.shape
    draws = [(logprobs_TV + rng.gumbel(size=shape).astype(np.float32)).argmax(1) for _ in range(num_draws)]
    return np.stack(draws, axis=1).astype(np.int32)


def _logsoftmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits_TV - logits_TV.max(1, keepdims=True)
    logprobs: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logprobs
