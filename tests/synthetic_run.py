"""Builders for a run's stored history as its roles would have left it: a plausible pipeline on a simulated clock."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncopd.config import RunConfig
from asyncopd.records import WorkerStatus
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

START = 1_700_000_000.0
"""Unix time at which synthetic runs begin."""
GROUPS = {"noise 0.05": 0.6, "noise 0.35": 0.45, "noise 0.65": 0.25, "noise 0.85": 0.1}


def config_of(**changes: Any) -> RunConfig:
    """A small valid configuration; `changes` replace whole sections, for example `evaluate={"every": 0}`."""
    sections: dict[str, Any] = {
        "learner": {"num_steps": 12, "batch_size": 8},
        "rollout": {"shard_size": 4},
        "evaluate": {"every": 4},
    }
    return RunConfig.model_validate({**sections, **changes})


def new_log(store: ObjectStore, config: RunConfig, run_id: str = "synthetic") -> StoredRunLog:
    return create_run(store, run_id, {"config": config.model_dump(mode="json"), "config_hash": config.digest()})


def trajectory(index: int, num_tokens: int, version: int = 0, *, stopped: bool = True) -> Trajectory:
    """A response of `num_tokens` tokens without candidates."""
    none_ids, none = np.zeros((num_tokens, 0), np.int32), np.zeros((num_tokens, 0), np.float32)
    return Trajectory(
        index=index,
        prompt_id=f"prompt-{index}",
        prompt_ids=np.array([1, 2, 3], np.int32),
        response_ids=np.full(num_tokens, 5, np.int32),
        behaviour_logprobs_T=np.full(num_tokens, -1, np.float32),
        version_runs=(VersionRun(version, num_tokens),),
        finish_reason="stop" if stopped else "length",
        candidates=Candidates(none_ids, none, np.zeros(num_tokens, np.float32), none_ids, none),
        correct=stopped,
    )


def scores_of(scored: Trajectory, teacher: str = "oracle") -> TeacherScores:
    num_tokens = len(scored.response_ids)
    none_ids, none = np.zeros((num_tokens, 0), np.int32), np.zeros((num_tokens, 0), np.float32)
    sampled = np.full(num_tokens, -1, np.float32)
    return TeacherScores(scored.index, teacher, "d", 1.0, sampled, none_ids, none, none, none, none_ids, none)


def train_step(number: int, *, finished: float = START, num_tokens: int = 100, **changes: Any) -> TrainStep:
    """Step `number` of batches of 8, all of whose tokens have staleness 0 unless told otherwise."""
    progress = 1 - 0.8 * np.exp(-number / 40)
    fields: dict[str, Any] = {
        "step": number,
        "rewind": 0,
        "indices": IndexRange(8 * number, 8 * number + 8),
        "version": PolicyVersion(number + 1),
        "num_tokens": num_tokens,
        "metrics": {
            "train/loss_nats": 0.9 - 0.6 * progress,
            "train/kl_nats": 0.8 - 0.6 * progress,
            "train/drift_nats": 0.004,
            "train/ess_fraction": 0.98,
            "train/entropy_nats": 1.1 - 0.5 * progress,
            "train/grad_norm": 0.7,
        },
        "staleness_tokens": {0: num_tokens},
        "finished": finished,
    }
    return TrainStep(**{**fields, **changes})


def evaluation(version: int, accuracy: float = 0.5, **changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "version": PolicyVersion(version),
        "num_prompts": 300,
        "accuracy": accuracy,
        "accuracy_by_group": {group: min(1.0, share + accuracy - 0.4) for group, share in GROUPS.items()},
        "kl_nats": 0.9 - accuracy,
        "kl_standard_error_nats": 0.02,
        "mean_response_tokens": 12.0,
        "finished": START + 10.0 * version,
    }
    return Evaluation(**{**fields, **changes})


def weights_of(version: int) -> PolicyWeights:
    return PolicyWeights(PolicyVersion(version), b"weights %d" % version)


def publish_run(log: StoredRunLog, config: RunConfig, *, num_steps: int | None = None, seed: int = 0) -> None:
    """Everything a run that got to `num_steps` leaves: shards, scores, steps, evaluations, timeline, heartbeats.

    Step s takes a second. Rollout works all the time, two versions ahead; every role's overhead is a few per cent.
    """
    rng = np.random.default_rng(seed)
    plan = config.plan
    steps = plan.num_steps if num_steps is None else num_steps
    every = config.evaluate.every
    spans: dict[str, list[Span]] = {role: [] for role in ("rollout", "score", "learn", "evaluate")}

    def span(role: str, activity: str, start: float, end: float, detail: str = "") -> None:
        spans[role].append(Span(role, f"{role}-host-1-aaaa", activity, START + start, START + end, detail))

    for s in range(steps):
        tokens = 0
        for shard in plan.shards_of_step(s):
            lengths = np.minimum(rng.geometric(1 / 11, len(shard)) + rng.integers(0, 40, len(shard)) ** 2 // 400, 192)
            rows = [
                trajectory(index, int(n), max(0, s - plan.max_staleness), stopped=n < 192)
                for index, n in zip(shard.indices, lengths, strict=True)
            ]
            log.publish_trajectories(shard, rows, worker="rollout-host-1-aaaa")
            scores = [scores_of(row) for row in rows]
            log.publish_scores(config.teacher.name, shard, scores, worker="score-host-1-aaaa")
            tokens += int(lengths.sum())
        rolled = max(0.0, s - 2.0)
        slack = 0.25 if s > 2 else 0.0
        span("rollout", "sample", rolled + slack, rolled + 1.0)
        span("rollout", "wait:version", rolled, rolled + slack + 0.1, f"version {s - 2} (step {s - 3} to be trained)")
        span("rollout", "orchestrate:parquet", rolled + 0.90, rolled + 0.93, plan.step(s).name)
        span("score", "score", s + 0.05, s + 0.35, plan.step(s).name)
        span("score", "wait:shard", s + 0.36, s + 1.04, f"shard {plan.step(s).name} to be sampled")
        span("score", "orchestrate:prefect", s + 0.35, s + 0.36, "score-shards")
        span("learn", "wait:scores", s + 0.3, s + 0.45, f"scores of {plan.step(s).name}")
        span("learn", "train", s + 0.45, s + 1.25, f"step {s}")
        span("learn", "orchestrate:publish", s + 1.25, s + 1.29, f"version {s + 1}")
        ages = dict.fromkeys(range(min(s, plan.max_staleness) + 1), tokens // (plan.max_staleness + 1))
        ages[min(s, plan.max_staleness)] += tokens - sum(ages.values())
        noise = {key: float(v * rng.normal(1, 0.08)) for key, v in train_step(s).metrics.items()}
        finished = START + s + 1.29
        changes = {"indices": plan.step(s), "staleness_tokens": ages, "metrics": noise}
        log.publish_step(train_step(s, finished=finished, num_tokens=tokens, **changes))
    for version in range(0, steps + 1, every) if every else []:
        span("evaluate", "evaluate", version + 1.3, version + 2.5, f"version {version}")
        log.publish_evaluation(evaluation(version, 0.43 + 0.3 * (1 - np.exp(-2 * version / plan.num_steps))))
    for role, own in spans.items():
        log.publish_spans(f"{role}-host-1-aaaa", 1, own)
        log.heartbeat(f"{role}-host-1-aaaa", WorkerStatus(role=role))
        log.retire(f"{role}-host-1-aaaa")
