"""The rows of the record relations for one run, as of when: what its RunView has read, in columns.

RunView --Cut (a time, or a policy version)--> what was published by then --> rows, by relation
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from asyncopd.errors import StorageError
from asyncopd.records import Manifest, Rewind
from asyncopd.types import Evaluation, IndexRange, PolicyVersion, TrainStep
from storage.catalog.connection import DataFile
from storage.catalog.decoders import TokenTexts, token_texts_of
from storage.layout import parse_version
from storage.learner_log import surviving
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.schema import SCHEMA_VERSION

Row = dict[str, Any]
Shard = tuple[str, IndexRange, Manifest]
"""(teacher, shard, manifest); the teacher is empty for trajectories."""


@dataclass(frozen=True)
class AsOf:
    """A moment of a run's life; give one of the two."""

    version: int | None = None
    """The moment this policy version was published, in every run that has it."""
    time: float | None = None
    """Unix time, seconds."""

    def __post_init__(self) -> None:
        if (self.version is None) == (self.time is None):
            raise StorageError(
                f"as of version {self.version} and time {self.time}: give exactly one of the two, a version number or "
                "a time."
            )


@dataclass(frozen=True)
class Cut:
    """The same moment for one run. Versions, steps and evaluations are cut by number where a version was asked for:
    a step is recorded just after the version it made, and belongs to it."""

    time: float = math.inf
    """What was written later is not seen."""
    version: PolicyVersion | None = None
    """Higher versions, and versions of later rewinds, are not seen."""

    def has_version(self, version: PolicyVersion, written: float) -> bool:
        """Is something about `version`, written at `written`, part of the picture?"""
        if self.version is None:
            return written <= self.time
        return version.number <= self.version.number and version.rewind <= self.version.rewind


class RunRecords:
    """One run's part of every record relation."""

    def __init__(self, log: StoredRunLog) -> None:
        self.run_id = log.run_id
        self._view = RunView(log)

    def cut(self, as_of: AsOf | None) -> Cut | None:
        """The moment `as_of` of this run; None when the run did not exist then, or never made that version."""
        if as_of is None:
            return Cut()
        if as_of.time is not None:
            return Cut(time=as_of.time) if (self._view.record.get("created") or 0.0) <= as_of.time else None
        version = self._view.read("rewind").find_policy(as_of.version or 0)
        if version is None:
            return None
        manifest = self._view.records["policy"][self._view.layout.key("policy", state=version)]
        return Cut(time=manifest.created, version=version)

    def read(self, relations: Collection[str], cut: Cut) -> dict[str, Sequence[Any]]:
        """Relation -> rows of the records in `relations`, and DataFiles of `trajectory_rows` and `score_rows`."""
        shards = self._shards(cut) if {"shards", "dropped", "trajectory_rows", "score_rows"} & {*relations} else []
        steps = self._steps(cut) if {"steps", "superseded_steps", "dropped"} & {*relations} else ([], [])
        makers: dict[str, Callable[[], Iterable[Any]]] = {
            "runs": lambda: [self._run()],
            "policies": lambda: self._policies(cut),
            "steps": lambda: map(step_row, steps[0]),
            "superseded_steps": lambda: map(step_row, steps[1]),
            "evals": lambda: self._evaluations(cut),
            "claims": lambda: self._claims(cut),
            "shards": lambda: [shard_row(*shard) for shard in shards],
            "dropped": lambda: [*dropped_of_shards(shards), *dropped_of_steps(steps[0])],
            "rewinds": lambda: [
                {"rewind": r.number, "to_step": r.to_step, "worker": r.worker, "recorded": time_of(r.recorded)}
                for r in self._rewinds(cut)
            ],
            "spans": lambda: self._spans(cut),
            "failures": lambda: [
                {"role": f.role, "worker": f.worker, "reason": f.reason, "failed": time_of(f.failed)}
                for f in self._view.read("failure").failures()
                if f.failed <= cut.time
            ],
        }
        rows: dict[str, Sequence[Any]] = {
            name: [{"run": self.run_id, **row} for row in make()] for name, make in makers.items() if name in relations
        }
        rows["trajectory_rows"] = self._files([shard for shard in shards if not shard[0]])
        rows["score_rows"] = self._files([shard for shard in shards if shard[0]])
        return rows

    @cached_property
    def token_texts(self) -> TokenTexts:
        """How the run's token ids read."""
        return token_texts_of(self._view.record)

    # -- one relation each ----------------------------------------------------------------------------------------
    def _run(self) -> Row:
        record = self._view.record
        config = record.get("config") or {}
        learner, rollout = config.get("learner") or {}, config.get("rollout") or {}
        return {
            "created": time_of(record.get("created")),
            "name": config.get("name"),
            "task": (config.get("task") or {}).get("kind"),
            "teacher": self._teacher(),
            "loss": (config.get("loss") or {}).get("name"),
            "seed": config.get("seed"),
            "batch_size": learner.get("batch_size"),
            "shard_size": rollout.get("shard_size"),
            "max_staleness": (config.get("staleness") or {}).get("max_staleness"),
            "num_steps": learner.get("num_steps"),
            "config_hash": record.get("config_hash"),
            "code_version": record.get("code_version"),
            "parent": (record.get("parent") or {}).get("run_id", ""),
            "config": json.dumps(config),
        }

    def _teacher(self) -> str | None:
        config = self._view.record.get("config") or {}
        named: str | None = (config.get("teacher") or {}).get("name")
        return named or next(iter(self._view.read("scores").teachers()), None)

    def _rewinds(self, cut: Cut) -> list[Rewind]:
        """Those the learner had made by then."""
        return [rewind for rewind in self._view.read("rewind").rewinds if rewind.recorded <= cut.time]

    def _surviving(self, versions: Iterable[PolicyVersion], cut: Cut) -> list[PolicyVersion]:
        return surviving(versions, self._rewinds(cut))

    def _policies(self, cut: Cut) -> list[Row]:
        found = self._view.read("policy").records["policy"].items()
        manifests = {version: manifest for key, manifest in list(found) if (version := parse_version(key)) is not None}
        seen = [version for version, manifest in manifests.items() if cut.has_version(version, manifest.created)]
        return [policy_row(version, manifests[version]) for version in self._surviving(seen, cut)]

    def _steps(self, cut: Cut) -> tuple[list[TrainStep], list[TrainStep]]:
        """(surviving, superseded), both in order."""
        found: list[TrainStep] = list(self._view.read("step").records["step"].values())
        steps = [step for step in found if cut.has_version(step.version, step.finished)]
        # Step s counts exactly when the state s + 1 that it made does.
        by_state = {PolicyVersion(step.step + 1, step.rewind): step for step in steps}
        kept = set(self._surviving(by_state, cut))
        ordered = sorted(by_state.items())
        return [step for s, step in ordered if s in kept], [step for s, step in ordered if s not in kept]

    def _evaluations(self, cut: Cut) -> list[Row]:
        found: list[Evaluation] = list(self._view.read("evaluation").records["evaluation"].values())
        by_version = {e.version: e for e in found if cut.has_version(e.version, e.finished)}
        return [evaluation_row(by_version[version]) for version in self._surviving(by_version, cut)]

    def _claims(self, cut: Cut) -> list[Row]:
        return [
            {
                "stage": claim.stage,
                **range_row(claim.shard),
                "attempt": claim.attempt,
                "worker": claim.worker,
                "claimed": time_of(claim.claimed or None),
            }
            for claim in self._view.read("claim").claims()
            if claim.claimed <= cut.time
        ]

    def _spans(self, cut: Cut) -> list[Row]:
        return [
            {
                "role": span.role,
                "worker": span.worker,
                "activity": span.activity,
                "started": time_of(span.start),
                "ended": time_of(span.end),
                "seconds": span.end - span.start,
                "detail": span.detail,
            }
            for span in self._view.read("spans").spans()
            if span.end <= cut.time
        ]

    def _shards(self, cut: Cut) -> list[Shard]:
        """Every complete shard. Raises StorageError where newer code wrote one."""
        view = self._view.read("trajectories", "scores")
        found = [("", shard, manifest) for shard, manifest in view.trajectories().items()]
        for teacher in view.teachers():
            found += [(teacher, shard, manifest) for shard, manifest in view.scores(teacher).items()]
        for _, shard, manifest in found:
            written_by = manifest.facts.parquet_schema_version or 0
            if written_by > SCHEMA_VERSION:
                raise StorageError(
                    f"run {self.run_id}: shard {shard.name} has Parquet schema version {written_by}, this code reads "
                    f"up to {SCHEMA_VERSION}. Use the code version that wrote it, or name other runs with --run."
                )
        return [shard for shard in found if shard[2].created <= cut.time]

    def _files(self, shards: Iterable[Shard]) -> list[DataFile]:
        own = self._teacher()
        return [
            DataFile(key, self.run_id, shard.name, _labels(folder, own, manifest))
            for folder, shard, manifest in shards
            for key in manifest.objects
        ]


def _labels(folder: str, own: str | None, manifest: Manifest) -> dict[str, str]:
    """What every row of a file of scores has in common; nothing for trajectories."""
    if not folder:
        return {}
    candidates = manifest.facts.candidates or "trajectories"
    return {"folder": folder, "origin": "run" if folder == own else "backfill", "candidates_from": candidates}


def time_of(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def range_row(shard: IndexRange) -> Row:
    return {"shard": shard.name, "index_start": shard.start, "index_stop": shard.stop}


def policy_row(version: PolicyVersion, manifest: Manifest) -> Row:
    (promise,) = manifest.objects.values()
    return {
        "version": version.number,
        "rewind": version.rewind,
        "created": time_of(manifest.created),
        "worker": manifest.worker,
        "size_bytes": promise["size_bytes"],
        "sha256": promise["sha256"],
    }


def step_row(step: TrainStep) -> Row:
    indices = sorted(step.indices.indices)
    return {
        "step": step.step,
        "rewind": step.rewind,
        "version": step.version.number,
        "index_start": indices[0],
        "index_stop": indices[-1] + 1,
        "indices": indices,
        "num_tokens": step.num_tokens,
        "num_dropped": len(step.dropped),
        "finished": time_of(step.finished),
        "metrics": [(name, None if value is None else float(value)) for name, value in step.metrics.items()],
        "staleness_tokens": list(step.staleness_tokens.items()),
    }


def evaluation_row(evaluation: Evaluation) -> Row:
    accuracy = evaluation.accuracy
    return {
        "version": evaluation.version.number,
        "rewind": evaluation.version.rewind,
        "num_prompts": evaluation.num_prompts,
        "accuracy": None if accuracy != accuracy else accuracy,
        "accuracy_by_group": list(evaluation.accuracy_by_group.items()),
        "kl_nats": evaluation.kl_nats,
        "kl_standard_error_nats": evaluation.kl_standard_error_nats,
        "mean_response_tokens": evaluation.mean_response_tokens,
        "finished": time_of(evaluation.finished),
    }


def shard_row(teacher: str, shard: IndexRange, manifest: Manifest) -> Row:
    facts = manifest.facts
    return {
        "stage": "score" if teacher else "rollout",
        "teacher": teacher,
        **range_row(shard),
        "num_rows": facts.num_rows,
        "num_tokens": facts.num_tokens,
        "num_dropped": len(facts.dropped),
        "seconds": facts.seconds,
        "worker": manifest.worker,
        "published": time_of(manifest.created),
        "size_bytes": sum(promise["size_bytes"] for promise in manifest.objects.values()),
    }


def dropped_of_shards(shards: Iterable[tuple[str, IndexRange, Manifest]]) -> list[Row]:
    """Scores repeat what was dropped at rollout; it counts once, where it was decided."""
    rows: dict[tuple[int, str], Row] = {}
    at_rollout: set[int] = set()
    for teacher, _, manifest in sorted(shards, key=lambda found: found[0]):
        for index, reason in manifest.facts.dropped.items():
            if not teacher:
                at_rollout.add(index)
            elif index in at_rollout:
                continue
            stage = "score" if teacher else "rollout"
            rows[index, teacher] = {"index": index, "stage": stage, "teacher": teacher, "reason": reason}
    return list(rows.values())


def dropped_of_steps(steps: Iterable[TrainStep]) -> list[Row]:
    return [
        {"index": index, "stage": "learn", "teacher": "", "reason": reason}
        for step in steps
        for index, reason in {**step.dropped, **step.held}.items()
    ]
