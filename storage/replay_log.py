"""The log of a replay: trajectories and scores are another run's, everything else is its own.

    source run    trajectories/  scores/  candidates/ --read--> learner --publish--> policies/ steps/ ...   replay
                  (never written)                                                    (run.json: parent)

The source is the parent, or, where that is a replay itself, the run that it reads. Nothing is copied. Which folders of
scores are read, and how they are mixed, stands in the replay's run.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from asyncopd.arrivals import Arrival
from asyncopd.config import RunConfig
from asyncopd.config.replay import Replay
from asyncopd.errors import ConfigError, StorageError
from asyncopd.mixture import mix
from asyncopd.types import IndexRange, Manifest, TeacherScores, Trajectory
from storage.candidates import with_candidates
from storage.objects import ObjectStore
from storage.run_log import StoredRunLog


class ScoresView:
    """Trajectories with the scores of one or several teachers, read from one run's log.

    All the folders named must have scored the same candidates: the trajectories' own, or one back-filled set.
    """

    def __init__(self, log: StoredRunLog, weights: Mapping[str, float], *, needs_top_k: bool) -> None:
        """
        Args:
            weights: folder of scores -> weight; they add up to 1.
            needs_top_k: the loss reads the teacher's top-k, which not every mixture has (asyncopd/mixture.py).
        """
        self.log, self.weights, self._needs_top_k = log, dict(weights), needs_top_k
        self.name = next(iter(weights)) if len(weights) == 1 else " + ".join(f"{w:g} {n}" for n, w in weights.items())

    def find(self, shard: IndexRange) -> Manifest | None:
        """A manifest of the shard's scores once every teacher has scored it."""
        found = [self.log.find_scores(name, shard) for name in self.weights]
        return None if None in found else found[0]

    def read_trajectories(self, shard: IndexRange) -> list[Trajectory]:
        """The shard's trajectories with the candidates that were scored."""
        trajectories = self.log.read_trajectories(shard)
        candidates = self._candidates(shard)
        return with_candidates(self.log, candidates, shard, trajectories) if candidates else trajectories

    def read_scores(self, shard: IndexRange) -> list[TeacherScores]:
        """The shard's scores, mixed where there are several teachers."""
        parts = [(weight, self.log.read_scores(name, shard)) for name, weight in self.weights.items()]
        if len(parts) == 1:
            return parts[0][1]
        return [
            mix([(weight, scores[row]) for weight, scores in parts], name=self.name, needs_top_k=self._needs_top_k)
            for row in range(len(parts[0][1]))
        ]

    def _candidates(self, shard: IndexRange) -> str | None:
        """Name of the back-filled candidates that the scores speak of; None for the trajectories' own."""
        names = {}
        for folder in self.weights:
            manifest = self.log.find_scores(folder, shard)
            if manifest is None:
                raise self.log.store.missing(self.log.layout.shard_manifest(self.log.layout.scores(folder), shard))
            names[folder] = manifest.facts.get("candidates")
        if len(set(names.values())) > 1:
            raise ConfigError(
                f"run {self.log.run_id}: the teachers of a mixture have scored different candidates: "
                f"{ {folder: name or 'recorded' for folder, name in names.items()} }. Back-fill all of them with the "
                "same --candidates."
            )
        return next(iter(names.values()))


class ReplayLog(StoredRunLog):
    """`asyncopd.ports.RunLog` of a replay. Its shards are read through the source's log and cannot be written."""

    def __init__(self, store: ObjectStore, run_id: str, source: StoredRunLog, **options: Any) -> None:
        """Use `open_run` rather than this constructor."""
        super().__init__(store, run_id, **options)
        self.source = source

    @cached_property
    def replay(self) -> Replay:
        """What is replayed, as run.json says."""
        return Replay.from_record(self.record["parent"])

    def find_trajectories(self, shard: IndexRange) -> Manifest | None:
        return self.source.find_trajectories(shard)

    def read_trajectories(self, shard: IndexRange) -> list[Trajectory]:
        """The source's trajectories, with the candidates that the replay trains on."""
        return self.view.read_trajectories(shard)

    def arrivals(self) -> list[Arrival]:
        """The source's: a replay trains what its source trained, in that order."""
        return self.source.arrivals()

    def record_arrival(self, arrival: Arrival) -> NoReturn:
        raise StorageError(
            f"run {self.run_id} is a replay and trains what {self.source.run_id} took as it arrived; that run has come "
            f"to {arrival.number} shards only. Train {self.source.run_id} further, or replay fewer steps."
        )

    def trajectory_shards(self) -> list[IndexRange]:
        return self.source.trajectory_shards()

    def find_scores(self, teacher: str, shard: IndexRange) -> Manifest | None:
        return self.view.find(shard) if teacher == self.view.name else self.source.find_scores(teacher, shard)

    def read_scores(self, teacher: str, shard: IndexRange) -> list[TeacherScores]:
        """Of one of the source's folders, or, under the view's name, what the replay trains on."""
        return self.view.read_scores(shard) if teacher == self.view.name else self.source.read_scores(teacher, shard)

    def score_shards(self, teacher: str) -> list[IndexRange]:
        return self.source.score_shards(teacher)

    def teachers(self) -> list[str]:
        return self.source.teachers()

    @cached_property
    def view(self) -> ScoresView:
        """What the replay trains on."""
        required = RunConfig.model_validate(self.record["config"]).loss.requirements()
        needs_top_k = required.top_k > 0 or required.full_vocabulary
        return ScoresView(self.source, self.replay.scores, needs_top_k=needs_top_k)

    def publish_trajectories(
        self, shard: IndexRange, trajectories: Sequence[Trajectory], *, worker: str, facts: Mapping[str, Any]
    ) -> NoReturn:
        raise self._read_only(shard)

    def publish_scores(
        self, teacher: str, shard: IndexRange, scores: Sequence[TeacherScores], *, worker: str, facts: Mapping[str, Any]
    ) -> NoReturn:
        raise self._read_only(shard)

    def _read_only(self, shard: IndexRange) -> StorageError:
        return StorageError(
            f"run {self.run_id} is a replay and reads the shards of {self.source.run_id}; shard {shard.name} cannot be "
            f"written to it. Write to {self.source.run_id}."
        )
