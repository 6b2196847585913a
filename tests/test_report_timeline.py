"""Sets of time, the zoomed window and the trace file."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from synthetic_run import START, train_step

from asyncopd.report.measure import difference, length_s, packed, union
from asyncopd.report.plots import running_mean, staleness_shares
from asyncopd.report.timeline import MAX_WORKERS, lanes_of, middle_window
from asyncopd.report.write import to_trace
from asyncopd.types import IndexRange, Span
from flows.report import evenly


def span(role: str, activity: str, start: float, end: float, *, worker: str = "", detail: str = "") -> Span:
    return Span(role, worker or f"{role}-host-1-aaaa", activity, START + start, START + end, detail)


# -- sets of time -------------------------------------------------------------------------------------------------
def test_union_merges_what_overlaps_or_touches() -> None:
    assert union([(3, 4), (0, 1), (1, 2), (0.5, 1.5), (7, 7)]) == [(0, 2), (3, 4)]


def test_difference_leaves_what_is_outside_the_holes() -> None:
    assert difference([(0, 10), (20, 30)], [(-1, 1), (2, 3), (9, 21), (30, 40)]) == [(1, 2), (3, 9), (21, 30)]
    assert difference([(0, 1)], [(0, 1)]) == []


def test_union_and_difference_agree_with_counting_seconds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        kept, removed = ([tuple(sorted(map(int, rng.integers(0, 40, 2)))) for _ in range(6)] for _ in range(2))
        seconds_kept = {s for start, end in kept for s in range(start, end)}
        seconds_removed = {s for start, end in removed for s in range(start, end)}
        assert length_s(union(kept)) == len(seconds_kept)
        assert length_s(difference(kept, removed)) == len(seconds_kept - seconds_removed)


def test_packed_tracks_never_overlap() -> None:
    spans = [span("rollout", "sample", s, e) for s, e in ((0, 4), (1, 2), (2, 3), (4, 5), (3, 6))]
    tracks = packed(spans)
    assert [len(track) for track in tracks] == [2, 3]
    assert all(b.start >= a.end for track in tracks for a, b in itertools.pairwise(track))


# -- trace --------------------------------------------------------------------------------------------------------
@pytest.fixture
def trace() -> dict[str, Any]:
    spans = [
        span("rollout", "sample", 0, 4),
        span("rollout", "sample", 0, 4, worker="rollout-host-2-bbbb"),
        span("rollout", "orchestrate:parquet", 1, 3, detail="000000-000003"),
        span("rollout", "orchestrate:parquet", 2, 4, detail="000004-000007"),
        span("learn", "wait:scores", 0, 1.5, detail="scores of 000000-000003"),
        span("learn", "train", 1.5, 3, detail="step 0"),
    ]
    loaded: dict[str, Any] = json.loads(to_trace(spans, "walk-1", START))
    return loaded


def test_a_trace_has_a_named_process_per_role_and_a_thread_per_worker(trace: dict[str, Any]) -> None:
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if "name" in e["args"]}
    processes = {pid: name for (kind, pid, _), name in names.items() if kind == "process_name"}
    threads = {tid: name for (kind, _, tid), name in names.items() if kind == "thread_name"}
    assert sorted(processes.values()) == ["learn", "rollout"]
    assert {"rollout-host-1-aaaa", "rollout-host-2-bbbb", "learn-host-1-aaaa"} <= set(threads.values())
    for event in trace["traceEvents"]:
        assert event["pid"] in processes
        if event["ph"] == "X":
            assert threads[event["tid"]].startswith(processes[event["pid"]])


def test_trace_events_are_complete_and_in_microseconds(trace: dict[str, Any]) -> None:
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == 6
    assert {event["ph"] for event in trace["traceEvents"]} == {"X", "M"}
    (train,) = [event for event in complete if event["name"] == "train"]
    assert (train["ts"], train["dur"]) == (1_500_000, 1_500_000)
    assert train["args"] == {"detail": "step 0"}


def test_events_of_one_thread_of_a_trace_do_not_overlap(trace: dict[str, Any]) -> None:
    # Perfetto draws events that overlap without nesting in the wrong place.
    by_thread = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            by_thread[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for events in by_thread.values():
        assert all(b[0] >= a[1] for a, b in itertools.pairwise(sorted(events)))


# -- plots --------------------------------------------------------------------------------------------------------
def test_lanes_are_in_pipeline_order_and_numbered_only_when_there_are_several() -> None:
    spans = [
        span("learn", "train", 0, 1),
        span("rollout", "sample", 0, 1, worker="rollout-host-1-aaaa"),
        span("rollout", "sample", 0, 1, worker="rollout-host-2-bbbb"),
    ]
    assert [lane.label for lane in lanes_of(spans)] == ["rollout 0", "rollout 1", "learn"]


def test_a_role_with_many_workers_leaves_room_for_the_others() -> None:
    spans = [span("rollout", "sample", n, n + 1, worker=f"rollout-host-{n}-aaaa") for n in range(40)]
    lanes = lanes_of([*spans, span("learn", "train", 0, 1)])
    assert [lane.role for lane in lanes] == ["rollout"] * MAX_WORKERS + ["learn"]


def test_the_zoomed_window_holds_about_four_steps_of_the_middle() -> None:
    spans = [span("learn", "train", s, s + 1) for s in range(100)]
    steps = [train_step(s, finished=START + s + 1) for s in range(100)]
    left, right = middle_window(spans, steps)
    assert right - left == pytest.approx(4)
    assert (left + right) / 2 - START == pytest.approx(51)


def test_the_zoomed_window_of_a_short_run_is_the_run() -> None:
    assert middle_window([span("learn", "train", 0, 1)], []) == (START, START + 1)


def test_pieces_closer_than_a_pixel_are_joined() -> None:
    assert union([(0, 1), (1.1, 2), (4, 5)], gap_s=0.2) == [(0, 2), (4, 5)]


def test_staleness_shares_of_a_step_add_up_to_one() -> None:
    shares_SA = staleness_shares([train_step(0, staleness_tokens={0: 75, 2: 25})], num_values=3)
    assert shares_SA.tolist() == [[0.75, 0, 0.25]]


def test_a_running_mean_of_a_constant_is_the_constant_also_at_the_ends() -> None:
    assert running_mean(np.full(7, 3.0), window=2).tolist() == [3.0] * 7


def test_shards_are_chosen_evenly_with_the_first_and_the_last() -> None:
    shards = [IndexRange(n, n + 1) for n in range(101)]
    assert [shard.start for shard in evenly(shards, 5)] == [0, 25, 50, 75, 100]
    assert evenly(shards[:3], 5) == shards[:3]
