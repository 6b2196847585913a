"""How soon one process sees what another has published, and how much a run stores per trained token.

    python benchmarks/visibility.py latency /tmp/runs              # or s3://runs/x, with the AWS_* variables set
    python benchmarks/visibility.py bytes /tmp/runs RUN

Latency is from the moment the publisher sends a policy's manifest until a second process, which polls
`latest_policy` as samplers do, has it. Both read one clock: CLOCK_MONOTONIC is the same in all processes of a machine.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import time
import uuid
from collections import defaultdict

import numpy as np

from asyncopd.types import PolicyVersion, PolicyWeights
from storage.run_log import StoredRunLog
from storage.runs import create_run, open_run
from storage.stores import open_store

POLICY_BYTES = 300_000
"""The quickstart's student."""


def measure_latency(root: str, *, rounds: int, poll_s: float) -> None:
    store = open_store(root)
    store.probe()
    log = create_run(store, f"visibility-{uuid.uuid4().hex[:8]}", {"config_hash": "none"})
    sent_s: list[float] = []
    put_if_absent = store.put_if_absent

    def timed(key: str, body: bytes, *, durable: bool = True) -> bool:
        sent_s.append(time.monotonic())
        return put_if_absent(key, body, durable=durable)

    store.put_if_absent = timed  # type: ignore[method-assign]
    command = [sys.executable, __file__, "watch", root, log.run_id, "--rounds", str(rounds), "--poll-s", str(poll_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        seen_s, publish_s = [], []
        for number in range(rounds):
            time.sleep(random.uniform(0.01, 0.06))  # not in step with the watcher's polls
            weights = PolicyWeights(PolicyVersion(number, 0), random.randbytes(POLICY_BYTES))
            started = time.monotonic()
            log.publish_policy(weights, worker="visibility")
            publish_s.append(time.monotonic() - started)
            seen_s.append(float(watcher.stdout.readline()))
    print(f"{root}: {rounds} versions of {POLICY_BYTES} bytes, polled every {poll_s * 1e3:g} ms")
    latency_s = np.array(seen_s) - np.array(sent_s)
    for name, times_s in (("manifest sent -> seen elsewhere", latency_s), ("publish_policy", np.array(publish_s))):
        p50, p99 = np.quantile(times_s, [0.5, 0.99]) * 1e3
        print(f"  {name:32s} p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   max {times_s.max() * 1e3:7.1f} ms")


def watch(root: str, run_id: str, *, rounds: int, poll_s: float) -> None:
    """Print the time at which each version was first seen."""
    log = open_run(open_store(root), run_id)
    log.latest_policy()
    print("ready", flush=True)
    for number in range(rounds):
        while (latest := log.latest_policy()) is None or latest.number < number:
            time.sleep(poll_s)
        print(time.monotonic(), flush=True)


def measure_bytes(root: str, run_id: str) -> None:
    store = open_store(root)
    log = StoredRunLog(store, run_id)
    num_tokens = sum(step.num_tokens for step in log.steps())
    folders: dict[str, list[int]] = defaultdict(list)
    for entry in store.entries(log.layout.root):
        folders[entry.key.split("/")[2]].append(entry.size_bytes)
    print(f"{root} {run_id}: {num_tokens} trained tokens")
    folders["all"] = list(itertools.chain(*folders.values()))
    for folder, sizes in sorted(folders.items(), key=lambda item: -sum(item[1])):
        print(f"  {folder:14s} {len(sizes):5d} objects {sum(sizes):12d} bytes {sum(sizes) / num_tokens:9.2f} B/token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "watch", "bytes"))
    parser.add_argument("root")
    parser.add_argument("run_id", nargs="?", default="")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--poll-s", type=float, default=0.01, help="pause between polls (default: limits.poll_s)")
    arguments = parser.parse_args()
    if arguments.what == "latency":
        measure_latency(arguments.root, rounds=arguments.rounds, poll_s=arguments.poll_s)
    elif arguments.what == "watch":
        watch(arguments.root, arguments.run_id, rounds=arguments.rounds, poll_s=arguments.poll_s)
    else:
        measure_bytes(arguments.root, arguments.run_id)


if __name__ == "__main__":
    main()
