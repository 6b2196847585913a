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
from storage.catalog.decoders import TokenTexts
from storage.catalog.token_texts import token_texts_of
from storage.layout import parse
from storage.learner_log import surviving
from storage.parquet import SCHEMA_VERSION
from storage.run_log import StoredRunLog
from storage.run_view import RunView

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
            "steps": lambda: map(_step, steps[0]),
            "superseded_steps": lambda: map(_step, steps[1]),
            "evals": lambda: self._evaluations(cut),
            "claims": lambda: self._claims(cut),
            "shards": lambda: [_shard(*shard) for shard in shards],
            "dropped": lambda: _dropped(shards, steps[0]),
            "rewinds": lambda: [
                {"rewind": r.number, "to_step": r.to_step, "worker": r.worker, "recorded": _time(r.recorded)}
                for r in self._rewinds(cut)
            ],
            "spans": lambda: self._spans(cut),
            "failures": lambda: [
                {"role": f.role, "worker": f.worker, "reason": f.reason, "failed": _time(f.failed)}
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
            "created": _time(record.get("created")),
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

    def _policies(self, cut: Cut) -> list[Row]:
        found = list(self._view.read("policy").records["policy"].items())
        manifests: dict[PolicyVersion, Manifest] = {parse(key).fields["state"]: manifest for key, manifest in found}
        seen = [version for version, manifest in manifests.items() if cut.has_version(version, manifest.created)]
        return [_policy(version, manifests[version]) for version in surviving(seen, self._rewinds(cut))]

    def _steps(self, cut: Cut) -> tuple[list[TrainStep], list[TrainStep]]:
        """(surviving, superseded), both in order."""
        found: list[TrainStep] = list(self._view.read("step").records["step"].values())
        steps = [step for step in found if cut.has_version(step.version, step.finished)]
        # Step s counts exactly when the state s + 1 that it made does.
        by_state = {PolicyVersion(step.step + 1, step.rewind): step for step in steps}
        kept = set(surviving(by_state, self._rewinds(cut)))
        ordered = sorted(by_state.items())
        return [step for s, step in ordered if s in kept], [step for s, step in ordered if s not in kept]

    def _evaluations(self, cut: Cut) -> list[Row]:
        found: list[Evaluation] = list(self._view.read("evaluation").records["evaluation"].values())
        by_version = {e.version: e for e in found if cut.has_version(e.version, e.finished)}
        return [_evaluation(by_version[version]) for version in surviving(by_version, self._rewinds(cut))]

    def _claims(self, cut: Cut) -> list[Row]:
        return [
            {
                **_range(claim.shard),
                "stage": claim.stage,
                "attempt": claim.attempt,
                "worker": claim.worker,
                "claimed": _time(claim.claimed or None),
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
                "detail": span.detail,
                "started": _time(span.start),
                "ended": _time(span.end),
                "seconds": span.end - span.start,
            }
            for span in self._view.read("spans").spans()
            if span.end <= cut.time
        ]

    def _shards(self, cut: Cut) -> list[Shard]:
        """Every complete shard. Raises StorageError where newer code wrote one."""
        view = self._view.read("trajectories", "scores")
        found = [("", shard, manifest) for shard, manifest in view.trajectories().items()]
        found += [(teacher, *scored) for teacher in view.teachers() for scored in view.scores(teacher).items()]
        for _, shard, manifest in found:
            written_by = manifest.facts.parquet_schema_version or 0
            if written_by > SCHEMA_VERSION:
                raise StorageError(
                    f"run {self.run_id}: shard {shard.name} has Parquet schema version {written_by}, this code reads "
                    f"up to {SCHEMA_VERSION}. Use the code version that wrote it, or name other runs with --run."
                )
        return [shard for shard in found if shard[2].created <= cut.time]

    def _files(self, shards: Iterable[Shard]) -> list[DataFile]:
        own, files = self._teacher(), []
        for folder, shard, manifest in shards:
            constants = {"run": self.run_id, "shard": shard.name}
            if folder:
                constants["folder"] = folder
                constants["origin"] = "run" if folder == own else "backfill"
                constants["candidates_from"] = manifest.facts.candidates or "trajectories"
            files += [DataFile(key, constants) for key in manifest.objects]
        return files


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _range(shard: IndexRange) -> Row:
    return {"shard": shard.name, "index_start": shard.start, "index_stop": shard.stop}


def _policy(version: PolicyVersion, manifest: Manifest) -> Row:
    (promise,) = manifest.objects.values()
    return {
        "version": version.number,
        "rewind": version.rewind,
        "created": _time(manifest.created),
        "worker": manifest.worker,
        "size_bytes": promise["size_bytes"],
        "sha256": promise["sha256"],
    }


def _step(step: TrainStep) -> Row:
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
        "finished": _time(step.finished),
        "metrics": [(name, None if value is None else float(value)) for name, value in step.metrics.items()],
        "staleness_tokens": list(step.staleness_tokens.items()),
    }


def _evaluation(evaluation: Evaluation) -> Row:
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
        "finished": _time(evaluation.finished),
    }


def _shard(teacher: str, shard: IndexRange, manifest: Manifest) -> Row:
    facts = manifest.facts
    return {
        "stage": "score" if teacher else "rollout",
        "teacher": teacher,
        **_range(shard),
        "num_rows": facts.num_rows,
        "num_tokens": facts.num_tokens,
        "num_dropped": len(facts.dropped),
        "seconds": facts.seconds,
        "worker": manifest.worker,
        "published": _time(manifest.created),
        "size_bytes": sum(promise["size_bytes"] for promise in manifest.objects.values()),
    }


def _dropped(shards: Iterable[Shard], steps: Iterable[TrainStep]) -> list[Row]:
    """Scores repeat what was dropped at rollout; it counts once, where it was decided."""
    by_folder = sorted(shards, key=lambda found: found[0])  # trajectories, whose teacher is empty, first
    at_rollout = {index for teacher, _, manifest in by_folder if not teacher for index in manifest.facts.dropped}
    reasons = {
        (index, "score" if teacher else "rollout", teacher): reason
        for teacher, _, manifest in by_folder
        for index, reason in manifest.facts.dropped.items()
        if not teacher or index not in at_rollout
    }
    for step in steps:
        reasons |= {(index, "learn", ""): reason for index, reason in {**step.dropped, **step.held}.items()}
    return [
        {"index": index, "stage": stage, "teacher": teacher, "reason": reason}
        for (index, stage, teacher), reason in reasons.items()
    ]
