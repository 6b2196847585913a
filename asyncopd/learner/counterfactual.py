"""Which rollouts of a log each learner step would have consumed under another staleness, and what it then measures.

    parent's clock j --(+ lag)--> deliverable at clock j + lag --order--> step k = clock k takes up to B of them
                                                                  `-- over the bound: train | drop | hold

The clock counts learner versions. A rollout is there at the first step of the parent that began after its scores had
appeared. Arrival order takes the first that are there; index order takes batch after batch, one per clock, and waits
until all of the next one is there. Consumed d steps later than in the parent, a rollout is d versions staler.
Generation cannot be re-ordered: the rollouts are those that the parent's policies made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, count

import numpy as np

from asyncopd.config.requests import CounterfactualRequest
from asyncopd.errors import ConfigError, NonFiniteError
from asyncopd.learner.statistics import staleness_tokens
from asyncopd.learner.student import Student
from asyncopd.metrics import DRIFT, ESS, GRAD_NORM, LOSS, Metric
from asyncopd.schedule import OnStale, Order
from asyncopd.types import ScoredTrajectory


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


@dataclass(frozen=True)
class StepFigures:
    """One step of a counterfactual."""

    clock: int
    """Learner version that the step starts from."""
    num_tokens: int
    staleness_tokens: Mapping[int, int]
    """Staleness in versions -> trained tokens that had it."""
    metrics: Mapping[str, float]
    """As in a TrainStep."""


@dataclass(frozen=True)
class Cell(Setting):
    """What a replayed learner measured under one setting, over the measured clocks; means are over trained tokens."""

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
    if log.order == "index":
        return
    undefined = []
    if log.num_stale + log.num_filtered and any(setting.order == "index" for setting in settings):
        undefined.append("order index")
    if log.num_stale and any(setting.on_stale == "train" for setting in settings):
        undefined.append("on stale train")
    if undefined:
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
        taken = [r.index for r in turn if trains and r.version_oldest >= oldest]
        refused = [r.index for r in turn if r.version_oldest < oldest]
        done = {*taken, *refused}
        waiting = [r for r in waiting if r.index not in done]
        steps.append(tuple(taken))
        stale.append(tuple(refused))
    return Consumption(tuple(steps), tuple(stale))


def arrived_steps(arrivals: Sequence[float], step_starts: Sequence[float]) -> list[int]:
    """For each arrival the first step that began at or after it; `step_starts` ascend, in the same unit."""
    return [bisect_left(step_starts, arrival) for arrival in arrivals]


def whole_batches(indices: Collection[int], batch_size: int) -> int:
    """How many batches of consecutive indices, from index 0 on, `indices` holds every index of."""
    known = set(indices)
    return next(k for k in count() if not known.issuperset(range(k * batch_size, (k + 1) * batch_size)))


# -- what a learner then measures ---------------------------------------------------------------------------------
def train_in_order(
    student: Student,
    steps: Mapping[int, Sequence[int]],
    *,
    read: Callable[[int], ScoredTrajectory],
    on_step: Callable[[], None],
) -> list[StepFigures]:
    """One optimizer step per clock that has something to train. Ends early at a step whose loss is not finite.

    Args:
        student: in the state of the first clock.
        steps: clock -> indices to train, by ascending clock.
        read: index -> its trajectory with scores.
        on_step: called after every clock.
    """
    figures: list[StepFigures] = []
    for clock, indices in steps.items():
        if indices:
            batch = [read(index) for index in indices]
            try:
                result = student.train(clock, batch)
            except NonFiniteError:
                return figures
            ages = staleness_tokens(batch, learner_version=clock)
            figures.append(StepFigures(clock, result.num_tokens, ages, result.metrics))
        on_step()
    return figures


def measure(
    setting: Setting, consumption: Consumption, figures: Sequence[StepFigures], log: Log, *, measured_from: int
) -> Cell:
    """Token means over the measured clocks; waste as a share of the tokens whose turn came."""
    seen = [step for step in figures if step.clock >= measured_from]
    weights = np.array([step.num_tokens for step in seen], np.float64)
    ages = sum((Counter(step.staleness_tokens) for step in seen), Counter[int]())
    tokens = {rollout.index: rollout.num_tokens for rollout in log.rollouts}

    def mean(metric: Metric) -> float:
        return float(np.average([step.metrics[metric.key] for step in seen], weights=weights)) if seen else float("nan")

    clocks = range(measured_from, log.num_clocks)
    expected = [clock for clock in clocks if consumption.steps[clock]]
    return Cell(
        **asdict(setting),
        num_steps=len(seen),
        num_idle=len(clocks) - len(expected),
        is_finite=len(seen) == len(expected),
        staleness_mean=float(np.average(list(ages), weights=list(ages.values()))) if ages else float("nan"),
        staleness_max=max(ages, default=0),
        loss_nats=mean(LOSS),
        drift_nats=mean(DRIFT),
        ess_fraction=mean(ESS),
        grad_norm=mean(GRAD_NORM),
        num_tokens=int(weights.sum()),
        num_tokens_wasted=sum(tokens[index] for clock in clocks for index in consumption.stale[clock]),
    )
