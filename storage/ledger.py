"""From a stored run to its Ledger: every folder listed once, every manifest and step read once.

    claims/rollout --> Claimed      trajectories/ --> Produced      scores/<teacher>/ --> Scored
    arrivals/ --> Judged            steps/ and rewinds/ --> Trained and Rewound, by rewind

Folders are listed from the end of the pipeline to its start: whatever a live run adds meanwhile is further up, so that
it never looks as if something was trained before it was scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from asyncopd.ledger import Claimed, Event, Judged, Ledger, Produced, Rewound, Scored, Trained
from asyncopd.types import IndexRange, Manifest, PolicyVersion, TrainStep
from storage.layout import parse_shard, parse_version
from storage.records import Rewind, from_json, step_from_json
from storage.run_log import StoredRunLog
from storage.snapshot import Snapshot

_READERS = 8
_T = TypeVar("_T")
_R = TypeVar("_R")


def ledger_of(log: StoredRunLog, teacher: str | None = None) -> Ledger:
    """The state of every index of a run, finished or not.

    Args:
        teacher: whose scores count; that of the run's configuration, or else any, when None.
    Raises:
        ShardCorruptError: a manifest or step is not readable.
    """
    return Ledger.fold(events_of(log, teacher))


def events_of(log: StoredRunLog, teacher: str | None = None) -> list[Event]:
    """What the records of a run say, each index's events in the order in which they happened."""
    steps = [v for key in log.store.folder(log.layout.steps).keys if (v := parse_version(key)) is not None]
    rewinds = log.rewinds()
    arrivals = log.arrivals()
    score_shards = {name: log.score_shards(name) for name in _teachers(log, teacher)}
    trajectory_shards = log.trajectory_shards()
    claims = [log.layout.parse_claim(key) for key in log.store.list(log.layout.claims)]

    events: list[Event] = [Claimed(shard) for shard in sorted({c[1] for c in claims if c[0] == "rollout"})]
    events += (Produced(shard, _dropped(m)) for shard, m in _read_all(trajectory_shards, log.find_trajectories))
    for name, shards in score_shards.items():

        def find_scores(shard: IndexRange, name: str = name) -> Manifest | None:
            return log.find_scores(name, shard)

        events += (Scored(shard, _dropped(m)) for shard, m in _read_all(shards, find_scores))
    events += (Judged(arrival.dropped, arrival.held) for arrival in arrivals)
    return events + list(_steps_and_rewinds(log, steps, rewinds))


def events_of_snapshot(snapshot: Snapshot, teacher: str | None) -> list[Event]:
    """The same from records that were read before; `teacher` None takes every teacher's scores."""
    records, layout = snapshot.records, snapshot.layout
    claimed = {claim[1] for key in records["claim"] if (claim := layout.parse_claim(key))[0] == "rollout"}
    events: list[Event] = [Claimed(shard) for shard in sorted(claimed)]
    for key, manifest in records["trajectories"].items():
        if (shard := parse_shard(key)) is not None:
            events.append(Produced(shard, _dropped(manifest)))
    for key, manifest in records["scores"].items():
        if (shard := parse_shard(key)) is not None and teacher in (None, layout.parse_teacher(key)):
            events.append(Scored(shard, _dropped(manifest)))
    events += (Judged(arrival.dropped, arrival.held) for _, arrival in sorted(records["arrival"].items()))
    return events + list(_in_lineage(list(records["step"].values()), snapshot.rewinds))


def _teachers(log: StoredRunLog, teacher: str | None) -> Sequence[str]:
    configured = log.record.get("config", {}).get("teacher", {}).get("name")
    chosen = teacher or configured
    return [chosen] if chosen else log.teachers()[:1]


def _dropped(manifest: Manifest | None) -> dict[int, str]:
    return dict(manifest.facts.get("dropped", {})) if manifest else {}


def _read_all(items: Iterable[_T], read: Callable[[_T], _R]) -> list[tuple[_T, _R]]:
    """Each item with what `read` gives for it, in order; storage is asked in parallel."""
    listed = list(items)
    with ThreadPoolExecutor(_READERS) as readers:
        return list(zip(listed, readers.map(read, listed), strict=True))


def _steps_and_rewinds(
    log: StoredRunLog, versions: Sequence[PolicyVersion], rewinds: Sequence[Rewind]
) -> Iterator[Trained | Rewound]:
    """By rewind: what was trained under it, then the rewind that followed. A superseded learner's late steps too."""

    def read(version: PolicyVersion) -> TrainStep:
        key = log.layout.step(version.number, version.rewind)
        return from_json(log.store.get(key), key, step_from_json)

    yield from _in_lineage([step for _, step in _read_all(versions, read)], rewinds)


def _in_lineage(steps: Sequence[TrainStep], rewinds: Sequence[Rewind]) -> Iterator[Trained | Rewound]:
    ordered = sorted(steps, key=lambda step: (step.step, step.rewind))
    for rewind in range(len(rewinds) + 1):
        if rewind:
            yield Rewound(rewinds[rewind - 1].to_step)
        for step in ordered:
            if step.rewind == rewind:
                yield Trained(step.step, step.trained, step.dropped, step.held)
