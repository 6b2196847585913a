"""Which rollouts of a log each learner step would have consumed under another staleness: pure functions of the log.

    parent's clock j --(+ lag)--> deliverable at clock j + lag --order--> step k = clock k takes up to B of them
                                                                  `-- over the bound: train | drop | hold

The clock counts learner versions. A rollout is there at the first step of the parent that began after its scores had
appeared. Arrival order takes the first that are there; index order takes batch after batch, one per clock, and waits
until all of the next one is there. Consumed d steps later than in the parent, a rollout is d versions staler.
Generation cannot be re-ordered: the rollouts are those that the parent's policies made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

from asyncopd.config.requests import CounterfactualRequest
from asyncopd.errors import ConfigError
from asyncopd.schedule import OnStale, Order


@dataclass(frozen=True)
class Rollout:
    """What consumption depends on of one index."""

    index: int
    step: int
    """The parent's step that trained it, or, in order arrival, found it too stale."""
    arrived_step: int
    """The parent's first step that began after its scores had appeared; at most `step`."""
    arrival: float
    """Its place among the rollouts of the log in the order in which the parent came to them, or would have come."""
    version_oldest: int
    """The oldest version that produced a token of it."""
    num_tokens: int
    is_trained: bool = True
    """False for what the parent dropped or held as too stale."""


@dataclass(frozen=True)
class Log:
    """What a counterfactual needs of a log that was trained."""

    run_id: str
    order: Order
    """In which the parent consumed it."""
    batch_size: int
    num_clocks: int
    """Steps that the parent trained."""
    rollouts: Sequence[Rollout]
    """Every scored rollout that the parent's steps decided about."""
    num_batches: int
    """Whole batches of consecutive indices, from index 0 on, that are among them."""
    num_filtered: int = 0
    """Indices that they decided about and that have no scores, because a stage dropped them."""

    @property
    def recorded_staleness(self) -> int:
        """The largest that the parent trained, in versions."""
        return max(r.step - r.version_oldest for r in self.rollouts if r.is_trained)

    @property
    def num_stale(self) -> int:
        """Rollouts that the parent dropped or held as too stale."""
        return sum(not rollout.is_trained for rollout in self.rollouts)


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


def settings_of(asked: CounterfactualRequest, *, recorded_staleness: int) -> list[Setting]:
    """All combinations. The lag makes the log as stale as each bound allows, unless one lag is asked for.

    Args:
        recorded_staleness: the log's own largest, in versions.
    """
    return [
        Setting(bound, max(0, bound - recorded_staleness) if asked.lag is None else asked.lag, order, policy)
        for bound in asked.staleness
        for order in asked.order
        for policy in asked.on_stale
    ]


def check_defined(settings: Sequence[Setting], log: Log) -> None:
    """Refuse settings that no bound describes on this log.

    A log of order arrival in which something was left untrained holds more than a batch per step, because later
    rollouts made up for it. A learner that takes one batch per step and leaves nothing out falls behind such a log for
    ever: its staleness grows with the length of the log, which no admission rule would have let happen.

    Raises:
        ConfigError: names the settings, how much was left untrained, and what can be asked.
    """
    undefined = []
    if log.num_stale + log.num_filtered and any(setting.order == "index" for setting in settings):
        undefined.append("order index")
    if log.num_stale and any(setting.on_stale == "train" for setting in settings):
        undefined.append("on stale train")
    if undefined and log.order == "arrival":
        raise ConfigError(
            f"{' and '.join(undefined)}: run {log.run_id} consumed its log in order arrival and left {log.num_stale} "
            f"stale and {log.num_filtered} filtered rollouts untrained, which later ones made up for. A learner that "
            "takes batch after batch, or leaves nothing out, falls further behind such a log with every step, whatever "
            f"the bound. Ask for --order arrival{' --on-stale drop,hold' if log.num_stale else ''}, or about a run "
            "that left nothing out."
        )


def consume(log: Log, setting: Setting) -> Consumption:
    """Run the learner's side of the log under another setting, from clock 0.

    In index order clock k's step trains what is admissible of the next batch, once all of it is there; in arrival order
    it takes the first `batch_size` admissible rollouts that are there. Until then it does not train.
    """
    size, is_arrival = log.batch_size, setting.order == "arrival"
    # A batch of which the log has only a part is never all there.
    known = [r for r in log.rollouts if is_arrival or r.index < log.num_batches * size]
    waiting = sorted(known, key=lambda r: (r.arrival if is_arrival else 0.0, r.index))
    steps: list[tuple[int, ...]] = []
    stale: list[tuple[int, ...]] = []
    for clock in range(log.num_clocks):
        oldest = float("-inf") if setting.on_stale == "train" else clock - setting.max_staleness
        if is_arrival:
            # What the step looks at: until it has a batch that it may train, or everything that is there.
            there = [r for r in waiting if r.arrived_step + setting.lag <= clock]
            admissible = list(accumulate(r.version_oldest >= oldest for r in there))
            turn = there[: bisect_left(admissible, size) + 1]
            trains = bool(admissible) and admissible[-1] >= size
        else:
            batch = [r for r in waiting if r.index // size == waiting[0].index // size]
            trains = all(r.arrived_step + setting.lag <= clock for r in batch)
            turn = batch if trains else []
        steps.append(tuple(r.index for r in turn if trains and r.version_oldest >= oldest))
        stale.append(tuple(r.index for r in turn if r.version_oldest < oldest))
        done = {*steps[-1], *stale[-1]}
        waiting = [r for r in waiting if r.index not in done]
    return Consumption(tuple(steps), tuple(stale))


def whole_batches(indices: Collection[int], batch_size: int) -> int:
    """How many batches of consecutive indices, from index 0 on, `indices` holds every index of."""
    known = set(indices)
    return next(k for k in count() if not known.issuperset(range(k * batch_size, (k + 1) * batch_size)))
