"""Valid defaults for the storage tests, and the three kinds of store they run over."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, shared_moto

from asyncopd.types import (
    Candidates,
    DrawLaw,
    Evaluation,
    IndexRange,
    PolicyVersion,
    PolicyWeights,
    TeacherScores,
    TrainStep,
    Trajectory,
    VersionRun,
)
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores import open_store
from storage.stores.base import ObjectStore

STORE_KINDS = ("memory", "file", "s3")


@functools.cache
def s3_bucket() -> str:
    """A bucket on the moto server of this test process; sets the AWS_* variables."""
    os.environ |= {
        "AWS_ENDPOINT_URL": shared_moto(),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return BUCKET


def fresh_store(kind: str, folder: Path) -> ObjectStore:
    """An empty store of `kind`."""
    name = uuid.uuid4().hex
    if kind == "s3":
        return open_store(f"s3://{s3_bucket()}/{name}")
    return open_store(f"memory://{name}" if kind == "memory" else str(folder / name))


def fresh_log(kind: str, folder: Path) -> StoredRunLog:
    return create_run(fresh_store(kind, folder), "run", {"config": {}, "config_hash": "c0ffee"})


def memory_log() -> StoredRunLog:
    return fresh_log("memory", Path())


def reopened(log: StoredRunLog) -> StoredRunLog:
    """Another process's view of the same run: nothing cached."""
    return StoredRunLog(log.store, log.run_id)


def make_trajectory(
    index: int = 0,
    *,
    num_tokens: int = 3,
    head_k: int = 2,
    num_draws: int = 2,
    law: DrawLaw = "tail",
    version: int = 0,
    correct: bool | None = True,
    prompt_id: str = "q",
) -> Trajectory:
    rng = np.random.default_rng(index)
    ids = functools.partial(rng.integers, 0, 31, dtype=np.int32)
    logprobs = functools.partial(rng.standard_normal, dtype=np.float32)
    runs = (VersionRun(version, 1), VersionRun(version + 1, num_tokens - 1)) if num_tokens > 1 else None
    return Trajectory(
        index=index,
        prompt_id=prompt_id,
        prompt_ids=ids(4),
        response_ids=ids(num_tokens),
        behaviour_logprobs_T=logprobs(num_tokens),
        version_runs=runs or (VersionRun(version, 1),),
        finish_reason="stop",
        candidates=Candidates(
            head_ids_TK=ids((num_tokens, head_k)),
            head_logprobs_TK=logprobs((num_tokens, head_k)),
            tail_logmass_T=logprobs(num_tokens),
            draw_ids_TN=ids((num_tokens, num_draws)),
            draw_logprobs_TN=logprobs((num_tokens, num_draws)),
            law=law,
        ),
        group="easy",
        correct=correct,
    )


def make_trajectories(shard: IndexRange) -> list[Trajectory]:
    return [make_trajectory(index, num_tokens=1 + index % 5) for index in shard.indices]


def make_scores(trajectory: Trajectory, *, top_k: int = 3, num_teacher_draws: int = 1) -> TeacherScores:
    rng = np.random.default_rng(trajectory.index + 1000)
    num_tokens = len(trajectory.response_ids)
    ids = functools.partial(rng.integers, 0, 31, dtype=np.int32)
    logprobs = functools.partial(rng.standard_normal, dtype=np.float32)
    return TeacherScores(
        index=trajectory.index,
        teacher="oracle",
        teacher_digest="d1",
        temperature=1.0,
        sampled_logprobs_T=logprobs(num_tokens),
        topk_ids_TK=ids((num_tokens, top_k)),
        topk_logprobs_TK=logprobs((num_tokens, top_k)),
        head_logprobs_TK=logprobs(trajectory.candidates.head_ids_TK.shape),
        draw_logprobs_TN=logprobs(trajectory.candidates.draw_ids_TN.shape),
        teacher_draw_ids_TM=ids((num_tokens, num_teacher_draws)),
        teacher_draw_logprobs_TM=logprobs((num_tokens, num_teacher_draws)),
    )


def make_weights(number: int, rewind: int = 0, body: bytes = b"weights") -> PolicyWeights:
    return PolicyWeights(PolicyVersion(number, rewind), body + b" %d" % number)


def make_step(number: int, rewind: int = 0, metrics: dict[str, float] | None = None) -> TrainStep:
    return TrainStep(
        step=number,
        rewind=rewind,
        indices=IndexRange(number * 4, number * 4 + 4),
        version=PolicyVersion(number + 1, rewind),
        num_tokens=40,
        metrics=metrics or {"learn/loss_nats": 0.5},
        staleness_tokens={0: 30, 2: 10},
        finished=1000.0 + number,
        dropped={number * 4: "too long"},
    )


def make_evaluation(number: int, rewind: int = 0) -> Evaluation:
    return Evaluation(
        version=PolicyVersion(number, rewind),
        num_prompts=64,
        accuracy=0.5,
        accuracy_by_group={"easy": 0.75},
        kl_nats=0.25,
        kl_standard_error_nats=0.01,
        mean_response_tokens=11.0,
        finished=1000.0,
    )


def arrays_of(value: object) -> Iterator[tuple[str, object]]:
    """(path, field) of every field of a dataclass, candidates included, for exact comparison."""
    for name, item in vars(value).items():
        if isinstance(item, Candidates):
            yield from arrays_of(item)
        else:
            yield name, item


def assert_same(found: Sequence[object], expected: Sequence[object]) -> None:
    """Equal field by field; arrays bit by bit, dtype and shape included."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for (name, left), (_, right) in zip(arrays_of(ours), arrays_of(theirs), strict=True):
            if isinstance(right, np.ndarray):
                assert isinstance(left, np.ndarray), name
                assert (left.dtype, left.shape) == (right.dtype, right.shape), name
                assert left.tobytes() == right.tobytes(), name
            else:
                assert left == right, name
