"""What maintenance costs on a run the size of the quickstart: `python benchmarks/maintain.py DIRECTORY`."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from asyncopd.config import load_config
from asyncopd.types import Candidates, IndexRange, PolicyVersion, PolicyWeights, TeacherScores, TrainStep, Trajectory
from asyncopd.types import VersionRun as Run
from storage.maintain.audit import audit_run
from storage.maintain.collect import collect_run
from storage.run_log import StoredRunLog
from storage.runs import create_run
from storage.stores import open_store

WEIGHTS_BYTES = 300_000
"""Of the quickstart's student."""


def trajectory(index: int, rng: np.random.Generator) -> tuple[Trajectory, TeacherScores]:
    """A response of 11 tokens on average, with head 4 and 4 draws, as the quickstart's loss asks for."""
    tokens = int(rng.geometric(1 / 11))
    ids = rng.integers(0, 31, (tokens, 10), dtype=np.int32)
    logprobs = rng.standard_normal((tokens, 10), dtype=np.float32)
    head, draws, none = slice(0, 4), slice(4, 8), slice(0, 0)
    candidates = Candidates(
        ids[:, head], logprobs[:, head], logprobs[:, 8].copy(), ids[:, draws], logprobs[:, draws], "tail"
    )
    made = Trajectory(
        index,
        f"q{index}",
        ids[:, 9][:4].copy(),
        ids[:, 8].copy(),
        logprobs[:, 9].copy(),
        (Run(0, tokens),),
        "stop",
        candidates,
    )
    scores = TeacherScores(
        index,
        "oracle",
        "d",
        1.0,
        logprobs[:, 0].copy(),
        ids[:, none],
        logprobs[:, none],
        logprobs[:, head],
        logprobs[:, draws],
        ids[:, none],
        logprobs[:, none],
    )
    return made, scores


def make_run(root: str, run_id: str, *, num_steps: int, batch_size: int, shard_size: int) -> StoredRunLog:
    rng = np.random.default_rng(0)
    config = load_config(
        {
            "learner": {"num_steps": num_steps, "batch_size": batch_size},
            "rollout": {"shard_size": shard_size},
            "evaluate": {"every": 0},
        }
    )
    log = create_run(open_store(root), run_id, {"config": config.model_dump(mode="json"), "config_hash": "x"})
    log.publish_architecture({"config.json": b"{}"})
    log.publish_policy(PolicyWeights(PolicyVersion(0), rng.bytes(WEIGHTS_BYTES)), worker="w")
    for step in range(num_steps):
        num_tokens = 0
        for shard in config.plan.shards_of_step(step):
            rows = [trajectory(index, rng) for index in shard.indices]
            num_tokens += sum(len(row.response_ids) for row, _ in rows)
            log.publish_trajectories(shard, [row for row, _ in rows], worker="w")
            log.publish_scores("oracle", shard, [scores for _, scores in rows], worker="w")
        weights = rng.bytes(WEIGHTS_BYTES)
        version = PolicyVersion(step + 1)
        log.publish_policy(PolicyWeights(version, weights), worker="w")
        ages = {0: num_tokens}
        log.publish_step(TrainStep(step, 0, config.plan.step(step), version, num_tokens, {}, ages, time.time()))
        if (step + 1) % config.learner.checkpoint_every == 0:
            objects = {"model.safetensors": weights, "learner.pt": rng.bytes(2 * WEIGHTS_BYTES)}
            log.publish_checkpoint(step + 1, 0, objects, worker="w")
    return log


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def read_all(log: StoredRunLog) -> None:
    fresh = StoredRunLog(log.store, log.run_id)
    for shard in fresh.trajectory_shards():
        fresh.read_trajectories(shard)
        fresh.read_scores("oracle", shard)


def read_random_ms(log: StoredRunLog) -> float:
    """Median time to read one shard of trajectories with nothing remembered."""
    shards = log.trajectory_shards()
    rng = random.Random(0)

    def read(shard: IndexRange) -> float:
        return timed(lambda: StoredRunLog(log.store, log.run_id).read_trajectories(shard))

    return 1000 * statistics.median(read(rng.choice(shards)) for _ in range(50))


def parquet_bytes(log: StoredRunLog) -> tuple[int, int]:
    entries = [e for e in log.store.entries(log.layout.root) if e.key.endswith(".parquet")]
    return len(entries), sum(e.size_bytes for e in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the runs are made, in maintain-benchmark/")
    root = str(parser.parse_args().directory / "maintain-benchmark")
    for shard_size in (8, 64):
        log = make_run(root, f"s{shard_size}-{time.time_ns()}", num_steps=100, batch_size=64, shard_size=shard_size)
        store, run_id = log.store, log.run_id
        report = audit_run(store, run_id, recheck_s=0)
        assert report.is_clean, report.findings
        print(f"100 steps of 64 indices in shards of {shard_size}")
        print(f"  audit {report.seconds:.2f} s: {report.num_objects} objects, {report.num_bytes / 1e6:.1f} MB")
        num_objects, size = parquet_bytes(log)
        print(f"  {num_objects} Parquet objects of {size / 1e6:.1f} MB")
        print(f"  all shards read in {timed(lambda log=log: read_all(log)):.2f} s, one in {read_random_ms(log):.2f} ms")
        later = time.time() + 1
        seconds = timed(lambda s=store, r=run_id, now=later: collect_run(s, r, grace_s=0, now=now))
        print(f"  collect {seconds:.2f} s")


if __name__ == "__main__":
    main()
