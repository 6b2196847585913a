"""What a run has on record besides what its stages exchange: manifests, and what happened to it and its workers.

storage/records.py writes these values as JSON and reads them back; nothing here knows how they are stored. Every moment
(`claimed`, `beaten`, `recorded`, `failed`, `removed`, `at`, `created`) is Unix time in seconds; states and rewinds are
numbered from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from asyncopd.types import IndexRange

RunStateName = Literal["running", "stopped", "failed", "completed"]


@dataclass(frozen=True)
class Claim:
    """`worker` took a shard; the claim with the highest attempt counts."""

    stage: str
    shard: IndexRange
    attempt: int
    """1 for the first claim; one more each time a dead worker's claim was taken over."""
    worker: str
    claimed: float


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker tells of itself with every heartbeat. None: its role has no such thing, or not yet."""

    role: str | None = None
    """`rollout`, `score`, `learn`, `evaluate`, `pretrain`, ..."""
    host: str | None = None
    pid: int | None = None
    """Of its process on `host`."""
    busy: float | None = None
    """Share of the last seconds in which it had work in hand, 0 to 1."""
    doing: str | None = None
    """What it does besides or before its plain work, in words: `loads version 3`, `prefills 4 prompts`."""
    waiting_for: str | None = None
    """What its next piece of work needs, in words."""
    version: int | None = None
    """Policy version it samples from, or evaluated last."""
    teacher: str | None = None
    """Name of the teacher it scores with."""
    model: str | None = None
    """Which model it pre-trains: `student` or `teacher`."""
    step: int | None = None
    """Learner or pre-training steps done."""
    num_steps: int | None = None
    """Planned."""
    loss_nats: float | None = None
    """Of the last pre-training step, per token."""
    num_trajectories: int | None = None
    """Sampled or scored since it started, as are `num_tokens`; a learner counts the tokens it trained."""
    num_tokens: int | None = None
    num_begun: int | None = None
    """Responses in its sampler that are not finished; those its teacher is asked about."""
    num_tokens_in_flight: int | None = None
    """Sampled, and in no finished shard yet; those its teacher is asked about."""
    tokens_per_s: float | None = None
    """Sampled or scored, of the last seconds; where a piece of work takes longer, of whole pieces. None until the first
    tokens are known, so it is never 0."""
    num_tokens_discarded: int | None = None
    """Sampled for shards that another worker had published first."""


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a worker."""

    worker: str
    beaten: float
    """By the worker's own clock."""
    retired: bool
    """The worker stopped in good order."""
    status: WorkerStatus
    beat: int = 0
    """Counts, so that two beats differ even within one tick of the clock."""


@dataclass(frozen=True)
class Rewind:
    """The learner went back: versions and checkpoints above `to_step` of earlier rewinds are superseded."""

    number: int
    to_step: int
    """State after this many steps."""
    worker: str
    recorded: float


@dataclass(frozen=True)
class RunState:
    """What the flow of a run last said about it."""

    number: int
    state: RunStateName
    reason: str
    """Why it stopped or failed; may be empty."""
    by: str
    """The flow run that said so."""
    recorded: float

    @property
    def ended(self) -> bool:
        """Was the run stopped from outside or by an error? Then its workers stop too, wherever they are."""
        return self.state in ("stopped", "failed")


@dataclass(frozen=True)
class RunChange:
    """Settings that were changed when a run was resumed."""

    settings: Mapping[str, tuple[Any, Any]]
    """Dotted key -> (old value, new value)."""
    recorded: float


@dataclass(frozen=True)
class Failure:
    """Why a role failed."""

    role: str
    worker: str
    reason: str
    failed: float


@dataclass(frozen=True)
class Removal:
    """Things taken out of the run on purpose: by retention, or because they were corrupt."""

    reason: str
    """`retention`, `orphan` or `quarantine`."""
    keys: Mapping[str, int]
    """Key -> bytes. Written before the first key is deleted."""
    removed: float


@dataclass(frozen=True)
class Removed:
    """Why a shard has no data any more. Its manifest stays, so that nobody makes it again."""

    reason: str
    """`retention` or `quarantine`."""
    at: float
    advice: str = ""


@dataclass(frozen=True)
class ChainBase:
    """The version that a delta is against."""

    number: int
    rewind: int
    weights_sha256: str


@dataclass(frozen=True)
class WeightChain:
    """How a version is stored that a learner published which publishes deltas: in full, as a delta, or both."""

    weights_sha256: str
    """Of the full weights, however they were published."""
    full: str | None
    """Key of the full weights; None when only a delta was published."""
    delta: str | None
    """Key of the delta."""
    base: ChainBase | None
    """What the delta is against; always of a lower number."""
    num_changed: int | None
    """Elements whose bits differ from the version before; None when it is not known."""


@dataclass(frozen=True)
class Facts:
    """What a manifest tells about its objects. None, or empty: its kind has no such thing, or it was not said."""

    # -- shards: trajectories, scores, candidates; and cached scores
    num_rows: int | None = None
    index_range: tuple[int, int] | None = None
    """First index and the one after the last."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Index -> reason, for every index without a row."""
    num_tokens: int | None = None
    """Response tokens of all rows."""
    version_first: int | None = None
    """Oldest and newest policy version among its tokens."""
    version_last: int | None = None
    num_correct: int | None = None
    """Responses that the verifier accepted."""
    seconds: float | None = None
    """How long it took to make."""
    teacher: str | None = None
    teacher_digests: tuple[str, ...] = ()
    """Sorted; one, unless the teacher changed between runs of a back-fill."""
    num_tokens_asked: int | None = None
    """Of `num_tokens`, those the teacher was asked about, and those whose answer was known."""
    num_tokens_cached: int | None = None
    candidates: str | None = None
    """Name of the back-filled candidates that were scored in place of the recorded ones."""
    backfill: Mapping[str, Any] | None = None
    """Which teacher a back-fill asked, and for how much."""
    token_keys: tuple[str, ...] = ()
    """Digest of the question that each row of cached scores answers."""
    parquet_schema_version: int | None = None
    removed: Removed | None = None
    # -- policies and checkpoints
    step: int | None = None
    """Learner steps behind the weights."""
    rewind: int | None = None
    chain: WeightChain | None = None
    """None: the manifest's one object holds the full weights."""
    # -- models
    settings: Mapping[str, Any] | None = None
    """How the model was made."""
    loss_nats: float | None = None
    """Of the last pre-training step, per token."""


NO_FACTS = Facts()


@dataclass(frozen=True)
class Manifest:
    """What makes an object visible: written last, it promises the bytes it names."""

    kind: str
    """`trajectories`, `scores`, `policy`, `checkpoint` or `model`."""
    objects: Mapping[str, Mapping[str, Any]]
    """Key -> {`size_bytes`, `sha256`}."""
    created: float
    worker: str
    """Who wrote it."""
    facts: Facts = NO_FACTS
