"""Every key name there is. Nothing else in the platform builds or takes apart a key.

    models/<digest>.json                    manifest of a shared pretrained model; objects in models/<digest>/
    runs/<run_id>/run.json                  the run's record
                 /architecture.json         manifest of the student's config and tokenizer files
                 /trajectories/000128-000191.json                manifest; data 000128-000191.<attempt>.parquet
                 /scores/<teacher>/000128-000191.json            the same
                 /policies/000012.r0.json                        manifest; data 000012/r0.<attempt>.safetensors
                 /checkpoints/000050.r0.json                     manifest; data 000050.r0.<attempt>/<name>
                 /steps/000002.r0.json  /evals/000050.r0.json  /rewinds/0001.json
                 /claims/<stage>/000128-000191.1.json  /heartbeats/<worker>.json
                 /spans/<worker>.000007.json  /failures/<time>.<role>.<worker>.<attempt>.json
                 /removals/<time>.<attempt>.json                 what maintenance took out of the run, and why
                 /quarantine/<nanoseconds>/<rest of the key>     manifests and records that were set aside

A shard's manifest may, after compaction, name a data object of a larger range that several manifests share.

An attempt is eight random hex digits: two writers of one shard never write one key. Names of teachers, workers and
stages are percent-encoded, so they may hold any character.
"""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass
from urllib.parse import quote, unquote

from asyncopd.errors import StorageError
from asyncopd.types import IndexRange, PolicyVersion

RUNS = "runs"
MODELS = "models"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"(\d{6,})\.r(\d+)")
_SHARD_NAME, _STATE_NAME = r"\d{6,}-\d{6,}", r"\d{6,}\.r\d+"
_KINDS = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "run": r"run\.json",
        "architecture": r"architecture\.json",
        "trajectories": rf"trajectories/{_SHARD_NAME}\.json",
        "scores": rf"scores/[^/]+/{_SHARD_NAME}\.json",
        "candidates": rf"candidates/[^/]+/{_SHARD_NAME}\.json",
        "policy": rf"policies/{_STATE_NAME}\.json",
        "checkpoint": rf"checkpoints/{_STATE_NAME}\.json",
        "step": rf"steps/{_STATE_NAME}\.json",
        "evaluation": rf"evals/{_STATE_NAME}\.json",
        "rewind": r"rewinds/\d{4,}\.json",
        "claim": rf"claims/[^/]+/{_SHARD_NAME}\.\d+\.json",
        "heartbeat": r"heartbeats/[^/]+\.json",
        "spans": r"spans/[^/]+\.\d{6,}\.json",
        "failure": r"failures/[^/]+\.json",
        "removal": r"removals/[^/]+\.json",
        "quarantined": r"quarantine/.+",
        "data": r"(trajectories|(scores|candidates)/[^/]+)/[^/]+\.parquet|(policies|checkpoints|architecture)/[^/]+/.+",
    }.items()
}
_OBJECT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def new_attempt() -> str:
    """Eight random hex digits that make a data object's key its writer's own."""
    return uuid.uuid4().hex[:8]


def encode_name(name: str) -> str:
    """`name` as one part of a key: percent-encoded, so that slashes, dots and spaces are harmless."""
    if not name:
        raise StorageError("a worker, teacher or stage has an empty name; give it one, for example 'rollout-0'.")
    return quote(name, safe="").replace(".", "%2E")


def decode_name(part: str) -> str:
    """The inverse of `encode_name`."""
    return unquote(part)


def check_run_id(run_id: str) -> str:
    """`run_id` itself. Raises StorageError when it cannot be a folder and part of a URL as it stands."""
    if not _RUN_ID.fullmatch(run_id):
        raise StorageError(
            f"run id {run_id!r} cannot be used: expected up to 100 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit, for example 'walk-7'."
        )
    return run_id


def check_object_name(name: str) -> str:
    """`name` itself. Raises StorageError when it is not a plain file name."""
    if not _OBJECT_NAME.fullmatch(name):
        raise StorageError(
            f"object name {name!r} cannot be used: expected letters, digits, '.', '_' or '-', not starting with a dot."
        )
    return name


def stem(key: str) -> str:
    """The last part of `key` without its ending: `000012.r0` of `runs/a/policies/000012.r0.json`."""
    return key.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def version_name(number: int, rewind: int) -> str:
    """`000012.r0`: a number of learner steps and the rewind it belongs to."""
    return f"{number:06d}.r{rewind}"


def parse_version(key: str) -> PolicyVersion | None:
    """The version a key of policies/, steps/, checkpoints/ or evals/ speaks of; None for any other key."""
    match = _VERSION.fullmatch(stem(key)) if key.endswith(".json") else None
    return PolicyVersion(int(match[1]), int(match[2])) if match else None


def parse_shard(key: str) -> IndexRange | None:
    """The index range of a shard manifest's key; None for data objects and any other key."""
    match = re.fullmatch(r"\d{6,}-\d{6,}", stem(key)) if key.endswith(".json") else None
    return IndexRange.parse(match[0]) if match else None


def run_of(key: str) -> str | None:
    """The id of the run that `key` belongs to; None for shared models and anything else."""
    parts = key.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == RUNS and _RUN_ID.fullmatch(parts[1]) else None


def quarantined(key: str) -> str:
    """Where `key` goes when it is set aside: a new key at every call, outside every folder that is listed."""
    run_id = run_of(key)
    root = f"{RUNS}/{run_id}/" if run_id else ""
    return f"{root}quarantine/{time.time_ns()}/{key.removeprefix(root)}"


def model_manifest(digest: str) -> str:
    return f"{MODELS}/{check_object_name(digest)}.json"


def model_object(digest: str, attempt: str, name: str) -> str:
    return f"{MODELS}/{digest}/{attempt}/{check_object_name(name)}"


@dataclass(frozen=True)
class RunLayout:
    """The keys of one run."""

    run_id: str

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    @property
    def root(self) -> str:
        return f"{RUNS}/{self.run_id}"

    @property
    def record(self) -> str:
        return f"{self.root}/run.json"

    def kind_of(self, key: str) -> str:
        """What an object of this run is by its key: a name of `_KINDS`, or `unknown`."""
        rest = key.removeprefix(f"{self.root}/")
        return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(rest)), "unknown")

    # -- shards ---------------------------------------------------------------------------------------------------
    @property
    def trajectories(self) -> str:
        return f"{self.root}/trajectories"

    @property
    def all_scores(self) -> str:
        return f"{self.root}/scores"

    def scores(self, teacher: str) -> str:
        return f"{self.all_scores}/{encode_name(teacher)}"

    def shard_manifest(self, folder: str, shard: IndexRange) -> str:
        """`folder` is `trajectories` or `scores(teacher)`."""
        return f"{folder}/{shard.name}.json"

    def shard_object(self, folder: str, shard: IndexRange) -> str:
        """A new key at every call."""
        return f"{folder}/{shard.name}.{new_attempt()}.parquet"

    def parse_teacher(self, key: str) -> str:
        """The teacher of a key of scores/."""
        return decode_name(key.removeprefix(f"{self.all_scores}/").split("/")[0])

    # -- learner --------------------------------------------------------------------------------------------------
    @property
    def policies(self) -> str:
        return f"{self.root}/policies"

    def policy_manifest(self, version: PolicyVersion) -> str:
        return f"{self.policies}/{version_name(version.number, version.rewind)}.json"

    def policy_object(self, version: PolicyVersion) -> str:
        """A new key at every call."""
        return f"{self.policies}/{version.number:06d}/r{version.rewind}.{new_attempt()}.safetensors"

    @property
    def steps(self) -> str:
        return f"{self.root}/steps"

    def step(self, number: int, rewind: int) -> str:
        return f"{self.steps}/{version_name(number, rewind)}.json"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    def checkpoint_manifest(self, step: int, rewind: int) -> str:
        return f"{self.checkpoints}/{version_name(step, rewind)}.json"

    def checkpoint_object(self, step: int, rewind: int, attempt: str, name: str) -> str:
        return f"{self.checkpoints}/{version_name(step, rewind)}.{attempt}/{check_object_name(name)}"

    @property
    def rewinds(self) -> str:
        return f"{self.root}/rewinds"

    def rewind(self, number: int) -> str:
        return f"{self.rewinds}/{number:04d}.json"

    @property
    def architecture_manifest(self) -> str:
        return f"{self.root}/architecture.json"

    def architecture_object(self, attempt: str, name: str) -> str:
        return f"{self.root}/architecture/{attempt}/{check_object_name(name)}"

    # -- workers and observations ---------------------------------------------------------------------------------
    @property
    def claims(self) -> str:
        return f"{self.root}/claims"

    def claim(self, stage: str, shard: IndexRange, attempt: int) -> str:
        return f"{self.claims}/{encode_name(stage)}/{shard.name}.{attempt}.json"

    def parse_claim(self, key: str) -> tuple[str, IndexRange, int]:
        """(stage, shard, attempt) of a claim's key."""
        stage, name = key.removeprefix(f"{self.claims}/").split("/")
        shard, attempt, _ = name.split(".")
        return decode_name(stage), IndexRange.parse(shard), int(attempt)

    @property
    def heartbeats(self) -> str:
        return f"{self.root}/heartbeats"

    def heartbeat(self, worker: str) -> str:
        return f"{self.heartbeats}/{encode_name(worker)}.json"

    @property
    def evaluations(self) -> str:
        return f"{self.root}/evals"

    def evaluation(self, version: PolicyVersion) -> str:
        return f"{self.evaluations}/{version_name(version.number, version.rewind)}.json"

    @property
    def spans(self) -> str:
        return f"{self.root}/spans"

    def span(self, worker: str, sequence: int) -> str:
        return f"{self.spans}/{encode_name(worker)}.{sequence:06d}.json"

    @property
    def failures(self) -> str:
        return f"{self.root}/failures"

    def failure(self, when: float, role: str, worker: str) -> str:
        """A new key at every call; keys sort by time."""
        return f"{self.failures}/{int(when * 1000):015d}.{encode_name(role)}.{encode_name(worker)}.{new_attempt()}.json"

    # -- maintenance ----------------------------------------------------------------------------------------------
    @property
    def removals(self) -> str:
        return f"{self.root}/removals"

    def removal(self, when: float) -> str:
        """A new key at every call; keys sort by time."""
        return f"{self.removals}/{int(when * 1000):015d}.{new_attempt()}.json"
