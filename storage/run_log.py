"""One Run in storage: the `RunLog` every stage talks to. This file owns shards; the other nouns have their own files.

rollout --publish_trajectories--> trajectories/ --read--> teacher --publish_scores--> scores/ --read--> learner
   ^                                                                                                      |
   +---- latest_policy, read_policy ---- policies/ <----------------- publish_policy, publish_step -------+
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar
from urllib.parse import unquote

from asyncopd.errors import ShapeError, ShardCorruptError
from asyncopd.records import NO_FACTS, Facts, Manifest
from asyncopd.types import Candidates, IndexRange, TeacherScores, Trajectory
from storage.claims import ClaimLog
from storage.layout import new_nonce, parse_shard
from storage.manifests import find_manifest, publish, read_manifest, read_named, read_shard, what_to_do
from storage.parquet import (
    SCHEMA_VERSION,
    TopkPrecision,
    decode_candidates,
    decode_scores,
    decode_trajectories,
    encode_candidates,
    encode_scores,
    encode_trajectories,
)
from storage.policies import PolicyLog
from storage.stores.base import ObjectStore

Row = TypeVar("Row", Trajectory, TeacherScores)


class StoredRunLog(PolicyLog, ClaimLog):
    """`asyncopd.ports.RunLog` on an object store. Safe to share between threads."""

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        *,
        source: StoredRunLog | None = None,
        topk_precision: TopkPrecision = "float32",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Use `create_run` or `open_run` rather than this constructor.

        Args:
            source: the run whose shards are read; None for this one.
            clock: measures leases, in seconds.
        """
        PolicyLog.__init__(self, store, run_id)
        ClaimLog.__init__(self, clock)
        self._source = source
        self.shards = self.source.layout
        """Keys of the shards that are read."""
        self._topk_precision: TopkPrecision = topk_precision

    @property
    def source(self) -> StoredRunLog:
        """The log with the shards of this run: itself, or that of the run it replays."""
        return self._source or self

    # -- rollouts -------------------------------------------------------------------------------------------------
    def find_trajectories(self, shard: IndexRange) -> Manifest | None:
        """The manifest of a shard; None when it was not published yet."""
        return find_manifest(self.store, self.shards.shard_manifest(self.shards.trajectories, shard))

    def read_trajectories(self, shard: IndexRange) -> list[Trajectory]:
        """The trajectories of a shard in index order, without the dropped ones; their arrays are read-only.

        Raises:
            ObjectMissingError: the shard was not published, or its data is gone.
            ShardCorruptError: the data is not what the manifest promises.
        """
        return self._read_rows(self.shards.trajectories, shard, decode_trajectories)

    def publish_trajectories(
        self, shard: IndexRange, trajectories: Sequence[Trajectory], *, worker: str, facts: Facts = NO_FACTS
    ) -> bool:
        """Make a shard visible; `facts.dropped` maps each index without a trajectory to the reason.

        Returns:
            False when another worker's complete shard was there first; ours is then discarded.
        Raises:
            ShapeError: trajectories and dropped indices do not add up to the shard.
        """
        ordered = sorted(trajectories, key=lambda trajectory: trajectory.index)
        _check_cover(shard, [trajectory.index for trajectory in ordered], facts.dropped)
        # Over all runs of tokens: with updates in flight a response has several.
        versions = [run.version for trajectory in ordered for run in trajectory.version_runs]
        known = replace(
            facts,
            num_rows=len(ordered),
            num_tokens=sum(len(trajectory.response_ids) for trajectory in ordered),
            version_first=min(versions, default=None),
            version_last=max(versions, default=None),
        )
        body = encode_trajectories(ordered, self.run_id)
        return self._publish_rows("trajectories", self.layout.trajectories, shard, body, worker=worker, facts=known)

    def trajectory_shards(self) -> list[IndexRange]:
        """All published shards of trajectories, in index order."""
        return self._shards(self.shards.trajectories)

    def shard_of(self, index: int) -> IndexRange | None:
        """The published shard of trajectories with this index; a stage may have dropped the index all the same."""
        return next((shard for shard in self.trajectory_shards() if index in shard.indices), None)

    # -- scores ---------------------------------------------------------------------------------------------------
    def find_scores(self, teacher: str, shard: IndexRange) -> Manifest | None:
        """The manifest of a teacher's scores of a shard; None when they were not published yet."""
        return find_manifest(self.store, self.shards.shard_manifest(self.shards.scores(teacher), shard))

    def read_scores(self, teacher: str, shard: IndexRange) -> list[TeacherScores]:
        """The scores of a shard in index order, without the dropped ones; their arrays are read-only.

        Raises as `read_trajectories` does.
        """
        return self._read_rows(self.shards.scores(teacher), shard, decode_scores)

    def publish_scores(
        self, teacher: str, shard: IndexRange, scores: Sequence[TeacherScores], *, worker: str, facts: Facts = NO_FACTS
    ) -> bool:
        """Make a teacher's scores of a shard visible. Indices dropped at rollout are dropped here without being named.

        Returns and raises as `publish_trajectories` does.
        """
        ordered = sorted(scores, key=lambda row: row.index)
        dropped = dict(facts.dropped)
        if len(ordered) + len(dropped) < len(shard):
            rollout = self.find_trajectories(shard)
            dropped = {**(rollout.facts.dropped if rollout else {}), **dropped}
        _check_cover(shard, [row.index for row in ordered], dropped)
        known = replace(
            facts,
            num_rows=len(ordered),
            num_tokens=sum(len(row.sampled_logprobs_T) for row in ordered),
            teacher=teacher,
            teacher_digests=tuple(sorted({row.teacher_digest for row in ordered})),
            dropped=dropped,
        )
        body = encode_scores(ordered, self.run_id, self._topk_precision)
        return self._publish_rows("scores", self.layout.scores(teacher), shard, body, worker=worker, facts=known)

    def score_shards(self, teacher: str) -> list[IndexRange]:
        """All published shards of a teacher's scores, in index order."""
        return self._shards(self.shards.scores(teacher))

    def teachers(self) -> list[str]:
        """The teachers that have scored something."""
        return [unquote(name) for name in self.store.folder(self.shards.folder("scores")).folders]

    # -- candidates -----------------------------------------------------------------------------------------------
    def find_candidates(self, name: str, shard: IndexRange) -> Manifest | None:
        """The manifest of a shard of back-filled candidates; `name` says what they are: `head8-draws8-tail`."""
        return find_manifest(self.store, self.shards.shard_manifest(self.shards.candidates(name), shard))

    def publish_candidates(
        self, name: str, shard: IndexRange, candidates: Mapping[int, Candidates], *, worker: str
    ) -> bool:
        """Make candidates of every trajectory of a shard visible, by index. False when somebody was first.

        Trajectory shards are never changed. Whoever wants these candidates joins them with `with_candidates`.
        """
        body, facts = encode_candidates(candidates, self.run_id), Facts(num_rows=len(candidates))
        folder = self.layout.candidates(name)
        return self._publish_rows("candidates", folder, shard, body, worker=worker, facts=facts)

    def read_candidates(self, name: str, shard: IndexRange) -> dict[int, Candidates]:
        """The candidates of a shard by index. Raises as `read_trajectories` does."""
        key = self.shards.shard_manifest(self.shards.candidates(name), shard)
        data_key, body = read_shard(self.store, key, read_manifest(self.store, key))
        return decode_candidates(body, data_key)

    def with_candidates(self, name: str, shard: IndexRange, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The shard's trajectories with back-filled candidates in place of their own.

        Raises as `read_candidates` does, and ShardCorruptError when they belong to other trajectories.
        """
        candidates, indices = self.read_candidates(name, shard), [trajectory.index for trajectory in trajectories]
        if sorted(candidates) != indices:
            key = self.shards.shard_manifest(self.shards.candidates(name), shard)
            raise ShardCorruptError(
                f"{key}: candidates of indices {sorted(candidates)}, the trajectories are {indices}. "
                f"{what_to_do(key, 'candidates')}"
            )
        return [replace(trajectory, candidates=candidates[trajectory.index]) for trajectory in trajectories]

    # -- architecture ---------------------------------------------------------------------------------------------
    def publish_architecture(self, objects: Mapping[str, bytes], *, worker: str = "") -> bool:
        """Store what engines need besides weights (config, tokenizer files), by name. False when it was there."""
        nonce = new_nonce()
        named = {self.layout.key("architecture.data", nonce=nonce, object=name): body for name, body in objects.items()}
        return publish(self.store, self.layout.key("architecture"), named, kind="architecture", worker=worker)

    def find_architecture(self) -> Manifest | None:
        """What was stored of the student's architecture; None before the learner, also a resumed one, has stored it."""
        return find_manifest(self.store, self.layout.key("architecture"))

    def read_architecture(self) -> Mapping[str, bytes]:
        """What `publish_architecture` stored, by name. Raises as `read_trajectories` does."""
        return read_named(self.store, self.layout.key("architecture"))

    # -- shards of any kind ---------------------------------------------------------------------------------------
    def _publish_rows(
        self, kind: str, folder: str, shard: IndexRange, body: bytes, *, worker: str, facts: Facts
    ) -> bool:
        """Make an encoded shard visible in `folder` of the layout. False when another worker's was there first."""
        addressed = replace(facts, index_range=(shard.start, shard.stop), parquet_schema_version=SCHEMA_VERSION)
        key, objects = self.layout.shard_manifest(folder, shard), {self.layout.shard_object(folder, shard): body}
        return publish(self.store, key, objects, kind=kind, worker=worker, facts=addressed)

    def _read_rows(self, folder: str, shard: IndexRange, decode: Callable[[bytes, str], list[Row]]) -> list[Row]:
        key = self.layout.shard_manifest(folder, shard)
        manifest = read_manifest(self.store, key)
        data_key, body = read_shard(self.store, key, manifest)
        rows = decode(body, data_key)
        check_rows(key, manifest, shard, [row.index for row in rows])
        return rows

    def _shards(self, folder: str) -> list[IndexRange]:
        keys = self.store.folder(folder).keys
        return sorted(shard for key in keys if (shard := parse_shard(key)) is not None)


def _check_cover(shard: IndexRange, rows: Sequence[int], dropped: Iterable[int]) -> None:
    """Raise ShapeError unless every index of `shard` has exactly one row or one reason for having none."""
    if sorted([*rows, *dropped]) != list(shard.indices):
        raise ShapeError(
            f"shard {shard.name}: rows for {list(rows)} and dropped indices {sorted(dropped)} do not add up to "
            f"[{shard.start}, {shard.stop}). Give each index a row, or a reason in facts.dropped."
        )


def check_rows(key: str, manifest: Manifest, shard: IndexRange, rows: Sequence[int]) -> None:
    """Raise ShardCorruptError unless the rows found are those the manifest promises."""
    expected_rows, expected_range = manifest.facts.num_rows, list(manifest.facts.index_range or ())
    dropped = manifest.facts.dropped
    if (
        expected_range != [shard.start, shard.stop]
        or len(rows) != expected_rows
        or sorted([*rows, *dropped]) != list(shard.indices)
    ):
        raise ShardCorruptError(
            f"{key}: found {len(rows)} rows for indices {list(rows)}, the manifest expects {expected_rows} rows of "
            f"{expected_range} without dropped {sorted(dropped)}. {what_to_do(key, manifest.kind)}"
        )
