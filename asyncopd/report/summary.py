"""The figures a run is summed up by: frozen values that survive a round trip through summary.json. No arithmetic here.

A figure that could not be measured is None, and `notes` says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter

from asyncopd.schedule import OnStale, Order
from asyncopd.types import Example


@dataclass(frozen=True)
class Quality:
    """Sampled-decoding quality of one policy version on the held-out prompts."""

    version: int
    num_prompts: int
    accuracy: float | None
    """Fraction; None without a verifier."""
    accuracy_standard_error: float | None
    """Fraction, binomial."""
    accuracy_by_group: Mapping[str, float]
    """Group label, for example a noise level -> fraction; empty where the task has no groups."""
    kl_nats: float | None
    """KL(student‖teacher) per response token on the student's own responses."""
    kl_standard_error_nats: float | None
    mean_response_tokens: float | None


@dataclass(frozen=True)
class Tokens:
    """Response tokens."""

    generated: int
    scored: int
    """In shards that the run's teacher has scored."""
    trained: int
    """In surviving steps: a step trained again after a crash counts once."""
    trained_per_s: float | None
    """Throughput: `trained` / wall time."""


@dataclass(frozen=True)
class RoleTime:
    """Where the time of one role's processes went; all figures are sums over them."""

    num_workers: int
    """Processes that left a timeline, restarted ones included."""
    alive_s: float
    """From each process's first span to its last."""
    busy_s: float
    busy_share: float | None
    """`busy_s` / the run's wall time: how many processes of the role were busy on average."""
    waiting_s: Mapping[str, float]
    """What was waited for -> time in which a process waited for it and was not busy."""


@dataclass(frozen=True)
class Orchestration:
    """What the platform itself cost rollout, scoring and learning: Prefect calls, Parquet, publishing, refreshing."""

    share: float | None
    """Σ of all overhead spans / Σ of the three roles' `alive_s`."""
    share_by_kind: Mapping[str, float]
    """Kind, for example `prefect` -> its part of `share`."""
    exposed_share: float | None
    """As `share`, counting only the time in which the process was not busy otherwise: what overhead delayed."""


@dataclass(frozen=True)
class StalenessFigures:
    """How old the trained tokens were, in policy versions."""

    tokens: Mapping[int, int]
    """Staleness -> trained tokens that had it."""
    mean_versions: float | None
    max_versions: int | None


@dataclass(frozen=True)
class Lengths:
    """Response lengths, EOS included."""

    num_responses: int
    """Responses read for these figures."""
    num_shards_read: int
    num_shards: int
    """When more than were read, the ones read are spread evenly over the run."""
    mean_tokens: float | None = None
    p99_tokens: float | None = None
    max_tokens: int | None = None
    stopped_fraction: float | None = None
    """Responses that ended with EOS rather than at the limit."""


@dataclass(frozen=True)
class Incidents:
    """What went wrong, or had to be done again."""

    failures: tuple[str, ...]
    """`role: reason`, oldest first."""
    num_extra_workers: int
    """Role processes started beyond the configured ones: restarts and resumptions."""
    num_rewinds: int
    """How often the learner went back to a checkpoint."""
    dropped: Mapping[str, int]
    """Reason -> trajectories that were not trained for it."""
    held: Mapping[str, int] = field(default_factory=dict)
    """Reason -> trajectories that were kept untrained for it."""


@dataclass(frozen=True)
class Summary:
    """A run in numbers."""

    run_id: str
    num_steps: int
    """Steps trained."""
    num_steps_planned: int
    max_staleness: int
    """τ, in policy versions."""
    wall_s: float | None
    """From the first to the last busy moment of rollout, scoring and learning."""
    overlap: float | None
    """Σ busy time of rollout, score and learn processes / wall time: how many worked at once on average."""
    first: Quality | None
    last: Quality | None
    """The same version as `first` when only one was evaluated."""
    tokens: Tokens
    roles: Mapping[str, RoleTime]
    orchestration: Orchestration
    staleness: StalenessFigures
    lengths: Lengths
    incidents: Incidents
    notes: tuple[str, ...]
    """What is missing, or must be known to read the figures."""
    order: Order = "index"
    on_stale: OnStale | None = None
    """What became of trajectories older than τ; None in index order, where there are none."""
    examples: tuple[tuple[Example, Example | None], ...] = ()
    """Held-out responses of the first and of the last evaluated version; None when only one was evaluated."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Summary:
        """The inverse of `to_json`. Raises pydantic.ValidationError when `text` is something else."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(Summary)
