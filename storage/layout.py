"""Every key name there is, in one table: keys are built from it, and recognised and taken apart by it.

Names of teachers, workers and stages are percent-encoded, so they may hold any character. A nonce is eight random hex
digits: two writers of one shard never write one key.
"""

from __future__ import annotations

import re
import string
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from asyncopd.errors import StorageError
from asyncopd.types import IndexRange, PolicyVersion

RUNS = "runs"
MODELS = "models"
_SHARD, _SHARD_DATA = "{shard}.json", "{shard}.{nonce}.parquet"
SHARED = {
    "model": "models/{digest}.json",  # manifest of a pretrained model, by the digest of how it was made
    "model.data": "models/{digest}/{nonce}/{object}",
    "cached scores": "score-cache/{question}/{pack}.json",  # manifest of a teacher's answers, for all runs
    "cached scores.data": "score-cache/{question}/{pack}.{nonce}.parquet",
    "launch": "service/launches/{run_id}.json",  # what the service was asked for, before any flow started
    "flow run": "service/flow_runs/{run_id}.json",  # Prefect's id of the run's last flow run
    "request": "service/wishes/{run_id}.json",  # what a user last asked: paused, cancelled or running
    "idempotency": "service/idempotency/{digest}.json",  # an Idempotency-Key with the run it made
}
"""Kind -> key of what belongs to no run."""
OF_A_RUN = {
    "run": "run.json",  # what it is: configuration, code version, parent
    "architecture": "architecture.json",  # manifest of the student's config and tokenizer files
    "architecture.data": "architecture/{nonce}/{object}",
    "trajectories": f"trajectories/{_SHARD}",  # manifest; a shard is named 000128-000191, both inclusive
    "trajectories.data": f"trajectories/{_SHARD_DATA}",
    "scores": f"scores/{{teacher}}/{_SHARD}",
    "scores.data": f"scores/{{teacher}}/{_SHARD_DATA}",
    "candidates": f"candidates/{{name}}/{_SHARD}",  # back-filled
    "candidates.data": f"candidates/{{name}}/{_SHARD_DATA}",
    "policy": "policies/{state}.json",  # manifest; a state is named 000012.r0: 12 learner steps, rewind 0
    "policy.data": "policies/{number:06d}/r{rewind:d}.{nonce}.{coding}",
    "checkpoint": "checkpoints/{state}.json",
    "checkpoint.data": "checkpoints/{state}.{nonce}/{object}",
    "step": "steps/{state}.json",
    "evaluation": "evals/{state}.json",
    "arrival": "arrivals/{number:06d}.json",
    "state": "states/{number:04d}.json",  # what the flow said of the run
    "change": "changes/{number:04d}.json",
    "rewind": "rewinds/{number:04d}.json",
    "claim": "claims/{stage}/{shard}.{attempt:d}.json",
    "heartbeat": "heartbeats/{worker}.json",
    "spans": "spans/{worker}.{sequence:06d}.json",
    "failure": "failures/{unix_ms:015d}.{role}.{worker}.{nonce}.json",
    "removal": "removals/{unix_ms:015d}.{nonce}.json",  # what maintenance took out of the run, and why
    "quarantined": "quarantine/{unix_ns:d}/{rest}",  # manifests and records that were set aside
}
"""Kind -> key below runs/<run id>/. Data objects of a kind are promised by its manifests."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OBJECT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


# -- names: parts of keys ---------------------------------------------------------------------------------------------
def new_nonce() -> str:
    """Eight random hex digits that make a data object's key its writer's own."""
    return uuid.uuid4().hex[:8]


def encode_name(name: str) -> str:
    """`name` as one part of a key: percent-encoded, so that slashes, dots and spaces are harmless."""
    if not name:
        raise StorageError("a worker, teacher or stage has an empty name; give it one, for example 'rollout-0'.")
    return quote(name, safe="").replace(".", "%2E")


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


def split_run_path(text: str, default_root: str = "runs") -> tuple[str, str]:
    """(storage root, run id) of a run's folder, as path or URL, or of a bare id in `default_root`."""
    root, _, run_id = text.rstrip("/").rpartition("/")
    if not root:
        return default_root, run_id
    parent, _, folder = root.rpartition("/")
    if folder != RUNS:
        raise StorageError(
            f"{text} is not a run: expected a run id, or the path of its folder, <root>/{RUNS}/<run id>."
        )
    return parent or ".", run_id


# -- the table, read both ways ----------------------------------------------------------------------------------------
class _Part(NamedTuple):
    """How one field of a template is written and read."""

    pattern: str
    write: Callable[[Any], str] = str
    read: Callable[[str], Any] = str


_NAME = _Part(r"[^/.]+", encode_name, unquote)
_PARTS = {
    "shard": _Part(r"\d{6,}-\d{6,}", lambda shard: shard.name, IndexRange.parse),
    "state": _Part(
        r"\d{6,}\.r\d+",
        lambda state: f"{state.number:06d}.r{state.rewind}",
        lambda text: PolicyVersion(*map(int, text.split(".r"))),
    ),
    **dict.fromkeys(("object", "digest", "question", "pack"), _Part(_OBJECT_NAME.pattern, check_object_name)),
    "run_id": _Part(_RUN_ID.pattern, check_run_id),
    "coding": _Part("safetensors|delta"),
    "nonce": _Part(r"[^/.]+"),
    "rest": _Part(".+"),
}


class _Template:
    """One line of the table: builds its keys and recognises them."""

    def __init__(self, text: str) -> None:
        self._pieces: list[tuple[str, str, _Part]] = []
        pattern = ""
        for literal, name, spec, _ in string.Formatter().parse(text):
            width = (spec or "").strip("0d") or "1"
            number = _Part(rf"\d{{{width},}}", lambda value, spec=spec: format(value, spec), int)  # type: ignore[misc]
            part = number if spec else _PARTS.get(name or "", _NAME)
            pattern += re.escape(literal) + (f"(?P<{name}>{part.pattern})" if name else "")
            self._pieces.append((literal, name or "", part))
        self._pattern = re.compile(pattern)

    def build(self, fields: Mapping[str, Any]) -> str:
        return "".join(literal + (part.write(fields[name]) if name else "") for literal, name, part in self._pieces)

    def parse(self, key: str) -> dict[str, Any] | None:
        match = self._pattern.fullmatch(key)
        return match and {name: part.read(match[name]) for _, name, part in self._pieces if name}


_TEMPLATES = {kind: _Template(text) for kind, text in (SHARED | OF_A_RUN).items()}
_OF_A_SHARD, _OF_ITS_DATA = _Template(_SHARD), _Template(_SHARD_DATA)
_BY_FOLDER: dict[str, list[str]] = {}
for _kind, _text in (SHARED | OF_A_RUN).items():
    _BY_FOLDER.setdefault(_text.split("/")[0], []).append(_kind)


@dataclass(frozen=True)
class ParsedKey:
    """What a key says about the object under it."""

    kind: str
    """A name of the table; `data` for every data object; `unknown`."""
    fields: Mapping[str, Any]
    """The fields of its template: a `shard` is an IndexRange, a `state` a PolicyVersion, names are decoded."""


def parse(key: str) -> ParsedKey:
    """What `key` says, whichever run it belongs to."""
    rest = key.split("/", 2)[2] if run_of(key) else key
    for kind in _BY_FOLDER.get(rest.split("/")[0], ()):
        fields = _TEMPLATES[kind].parse(rest)
        if fields is not None:
            return ParsedKey(kind.split(".")[-1], fields)
    return ParsedKey("unknown", {})


def parse_version(key: str) -> PolicyVersion | None:
    """The state a key of policies/, steps/, checkpoints/ or evals/ speaks of; None for data and any other key."""
    parsed = parse(key)
    return parsed.fields.get("state") if parsed.kind != "data" else None


def parse_shard(key: str) -> IndexRange | None:
    """The index range of a shard manifest's key; None for data, claims and any other key."""
    parsed = parse(key)
    return parsed.fields["shard"] if parsed.kind in ("trajectories", "scores", "candidates") else None


def run_of(key: str) -> str | None:
    """The id of the run that `key` belongs to; None for shared models and anything else."""
    parts = key.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == RUNS and _RUN_ID.fullmatch(parts[1]) else None


def shared_key(kind: str, **fields: Any) -> str:
    """A key of SHARED; data get a new key at every call."""
    return _TEMPLATES[kind].build({"nonce": new_nonce(), **fields})


def quarantined(key: str) -> str:
    """Where `key` goes when it is set aside: a new key at every call, outside every folder that is listed."""
    run_id = run_of(key)
    root = f"{RUNS}/{run_id}/" if run_id else ""
    return root + _TEMPLATES["quarantined"].build({"unix_ns": time.time_ns(), "rest": key.removeprefix(root)})


@dataclass(frozen=True)
class RunLayout:
    """The keys of one run. Keys of data objects are new at every call."""

    run_id: str

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    @property
    def root(self) -> str:
        return f"{RUNS}/{self.run_id}"

    def folder(self, kind: str) -> str:
        """The folder that all objects of a kind lie in, at whatever depth."""
        return f"{self.root}/{OF_A_RUN[kind].split('/')[0]}"

    def key(self, kind: str, **fields: Any) -> str:
        """A key of OF_A_RUN, from the fields that its template names."""
        return f"{self.root}/{_TEMPLATES[kind].build({'nonce': new_nonce(), **fields})}"

    # -- shards ---------------------------------------------------------------------------------------------------
    @property
    def trajectories(self) -> str:
        return self.folder("trajectories")

    def scores(self, teacher: str) -> str:
        return f"{self.folder('scores')}/{encode_name(teacher)}"

    def candidates(self, name: str) -> str:
        return f"{self.folder('candidates')}/{encode_name(name)}"

    def shard_manifest(self, folder: str, shard: IndexRange) -> str:
        """`folder` is `trajectories`, `scores(teacher)` or `candidates(name)`."""
        return f"{folder}/{_OF_A_SHARD.build({'shard': shard})}"

    def shard_object(self, folder: str, shard: IndexRange) -> str:
        return f"{folder}/{_OF_ITS_DATA.build({'shard': shard, 'nonce': new_nonce()})}"

    # -- states: steps and a rewind ---------------------------------------------------------------------------------
    def step(self, number: int, rewind: int) -> str:
        return self.key("step", state=PolicyVersion(number, rewind))

    def checkpoint_manifest(self, step: int, rewind: int) -> str:
        return self.key("checkpoint", state=PolicyVersion(step, rewind))
