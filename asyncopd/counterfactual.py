"""Which rollouts of a log each learner step would have consumed under another staleness: pure functions.

    parent's clock j --(+ lag)--> deliverable at clock j + lag --order--> step k = clock k takes up to B of them
                                                                  `-- over the bound: train | drop | hold

The clock counts learner versions. In index order a rollout is there at its own step; in arrival order at the first step
of the parent that began after its scores had appeared. Consumed d steps later than in the parent, it is d versions
staler. Generation cannot be re-ordered: the rollouts are those that the parent's policies made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Order = Literal["index", "arrival"]
OnStale = Literal["train", "drop", "hold"]


@dataclass(frozen=True)
class Rollout:
    """What consumption depends on of one index."""

    index: int
    step: int
    """The parent's step that trained it."""
    arrived_step: int
    """The parent's first step that began after its scores had appeared; at most `step`."""
    arrival: float
    """When its scores appeared; any unit, compared with other rollouts of the log only."""
    version_first: int
    """The oldest version that produced a token of it."""
    num_tokens: int


@dataclass(frozen=True)
class Setting:
    """One counterfactual."""

    max_staleness: int
    """Bound in versions; what is staler when its turn comes is treated as `on_stale` says."""
    lag: int
    """Steps between a rollout being there and its delivery to the learner."""
    order: Order
    on_stale: OnStale


@dataclass(frozen=True)
class Consumption:
    """What each clock's step trains, and what is not trained."""

    steps: tuple[tuple[int, ...], ...]
    """By clock, from 0: indices in consumption order; empty where the learner had nothing to train."""
    stale: tuple[tuple[int, ...], ...]
    """By clock: indices dropped or held when their turn came; empty under `train`."""


@dataclass(frozen=True)
class Cell:
    """What a replayed learner measured under one setting, over the measured clocks; means are over trained tokens."""

    setting: Setting
    num_steps: int
    """Steps trained."""
    num_idle: int
    """Clocks at which there was not enough to train."""
    is_finite: bool
    """False when a loss was not finite; the figures are those of the steps before."""
    staleness_mean: float
    """Versions."""
    staleness_max: int
    loss_nats: float
    drift_nats: float
    ess_fraction: float
    grad_norm: float
    num_tokens: int
    """Trained."""
    num_tokens_wasted: int
    """Scored, and dropped or held when their turn came."""

    @property
    def waste(self) -> float:
        """Share of the tokens whose turn came that were not trained."""
        total = self.num_tokens + self.num_tokens_wasted
        return self.num_tokens_wasted / total if total else 0.0

    def to_record(self) -> dict[str, Any]:
        """One flat row, for a table or JSON."""
        fields = asdict(self)
        return {**fields.pop("setting"), **fields}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Cell:
        fields = dict(record)
        setting = Setting(**{name: fields.pop(name) for name in ("max_staleness", "lag", "order", "on_stale")})
        return cls(setting=setting, **fields)


def settings_of(
    staleness: Sequence[int],
    orders: Sequence[Order],
    on_stale: Sequence[OnStale],
    *,
    recorded_staleness: int,
    lag: int | None = None,
) -> list[Setting]:
    """All combinations. The lag makes the log as stale as each bound allows, unless one lag is given for all.

    Args:
        recorded_staleness: the log's own largest, in versions.
    """
    return [
        Setting(bound, max(0, bound - recorded_staleness) if lag is None else lag, order, policy)
        for bound in staleness
        for order in orders
        for policy in on_stale
    ]


def consume(rollouts: Sequence[Rollout], setting: Setting, *, batch_size: int, num_clocks: int) -> Consumption:
    """Run the learner's side of the log under another setting, from clock 0.

    In index order clock k's step trains what is admissible of one batch of the parent; in arrival order it takes the
    first `batch_size` admissible rollouts that were delivered, and does not train while there are fewer.
    """
    waiting = _in_order(rollouts, setting.order)
    steps: list[tuple[int, ...]] = []
    stale: list[tuple[int, ...]] = []
    for clock in range(num_clocks):
        if setting.order == "index":
            turn = [r for r in waiting if r.step + setting.lag == clock]
        else:
            turn = _delivered(waiting, setting, clock, batch_size)
        taken = [r for r in turn if _is_admissible(r, setting, clock)]
        refused = [r for r in turn if not _is_admissible(r, setting, clock)]
        if setting.order == "arrival" and len(taken) < batch_size:
            taken = []
        done = {r.index for r in (*taken, *refused)}
        waiting = [r for r in waiting if r.index not in done]
        steps.append(tuple(r.index for r in taken))
        stale.append(tuple(r.index for r in refused))
    return Consumption(tuple(steps), tuple(stale))


def _in_order(rollouts: Sequence[Rollout], order: Order) -> list[Rollout]:
    return sorted(rollouts, key=lambda r: (r.arrival, r.index) if order == "arrival" else (r.index, r.index))


def _delivered(waiting: Sequence[Rollout], setting: Setting, clock: int, batch_size: int) -> list[Rollout]:
    """What the step looks at: delivered rollouts in order, until it has `batch_size` that it may train."""
    turn: list[Rollout] = []
    num_admissible = 0
    for rollout in waiting:
        if num_admissible == batch_size:
            break
        if rollout.arrived_step + setting.lag <= clock:
            turn.append(rollout)
            num_admissible += _is_admissible(rollout, setting, clock)
    return turn


def _is_admissible(rollout: Rollout, setting: Setting, clock: int) -> bool:
    return setting.on_stale == "train" or clock - rollout.version_first <= setting.max_staleness


def arrived_steps(arrivals: Sequence[float], step_starts: Sequence[float]) -> list[int]:
    """For each arrival the first step that began at or after it; `step_starts` ascend, in the same unit."""
    return [bisect_left(step_starts, arrival) for arrival in arrivals]
