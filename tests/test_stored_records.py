"""Records that runs have stored stay readable: `stored_records.json` was written by the code of commit 53dc3fb."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from asyncopd.records import Claim, Failure, Heartbeat, Manifest, Removal, Rewind, RunChange, RunState, WorkerStatus
from asyncopd.schedule import Arrival
from asyncopd.types import Evaluation, IndexRange, IndexSet, PolicyVersion, Span, TrainStep
from storage.records import from_json, to_json

STORED: dict[str, str] = json.loads((Path(__file__).parent / "stored_records.json").read_text(encoding="utf-8"))
RUN = "runs/walk/"
VALUES: dict[str, Any] = {
    "steps/000003.r1.json": TrainStep(
        step=3,
        rewind=1,
        indices=IndexRange(12, 16),
        version=PolicyVersion(4, 1),
        num_tokens=57,
        metrics={"train/kl_nats": 0.25, "train/drift_nats": math.nan, "train/ess": math.inf},
        staleness_tokens={0: 50, 1: 7},
        finished=1764230000.5,
        dropped={13: "too long"},
    ),
    "steps/000004.r0.json": TrainStep(
        step=4,
        rewind=0,
        indices=IndexSet((21, 16, 17, 18)),
        version=PolicyVersion(5),
        num_tokens=40,
        metrics={},
        staleness_tokens={2: 40},
        finished=1764230001.0,
        held={18: "stale"},
    ),
    "arrivals/000002.json": Arrival(2, IndexRange(8, 12), 7, {9: "stale"}, {10: "stale"}),
    "evals/000050.r0.json": Evaluation(
        PolicyVersion(50), 64, math.nan, {"z0": 0.5}, 0.125, math.nan, 11.5, 1764230002.0
    ),
    "spans/w%2E1.000007.json": [
        Span("rollout", "w.1", "sample", 1.5, 2.5, "000000-000007"),
        Span("rollout", "w.1", "wait:version", 2.5, 3.0),
    ],
    "rewinds/0002.json": Rewind(2, 8, "learn-1", 1764230003.0),
    "removals/001764230004000.0a1b2c3d.json": Removal("orphan", {RUN + "x.parquet": 12}, 1764230004.0),
    "claims/rollout/000008-000015.2.json": Claim("rollout", IndexRange(8, 16), 2, "rollout-1", 1764230005.0),
    "heartbeats/learn-1.json": Heartbeat(
        "learn-1",
        1764230006.0,
        False,
        WorkerStatus(role="learn", pid=71, host="gpu", step=3, num_steps=9, num_tokens=0, busy=0.5),
        9,
    ),
    "failures/001764230007000.score.score-1.0a1b2c3d.json": Failure("score", "score-1", "EngineError: ü", 1764230007.0),
    "states/0003.json": RunState(3, "stopped", "asked", "flow", 1764230008.0),
    "changes/0001.json": RunChange({"learner.num_steps": (8, 16)}, 1764230009.0),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_stored_record_reads_as_the_value_that_was_written(name: str) -> None:
    expected = VALUES[name]
    kind = list[Span] if isinstance(expected, list) else type(expected)
    read = from_json(STORED[RUN + name].encode(), RUN + name, kind)
    assert repr(read) == repr(expected), "by their text, in which NaN equals NaN"
    assert type(read) is type(expected)


@pytest.mark.parametrize("name", [name for name in VALUES if not name.startswith("heartbeats/")])
def test_the_same_value_is_stored_in_the_same_bytes(name: str) -> None:
    assert to_json(VALUES[name]).decode() == STORED[RUN + name]


@pytest.mark.parametrize("name", ["trajectories/000008-000011.json", "policies/000003.r0.json"])
def test_a_stored_manifest_is_read_and_stored_again_without_change(name: str) -> None:
    manifest = from_json(STORED[RUN + name].encode(), RUN + name, Manifest)
    before, after = json.loads(STORED[RUN + name]), json.loads(to_json(manifest))
    assert {**after, "sha256": ""} == {**before, "sha256": ""}, "facts may stand in another order"
