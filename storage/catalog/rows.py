"""The rows of the record relations for one run, as of when; and how its token ids read, from its task settings.

RunView --Cut (a time, or a policy version)--> what was published by then --> rows, by relation
"""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from pydantic import TypeAdapter, ValidationError

from asyncopd.config.tasks import TaskConfig, WalkConfig
from asyncopd.errors import StorageError
from asyncopd.records import Manifest, Rewind
from asyncopd.tasks.walk_rules import FIRST_NOISE_ID, WalkRules
from asyncopd.types import Evaluation, IndexRange, PolicyVersion, TrainStep
from storage.catalog.connection import DataFile, TokenTexts
from storage.events import surviving
from storage.layout import parse
from storage.parquet import SCHEMA_VERSION
from storage.run_log import StoredRunLog
from storage.run_view import RunView

Row = dict[str, Any]
Shard = tuple[str, IndexRange, Manifest]
"""(teacher, shard, manifest); the teacher is empty for trajectories."""
_TASK: TypeAdapter[Any] = TypeAdapter(TaskConfig)


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
        """Relation -> rows for Relation.table, of `relations`; and the DataFiles of trajectory_rows and score_rows."""
        shards = self._shards(cut) if {"shards", "dropped", "trajectory_rows", "score_rows"} & {*relations} else []
        steps = self._steps(cut) if {"steps", "superseded_steps", "dropped"} & {*relations} else ([], [])
        view = self._view
        makers: dict[str, Callable[[], Iterable[Any]]] = {
            "runs": lambda: [self._run()],
            "policies": lambda: self._policies(cut),
            "steps": lambda: map(_step, steps[0]),
            "superseded_steps": lambda: map(_step, steps[1]),
            "evals": lambda: self._evaluations(cut),
            "claims": lambda: [
                {**vars(claim), **_range(claim.shard), "claimed": claim.claimed or None}
                for claim in view.read("claim").claims()
                if claim.claimed <= cut.time
            ],
            "shards": lambda: [_shard(*shard) for shard in shards],
            "dropped": lambda: _dropped(shards, steps[0]),
            "rewinds": lambda: [{**vars(rewind), "rewind": rewind.number} for rewind in self._rewinds(cut)],
            "spans": lambda: [
                {**vars(span), "started": span.start, "ended": span.end, "seconds": span.end - span.start}
                for span in view.read("spans").spans()
                if span.end <= cut.time
            ],
            "failures": lambda: [vars(f) for f in view.read("failure").failures() if f.failed <= cut.time],
        }
        rows: dict[str, Sequence[Any]] = {
            name: [{**row, "run": self.run_id} for row in make()] for name, make in makers.items() if name in relations
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
            **record,
            "name": config.get("name"),
            "task": (config.get("task") or {}).get("kind"),
            "teacher": self._teacher(),
            "loss": (config.get("loss") or {}).get("name"),
            "seed": config.get("seed"),
            "batch_size": learner.get("batch_size"),
            "shard_size": rollout.get("shard_size"),
            "max_staleness": (config.get("staleness") or {}).get("max_staleness"),
            "num_steps": learner.get("num_steps"),
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


def _range(shard: IndexRange) -> Row:
    return {"shard": shard.name, "index_start": shard.start, "index_stop": shard.stop}


def _policy(version: PolicyVersion, manifest: Manifest) -> Row:
    (promise,) = manifest.objects.values()
    return {**vars(manifest), **promise, "version": version.number, "rewind": version.rewind}


def _step(step: TrainStep) -> Row:
    indices = sorted(step.indices.indices)
    return {
        **vars(step),
        "version": step.version.number,
        "index_start": indices[0],
        "index_stop": indices[-1] + 1,
        "indices": indices,
        "num_dropped": len(step.dropped),
        "metrics": list(step.metrics.items()),
        "staleness_tokens": list(step.staleness_tokens.items()),
    }


def _evaluation(evaluation: Evaluation) -> Row:
    return {
        **{name: value for name, value in vars(evaluation).items() if name != "examples"},
        "version": evaluation.version.number,
        "rewind": evaluation.version.rewind,
        "accuracy": None if math.isnan(evaluation.accuracy) else evaluation.accuracy,
        "accuracy_by_group": list(evaluation.accuracy_by_group.items()),
    }


def _shard(teacher: str, shard: IndexRange, manifest: Manifest) -> Row:
    return {
        **vars(manifest.facts),
        **_range(shard),
        "stage": "score" if teacher else "rollout",
        "teacher": teacher,
        "num_dropped": len(manifest.facts.dropped),
        "worker": manifest.worker,
        "published": manifest.created,
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


# -- how token ids read: here, so that the process that answers a query loads neither configuration nor hub -----------
def token_texts_of(record: Mapping[str, Any]) -> TokenTexts:
    """How the ids of the run with this record read; kind `unknown`, with a reason, where that cannot be told here."""
    try:
        config = _TASK.validate_python((record.get("config") or {}).get("task"))
    except ValidationError as error:
        return _unknown(f"its stored task settings are not readable ({error.error_count()} problems)")
    if isinstance(config, WalkConfig):
        return _walk_texts(config)
    if config.tokenizer == "bytes":
        return TokenTexts("bytes")
    named = Path(config.tokenizer)
    found = named / "tokenizer.json" if named.is_dir() else try_to_load_from_cache(config.tokenizer, "tokenizer.json")
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return _unknown(f"tokenizer {config.tokenizer!r} is neither a directory with tokenizer.json nor in the cache")
    return TokenTexts("file", path=str(Path(found).absolute()))


def _walk_texts(config: WalkConfig) -> TokenTexts:
    rules = WalkRules(config.p, config.noise_levels)
    classes = ("special", "noise", "operation", "state")
    firsts = (FIRST_NOISE_ID, rules.first_operation_id, rules.first_state_id)
    ids = range(rules.vocab_size)
    words = tuple(rules.tokenizer.token_text(token_id) for token_id in ids)
    return TokenTexts("words", words, tuple(classes[bisect(firsts, token_id)] for token_id in ids))


def _unknown(why: str) -> TokenTexts:
    return TokenTexts(
        "unknown",
        reason=f"token ids of this run cannot be shown as text: {why}. Ask for ids, or make the tokenizer available.",
    )
