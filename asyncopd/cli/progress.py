"""How far a run is, as a terminal panel and as one line for a log: cheap enough to ask twice a second.

    RunView --refresh--> History --ProgressWatch.look--> Progress --> panel, plain_line

Tokens generated and scored, and their rates, are what the workers' heartbeats tell; tokens trained are those of the
surviving steps.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table

from asyncopd.config import RunConfig
from asyncopd.metrics import DRIFT, KL, LOSS
from asyncopd.records import Heartbeat, WorkerStatus
from asyncopd.report.measure import PIPELINE, staleness_of, trained_per_s
from asyncopd.report.summary import StalenessFigures
from asyncopd.report.text import duration, number, percent
from asyncopd.types import Evaluation
from storage.history import RECENT_STEPS, History, RunStatus, activity, doing, eta_s, is_alive, pace, role_of, status_of
from storage.run_view import RunView
from storage.runs import LaunchLog

SATURATED = 0.75
"""A role busy for less of the time waits itself, so no single one holds the others up. The workers' shares are of the
last ten seconds (asyncopd/worker.py)."""


@dataclass(frozen=True)
class Progress:
    """A run at one moment."""

    history: History
    status: RunStatus
    elapsed_s: float
    num_steps: int
    """Planned; of a replay that begins later, from its first step on."""
    tokens: Mapping[str, int]
    """`rollout`, `score`, `learn` -> response tokens done, as far as seen."""
    rates: Mapping[str, float | None]
    """The same roles -> tokens per second, as their workers tell, those trained over the last RECENT_STEPS; None where
    too little is known."""
    version: int | None
    staleness: StalenessFigures
    """Of the tokens of the last RECENT_STEPS."""
    eta_s: float | None
    """None while no shard is finished, and for a run that is stopped."""
    stopped: str | None
    """Why no step is being trained now although some are missing; None while the run goes on or is finished."""
    bottleneck: str | None
    """Which role holds the others up, in words; None while too little is known, and for a run that is stopped."""
    workers: Sequence[Heartbeat]
    """Those that did not retire, in the order of the pipeline."""
    silent_s: Mapping[str, float]
    """Worker that gives no signs of life any more -> seconds since its last."""

    @property
    def started(self) -> bool:
        """Has any role given a sign of life?"""
        return bool(self.workers or self.tokens)

    @property
    def pretraining(self) -> Sequence[Heartbeat]:
        """The workers that say how far the pre-training of a model is."""
        return [beat for beat in self.workers if beat.status.role == "pretrain" and beat.status.num_steps is not None]

    @property
    def failures(self) -> Sequence[str]:
        """`role: reason`, oldest first."""
        return [f"{failure.role}: {failure.reason}" for failure in self.history.failures]


class ProgressWatch:
    """Looks at one run again and again. One thread at a time."""

    def __init__(
        self,
        view: RunView,
        config: RunConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            config: of the run, which need not exist yet.
            clock: measures elapsed time; `wall_clock` is compared with the heartbeats' own time.
        """
        self._view, self._plan, self._lease_s = view, config.plan, config.limits.lease_s
        self._num_steps = config.learner.num_steps
        self._clock, self._wall_clock = clock, wall_clock
        self._began = clock()

    def look(self) -> Progress:
        """Read what is new and say where the run is. Raises StorageError when storage does not answer."""
        history = self._view.refresh().history
        steps, recent, now = history.steps, history.steps[-RECENT_STEPS:], self._wall_clock()
        workers = [beat for beat in history.workers if beat.status.role]
        silent_s = {b.worker: now - b.beaten for b in workers if not is_alive(b, lease_s=self._lease_s, now=now)}
        alive = [beat for beat in workers if beat.worker not in silent_s]
        tokens: Counter[str] = Counter()
        for beat in history.beats.values():
            # Also of those that retired: a worker that died was replaced by one that counts from 0 again.
            tokens[role_of(beat)] += beat.status.num_tokens or 0
        told = {role: [b.status.tokens_per_s for b in alive if role_of(b) == role] for role in PIPELINE}
        rates = {role: sum(filter(None, found)) or None for role, found in told.items()}
        if steps:
            # From the steps, not the heartbeats: exact also when the learner went back to a checkpoint.
            tokens["learn"] = sum(step.num_tokens for step in steps)
            rates["learn"] = trained_per_s(steps[-RECENT_STEPS - 1 :]) or rates["learn"]
        shares = {r: [b.status.busy for b in alive if role_of(b) == r and b.status.busy is not None] for r in PIPELINE}
        request = LaunchLog(self._view.store).find_request(self._view.run_id)
        status = status_of(history, self._num_steps, request, now)
        stopped = self._stopped(history, status, {role_of(beat) for beat in alive})
        return Progress(
            history=history,
            status=status,
            elapsed_s=self._clock() - self._began,
            num_steps=self._num_steps - history.first_step,
            tokens=tokens,
            rates=rates,
            version=steps[-1].version.number if steps else (0 if self._view.find_policy(0) else None),
            staleness=staleness_of(recent),
            eta_s=None if stopped else eta_s(history, self._plan),
            stopped=stopped,
            bottleneck=None if stopped else bottleneck(shares),
            workers=workers,
            silent_s=silent_s,
        )

    def _stopped(self, history: History, status: RunStatus, alive: Collection[str]) -> str | None:
        if status in ("paused", "cancelled", "failed"):
            reason = history.states[-1].reason if status == "failed" else ""
            return f"{status} ({reason})" if reason else status
        is_missing = status != "succeeded" and not history.is_trained(self._num_steps) and "learn" not in alive
        # Before its first step a run makes models, and the learner's process starts.
        return "no learner gives a sign of life" if history.steps and is_missing else None


def panel(progress: Progress, title: str, config: RunConfig) -> RenderableType:
    """Everything about a run at this moment, a dozen lines high.

    Args:
        title: rich markup.
    """
    if not progress.started:
        return Group(title, "  waiting for a worker to start the flow …")
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    for beat in progress.pretraining:
        lines.add_row("pretrain", _bar(beat.status.step or 0, beat.status.num_steps or 0, _pretrained(beat.status)))
    if progress.version is not None:
        done = len(progress.history.steps)
        text = f"step {done:,} of {progress.num_steps:,}, {_eta(progress)}"
        lines.add_row("train", _bar(done, progress.num_steps, text))
        lines.add_row("tokens", _tokens(progress))
        lines.add_row("policy", _policy(progress, config))
        lines.add_row("step", _losses(progress))
        lines.add_row("quality", _quality(progress.history.evaluations))
        if progress.bottleneck:
            lines.add_row("now", escape(progress.bottleneck))
    roles = Table.grid(padding=(0, 2))
    for beat in progress.workers:
        wanted, silent_s = beat.status.waiting_for, progress.silent_s.get(beat.worker)
        waits = f"[dim]next waits for {escape(wanted)}[/]" if wanted else ""
        note = f"[yellow]no sign of life for {silent_s:.0f} s[/]" if silent_s is not None else waits
        roles.add_row(f"[bold]{escape(role_of(beat))}[/]", escape(activity(beat.status)), note)
    if not progress.workers:
        roles.add_row("[dim]no role is running[/]")
    failures = [f"  [red]{escape(failure)}[/]" for failure in progress.failures[-2:]]
    return Group(title, Padding(lines, (0, 0, 0, 2)), Padding(roles, (0, 0, 0, 2)), *failures)


def plain_line(progress: Progress, config: RunConfig) -> str:
    """Where a run is, in one line for a log."""
    if not progress.started:
        told = "waiting for a worker to start the flow"
    elif progress.pretraining:
        told = "; ".join(f"pretrain {_pretrained(beat.status)}" for beat in progress.pretraining)
    elif progress.version is None:
        told = " | ".join(map(doing, progress.workers)) or "its role processes are starting"
    else:
        reached = f"step {len(progress.history.steps)} of {progress.num_steps}, {_eta(progress)}"
        pieces = [reached, *map(doing, progress.workers)]
        if progress.history.steps:
            now = [f"{role_of(beat)} {beat.status.doing}" for beat in progress.workers if beat.status.doing]
            measured = [_policy(progress, config), _losses(progress), _quality(progress.history.evaluations)]
            pieces = [reached, *now, _tokens(progress), *measured]
        told = " | ".join(pieces)
    return f"[{progress.elapsed_s:6.1f} s] {told}"


# -- pieces -------------------------------------------------------------------------------------------------------
def _pretrained(status: WorkerStatus) -> str:
    done = f"step {status.step or 0:,} of {status.num_steps or 0:,}"
    return f"{status.model}: {done}, loss {_nats(status.loss_nats)}"


def _bar(done: int, total: int, text: str) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=max(1, total), completed=done, width=30), text)
    return row


def _eta(progress: Progress) -> str:
    if progress.stopped:
        return f"not going on: {progress.stopped}"
    return "time left not known yet" if progress.eta_s is None else f"{duration(progress.eta_s)} left"


def _tokens(progress: Progress) -> str:
    made, scored, trained = (pace(progress.rates.get(role)) for role in PIPELINE)
    samplers = [beat.status for beat in progress.workers if role_of(beat) == "rollout"]
    begun, in_flight = (sum(getattr(s, name) or 0 for s in samplers) for name in ("num_begun", "num_tokens_in_flight"))
    held = f", {in_flight:,} in flight in {begun:,} responses begun" if in_flight or begun else ""
    return f"generated {made} tokens/s{held}, scored {scored} tokens/s, trained {trained} tokens/s"


def _policy(progress: Progress, config: RunConfig) -> str:
    mean, oldest = number(progress.staleness.mean_versions, ".2f"), number(progress.staleness.max_versions, "d")
    staleness = config.staleness
    bound = f"{staleness.max_staleness} allowed" if staleness.on_stale != "train" else "unbounded"
    left_out = ""
    for what in ("dropped", "held"):
        if reasons := [reason for step in progress.history.steps for reason in getattr(step, what).values()]:
            left_out += f", {len(reasons):,} {what} ({', '.join(sorted(set(reasons)))})"
    return f"version {number(progress.version, 'd')}, staleness {mean} mean, {oldest} max of {bound}{left_out}"


def _losses(progress: Progress) -> str:
    metrics = progress.history.steps[-1].metrics if progress.history.steps else {}
    loss, kl, drift = (metrics.get(metric.key) for metric in (LOSS, KL, DRIFT))
    return f"loss {_nats(loss)}, KL to teacher {_nats(kl)}, drift {_nats(drift, '.5f')}"


def _quality(evaluations: Sequence[Evaluation]) -> str:
    told = []
    for evaluation in (*evaluations[:1], *evaluations[1:][-1:]):
        accuracy = "" if math.isnan(evaluation.accuracy) else f"accuracy {percent(evaluation.accuracy)}, "
        told.append(f"{accuracy}KL {_nats(evaluation.kl_nats)} at version {evaluation.version.number}")
    return " -> ".join(told) or "not evaluated yet"


def _nats(value: float | None, form: str = ".4f") -> str:
    return f"{number(value, form)} nats"


def bottleneck(shares: Mapping[str, Sequence[float]]) -> str | None:
    """The bottleneck of a run in one sentence; None while fewer than two of rollout, score and learn are known.

    Args:
        shares: role -> busy share of each of its workers, 0 to 1.
    """
    busy = {role: statistics.fmean(shares[role]) for role in PIPELINE if shares.get(role)}
    if len(busy) < 2:
        return None
    first, *others = sorted(busy, key=lambda role: busy[role], reverse=True)
    if busy[first] < SATURATED:
        told = ", ".join(f"{role} is busy {busy[role]:.0%}" for role in (first, *others))
        return f"no role is the bottleneck, they wait for each other: {told} of the last seconds"
    waiting = [role for role in others if busy[role] < SATURATED]
    if not waiting:
        return f"{first} and {' and '.join(others)} are busy all the time: nothing waits, the machine is the bottleneck"
    told = ", ".join(f"{role} {busy[role]:.0%}" for role in (first, *others))
    verb = "waits" if len(waiting) == 1 else "wait"
    return f"{first} is the bottleneck: {' and '.join(waiting)} {verb} for it (busy: {told})"
