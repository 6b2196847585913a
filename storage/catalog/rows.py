"""The rows of the record relations for one run, read from its log. What cannot change is read once and remembered.

Values of the run log as rows of the record relations.

As-of queries: which objects had been published at a time, or when a policy version was.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from asyncopd.errors import StorageError
from asyncopd.types import Evaluation, IndexRange, Manifest, PolicyVersion, Rewind, Span, TrainStep
from storage.catalog.connection import DataFile
from storage.catalog.decoders import TokenTexts, token_texts_of
from storage.layout import parse_version
from storage.learner_log import surviving
from storage.manifests import read_manifest
from storage.records import from_json
from storage.run_log import StoredRunLog
from storage.schema import SCHEMA_VERSION

_PARALLEL_REQUESTS = 16
"""Objects read at once; a cold S3 run costs a request for each."""


class RunRecords:
    """One run's part of every record relation."""

    def __init__(self, log: StoredRunLog) -> None:
        self.run_id = log.run_id
        self._log = log
        self._remembered: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def cut(self, as_of: AsOf | None) -> Cut | None:
        """The moment `as_of` of this run; None when the run did not exist then, or never made that version."""
        if as_of is None:
            return Cut()
        if as_of.time is not None:
            return Cut(time=as_of.time) if (self._log.record.get("created") or 0.0) <= as_of.time else None
        version = self._log.find_policy(as_of.version or 0)
        if version is None:
            return None
        return Cut(time=self._policy(version).created, version=version)

    def read(self, relations: Collection[str], cut: Cut) -> dict[str, Sequence[Any]]:
        """Relation -> rows of the records in `relations`, and DataFiles of `trajectory_rows` and `score_rows`."""
        manifests = self._shards(cut) if {"shards", "dropped", "trajectory_rows", "score_rows"} & {*relations} else []
        steps = self._steps(cut) if {"steps", "superseded_steps", "dropped"} & {*relations} else ([], [])
        makers: dict[str, Callable[[], Sequence[Any]]] = {
            "runs": lambda: [self._run()],
            "policies": lambda: self._policies(cut),
            "steps": lambda: [step_row(step) for step in steps[0]],
            "superseded_steps": lambda: [step_row(step) for step in steps[1]],
            "evals": lambda: self._evaluations(cut),
            "claims": lambda: self._claims(cut),
            "shards": lambda: [shard_row(*shard) for shard in manifests],
            "dropped": lambda: [*dropped_of_shards(manifests), *dropped_of_steps(steps[0])],
            "rewinds": lambda: [
                {"rewind": r.number, "to_step": r.to_step, "worker": r.worker, "recorded": time_of(r.recorded)}
                for r in cut.rewinds(self._log.rewinds())
            ],
            "spans": lambda: self._spans(cut),
            "failures": lambda: [
                {"role": f.role, "worker": f.worker, "reason": f.reason, "failed": time_of(f.failed)}
                for f in self._log.failures()
                if f.failed <= cut.time
            ],
        }
        rows: dict[str, Sequence[Any]] = {
            name: [{"run": self.run_id, **row} for row in make()] for name, make in makers.items() if name in relations
        }
        rows["trajectory_rows"] = self._files(manifests, "rollout")
        rows["score_rows"] = self._files(manifests, "score")
        return rows

    @cached_property
    def token_texts(self) -> TokenTexts:
        """How the run's token ids read."""
        return token_texts_of(self._log.record)

    # -- one relation each ----------------------------------------------------------------------------------------
    def _run(self) -> Row:
        record = self._log.record
        config = record.get("config") or {}
        learner, rollout = config.get("learner") or {}, config.get("rollout") or {}
        return {
            "created": time_of(record.get("created")),
            "name": config.get("name"),
            "task": (config.get("task") or {}).get("kind"),
            "teacher": self._teacher(config),
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

    def _teacher(self, config: Mapping[str, Any]) -> str | None:
        named = (config.get("teacher") or {}).get("name")
        return named or next(iter(sorted(self._log.teachers())), None)

    def _policies(self, cut: Cut) -> list[Row]:
        versions = self._versions(self._log.layout.folder("policy"))
        created = dict(zip(versions, self._parallel(self._policy, versions), strict=True))
        seen = [version for version in versions if cut.has_version(version, created[version].created)]
        return [policy_row(version, created[version]) for version in self._surviving(seen, cut)]

    def _steps(self, cut: Cut) -> tuple[list[TrainStep], list[TrainStep]]:
        """(surviving, superseded), both in order."""
        layout = self._log.layout
        keys = [layout.step(found.number, found.rewind) for found in self._versions(layout.folder("step"))]
        steps = self._parallel(lambda key: self._read(key, TrainStep), keys)
        steps = [step for step in steps if cut.has_version(step.version, step.finished)]
        # Step s counts exactly when the state s + 1 that it made does.
        states = {(state.number, state.rewind) for state in self._surviving([_state(step) for step in steps], cut)}
        counts = {id(step): (step.step + 1, step.rewind) in states for step in steps}
        return [s for s in steps if counts[id(s)]], [s for s in steps if not counts[id(s)]]

    def _evaluations(self, cut: Cut) -> list[Row]:
        layout = self._log.layout
        keys = [layout.evaluation(found) for found in self._versions(layout.folder("evaluation"))]
        found = self._parallel(lambda key: self._read(key, Evaluation), keys)
        found = [evaluation for evaluation in found if cut.has_version(evaluation.version, evaluation.finished)]
        kept = set(self._surviving([evaluation.version for evaluation in found], cut))
        return [evaluation_row(evaluation) for evaluation in found if evaluation.version in kept]

    def _claims(self, cut: Cut) -> list[Row]:
        return [
            {
                "stage": claim.stage,
                **range_row(claim.shard),
                "attempt": claim.attempt,
                "worker": claim.worker,
                "claimed": time_of(claim.claimed or None),
            }
            for claim in self._log.claims()
            if claim.claimed <= cut.time
        ]

    def _spans(self, cut: Cut) -> list[Row]:
        keys = self._log.store.list(self._log.layout.folder("spans"))
        batches = self._parallel(lambda key: self._read(key, list[Span]), keys)
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
            for batch in batches
            for span in batch
            if span.end <= cut.time
        ]

    def _shards(self, cut: Cut) -> list[tuple[str, IndexRange, Manifest]]:
        """(teacher, shard, manifest) of every complete shard; teacher is empty for trajectories."""
        found = [("", shard) for shard in self._log.trajectory_shards()]
        for teacher in self._log.teachers():
            found += [(teacher, shard) for shard in self._log.score_shards(teacher)]
        manifests = self._parallel(lambda pair: self._manifest(*pair), found)
        return [
            (teacher, shard, manifest)
            for (teacher, shard), manifest in zip(found, manifests, strict=True)
            if manifest is not None and manifest.created <= cut.time
        ]

    def _files(self, shards: Iterable[tuple[str, IndexRange, Manifest]], stage: str) -> list[DataFile]:
        own = self._teacher(self._log.record.get("config") or {})
        return [
            DataFile(key, self.run_id, shard.name, _labels(folder, own, manifest))
            for folder, shard, manifest in shards
            if bool(folder) == (stage == "score")
            for key in manifest.objects
        ]

    # -- reading --------------------------------------------------------------------------------------------------
    def _manifest(self, teacher: str, shard: IndexRange) -> Manifest | None:
        found: Manifest | None = self._once(
            ("shard", teacher, shard),
            lambda: self._log.find_scores(teacher, shard) if teacher else self._log.find_trajectories(shard),
        )
        written_by = 0 if found is None else int(found.facts.get("parquet_schema_version", 0))
        if written_by > SCHEMA_VERSION:
            raise StorageError(
                f"run {self.run_id}: shard {shard.name} has Parquet schema version {written_by}, this code reads up to "
                f"{SCHEMA_VERSION}. Use the code version that wrote it, or name other runs with --run."
            )
        return found

    def _policy(self, version: PolicyVersion) -> Manifest:
        key = self._log.layout.policy_manifest(version)
        manifest: Manifest = self._once(key, lambda: read_manifest(self._log.store, key))
        return manifest

    def _read(self, key: str, kind: type[Any]) -> Any:
        return self._once(key, lambda: from_json(self._log.store.get(key), key, kind))

    def _once(self, key: Any, read: Callable[[], Any]) -> Any:
        """What `read` gave the first time it gave anything."""
        with self._lock:
            if key in self._remembered:
                return self._remembered[key]
        value = read()
        if value is not None:
            with self._lock:
                self._remembered[key] = value
        return value

    def _parallel(self, read: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
        if not self._log.store.url.startswith("s3://"):
            return [read(argument) for argument in arguments]
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return list(pool.map(read, arguments))

    def _versions(self, folder: str) -> list[PolicyVersion]:
        found = (parse_version(key) for key in self._log.store.folder(folder).keys)
        return sorted(version for version in found if version is not None)

    def _surviving(self, versions: Sequence[PolicyVersion], cut: Cut) -> list[PolicyVersion]:
        return surviving(versions, cut.rewinds(self._log.rewinds()))


def _state(step: TrainStep) -> PolicyVersion:
    return PolicyVersion(step.step + 1, step.rewind)


def _labels(folder: str, own: str | None, manifest: Manifest) -> dict[str, str]:
    """What every row of a file of scores has in common; nothing for trajectories."""
    if not folder:
        return {}
    candidates = manifest.facts.get("candidates") or "trajectories"
    return {"folder": folder, "origin": "run" if folder == own else "backfill", "candidates_from": candidates}


Row = dict[str, Any]


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
        "num_rows": facts.get("num_rows"),
        "num_tokens": facts.get("num_tokens"),
        "num_dropped": len(facts.get("dropped", {})),
        "seconds": facts.get("seconds"),
        "worker": manifest.worker,
        "published": time_of(manifest.created),
        "size_bytes": sum(promise["size_bytes"] for promise in manifest.objects.values()),
    }


def dropped_of_shards(shards: Iterable[tuple[str, IndexRange, Manifest]]) -> list[Row]:
    """Scores repeat what was dropped at rollout; it counts once, where it was decided."""
    rows: dict[tuple[int, str], Row] = {}
    at_rollout: set[int] = set()
    for teacher, _, manifest in sorted(shards, key=lambda found: found[0]):
        for index, reason in manifest.facts.get("dropped", {}).items():
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

    def rewinds(self, rewinds: Iterable[Rewind]) -> list[Rewind]:
        """Those the learner had made by then."""
        return [rewind for rewind in rewinds if rewind.recorded <= self.time]
