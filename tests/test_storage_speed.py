"""How long storage takes, with limits far above what was measured (docs/storage.md). `pytest -s` shows the figures."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from storage_builders import fresh_log, make_scores, make_trajectory

from asyncopd.records import WorkerStatus
from asyncopd.types import IndexRange, PolicyVersion, PolicyWeights, Trajectory
from storage.parquet import decode_scores, decode_trajectories, encode_scores, encode_trajectories

LIMIT_MS = 100.0
WORKER: dict[str, Any] = {"worker": "w"}


def _walk_rows(indices: Iterable[int]) -> list[Trajectory]:
    """Trajectories of the walk task's mean length, head 4 + tail 4."""
    return [make_trajectory(index, num_tokens=11, head_k=4, num_draws=4) for index in indices]


def _fastest_ms(name: str, *calls: Callable[[], object]) -> float:
    """Run every call once; print their median time and return the fastest, which a busy machine disturbs least."""
    times_ms = []
    for call in calls:
        start = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - start) * 1000)
    print(f"{name}: median {sorted(times_ms)[len(calls) // 2]:.3f} ms of {len(calls)}, fastest {min(times_ms):.3f} ms")
    return min(times_ms)


@pytest.mark.parametrize("num_rows", [8, 64])
def test_a_walk_shard_is_encoded_and_decoded_in_milliseconds(num_rows: int) -> None:
    rows = _walk_rows(range(num_rows))
    scores = [make_scores(row, top_k=0, num_teacher_draws=0) for row in rows]
    body, scores_body = encode_trajectories(rows, "run"), encode_scores(scores, "run")
    print(f"\n{num_rows} trajectories: {len(body)} bytes, scores {len(scores_body)} bytes")
    for name, call in (
        ("encode trajectories", functools.partial(encode_trajectories, rows, "run")),
        ("decode trajectories", functools.partial(decode_trajectories, body, "key")),
        ("encode scores", functools.partial(encode_scores, scores, "run")),
        ("decode scores", functools.partial(decode_scores, scores_body, "key")),
    ):
        assert _fastest_ms(f"{name} x{num_rows}", *[call] * 30) < LIMIT_MS


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_publishing_and_polling_take_milliseconds(kind: str, tmp_path: Path) -> None:
    log = fresh_log(kind, tmp_path)
    limit_ms = LIMIT_MS if kind == "file" else 10 * LIMIT_MS
    num_calls = 30 if kind == "file" else 10
    shards = [IndexRange(8 * number, 8 * number + 8) for number in range(num_calls)]
    rows = {shard: _walk_rows(shard.indices) for shard in shards}
    policies = [PolicyWeights(PolicyVersion(number), bytes(300_000)) for number in range(num_calls)]
    partial = functools.partial
    print()
    for name, calls in (
        ("publish_trajectories x8", [partial(log.publish_trajectories, s, rows[s], **WORKER) for s in shards]),
        ("read_trajectories x8", [partial(log.read_trajectories, s) for s in shards]),
        ("publish_policy 300 kB", [partial(log.publish_policy, policy, **WORKER) for policy in policies]),
        ("latest_policy, nothing new", [log.latest_policy] * 100),
        ("read_policy 300 kB", [partial(log.read_policy, policy.version) for policy in policies]),
        ("claim", [partial(log.claim, "rollout", s, worker="w", lease_s=9.0) for s in shards]),
        ("heartbeat", [partial(log.heartbeat, "w", WorkerStatus(num_tokens=n)) for n in range(num_calls)]),
    ):
        assert _fastest_ms(f"{kind} {name}", *calls) < limit_ms
