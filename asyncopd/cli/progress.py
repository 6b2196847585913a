"""How far a run is, folded from storage as it grows: cheap enough to ask twice a second, and harmless to the run.

heartbeats --> totals per role, what each role does or waits for        (few, overwritten in place)
steps      --> one read per new step; a rewind takes steps back again
evaluations, failures --> listed every few looks

The progress of a run as a terminal panel and as one line for a log.

Which role holds the others up now, from how busy each says it is.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table

from asyncopd.config import RunConfig
from asyncopd.ports import RunHistory
from asyncopd.report.text import duration, number, percent
from asyncopd.types import Evaluation, Heartbeat, TrainStep

WINDOW_S = 5.0
"""Over which rates are averaged; several shards of the quickstart."""
_RECENT_STEPS = 20
_OBSERVATIONS_EVERY = 4
"""Looks between listings of evaluations and failures."""
_SILENT_HEARTBEATS = 4.0
"""Heartbeat intervals after which a worker is called silent."""


@dataclass(frozen=True)
class RoleProgress:
    """One worker that is alive, or was a moment ago."""

    role: str
    worker: str
    status: Mapping[str, Any]
    """As its heartbeat tells it."""
    silent_s: float
    """Seconds since its last heartbeat when that is too long, else 0."""

    @property
    def waiting_for(self) -> str | None:
        """What its next piece of work needs; the present one may go on beside the wait."""
        return self.status.get("waiting_for")


@dataclass(frozen=True)
class Progress:
    """A run at one moment."""

    elapsed_s: float
    num_steps_done: int
    last_step: TrainStep | None
    tokens: Mapping[str, int]
    """`rollout`, `score`, `learn` -> response tokens done, as far as seen."""
    rates: Mapping[str, float | None]
    """The same roles -> tokens per second over the last WINDOW_S; None before two looks."""
    version: int | None
    staleness_mean: float | None
    """Versions, over the tokens of the last steps."""
    staleness_max: int | None
    dropped: Mapping[str, int]
    """Reason -> trajectories of the steps so far that were not trained and never will be."""
    held: Mapping[str, int]
    """Reason -> trajectories of the steps so far that were kept untrained."""
    eta_s: float | None
    """None while too few steps are known, and for a run that is stopped."""
    stopped: str | None
    """Why no step is being trained now although some are missing; None while the run goes on or is finished."""
    bottleneck: str | None
    """Which role holds the others up, in words; None while too little is known, and for a run that is stopped."""
    evaluations: tuple[Evaluation, ...]
    roles: tuple[RoleProgress, ...]
    failures: tuple[str, ...]
    """`role: reason`, oldest first."""

    @property
    def started(self) -> bool:
        """Has any role given a sign of life?"""
        return bool(self.roles or self.tokens or self.last_step)


@dataclass
class _Totals:
    """Token counts by worker, kept after a worker retires and its status is gone."""

    by_worker: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, worker: str, role: str, num_tokens: int) -> None:
        self.by_worker[worker] = (role, num_tokens)

    def by_role(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for role, num_tokens in self.by_worker.values():
            totals[role] = totals.get(role, 0) + num_tokens
        return totals


class ProgressWatch:
    """Looks at one run again and again. One thread at a time."""

    def __init__(
        self,
        log: RunHistory,
        *,
        num_steps: int,
        heartbeat_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            num_steps: planned for the run.
            heartbeat_s: of its workers.
            clock: measures rates and elapsed time; `wall_clock` is compared with the heartbeats' own time.
        """
        self._log, self._num_steps, self._heartbeat_s = log, num_steps, heartbeat_s
        self._clock, self._wall_clock = clock, wall_clock
        self._began = clock()
        self._steps: list[TrainStep] = []
        self._num_rewinds = 0
        self._totals = _Totals()
        self._history: deque[tuple[float, dict[str, int]]] = deque()
        self._evaluations: tuple[Evaluation, ...] = ()
        self._failures: tuple[str, ...] = ()
        self._num_looks = 0

    def look(self, *, thorough: bool = False) -> Progress:
        """Read what is new and say where the run is.

        Args:
            thorough: list evaluations and failures too, which most looks skip; for a last look.
        Raises:
            StorageError: storage does not answer.
        """
        self._read_steps()
        roles = self._read_heartbeats()
        if thorough or self._num_looks % _OBSERVATIONS_EVERY == 0:
            self._evaluations = tuple(self._log.evaluations())
            self._failures = tuple(f"{failure.role}: {failure.reason}" for failure in self._log.failures())
        self._num_looks += 1
        tokens = self._totals.by_role()
        if self._steps:
            # From the steps, not the heartbeats: exact also when the learner went back to a checkpoint.
            tokens["learn"] = sum(step.num_tokens for step in self._steps)
        recent = self._steps[-_RECENT_STEPS:]
        ages = [(age, count) for step in recent for age, count in step.staleness_tokens.items()]
        latest = self._log.latest_policy()
        stopped = self._stopped(roles)
        return Progress(
            elapsed_s=self._clock() - self._began,
            num_steps_done=len(self._steps),
            last_step=self._steps[-1] if self._steps else None,
            tokens=tokens,
            rates=self._rates(tokens),
            version=latest.number if latest else None,
            staleness_mean=sum(a * n for a, n in ages) / sum(n for _, n in ages) if ages else None,
            staleness_max=max((age for age, _ in ages), default=None),
            dropped=Counter(reason for step in self._steps for reason in step.dropped.values()),
            held=Counter(reason for step in self._steps for reason in step.held.values()),
            eta_s=None if stopped else self._eta_s(recent),
            stopped=stopped,
            bottleneck=None if stopped else _bottleneck(roles),
            evaluations=self._evaluations,
            roles=roles,
            failures=self._failures,
        )

    def _read_steps(self) -> None:
        rewinds = self._log.rewinds()
        for rewind in rewinds[self._num_rewinds :]:
            del self._steps[rewind.to_step :]
        self._num_rewinds = len(rewinds)
        while (step := self._log.find_step(len(self._steps))) is not None:
            self._steps.append(step)

    def _read_heartbeats(self) -> tuple[RoleProgress, ...]:
        roles = []
        for worker, beat in self._log.heartbeats().items():
            role = beat.status.get("role", worker.partition("-")[0])
            if "num_tokens" in beat.status:
                self._totals.add(worker, role, int(beat.status["num_tokens"]))
            if not beat.retired and beat.status:
                roles.append(RoleProgress(role, worker, beat.status, self._silent_s(beat)))
        return tuple(sorted(roles, key=lambda r: (r.role, r.worker)))

    def _stopped(self, roles: tuple[RoleProgress, ...]) -> str | None:
        if len(self._steps) >= self._num_steps:
            return None
        state = self._log.run_state()
        if state is not None and state.ended:
            return f"{state.state} ({state.reason})" if state.reason else state.state
        alive = {worker.role for worker in roles if not worker.silent_s}
        # Before its first step a run makes models, and the learner's process starts.
        return "no learner gives a sign of life" if self._steps and "learn" not in alive else None

    def _silent_s(self, beat: Heartbeat) -> float:
        age_s = self._wall_clock() - beat.beaten
        return age_s if age_s > _SILENT_HEARTBEATS * self._heartbeat_s else 0.0

    def _rates(self, tokens: dict[str, int]) -> dict[str, float | None]:
        now = self._clock()
        self._history.append((now, tokens))
        while len(self._history) > 2 and now - self._history[1][0] >= WINDOW_S:
            self._history.popleft()
        then, before = self._history[0]
        if now <= then:
            return dict.fromkeys(tokens)
        # A rewind takes trained tokens back; a negative rate would only confuse.
        return {role: max(0.0, (total - before.get(role, 0)) / (now - then)) for role, total in tokens.items()}

    def _eta_s(self, recent: list[TrainStep]) -> float | None:
        left = self._num_steps - len(self._steps)
        gaps = [after.finished - before.finished for before, after in itertools.pairwise(recent)]
        if left <= 0:
            return 0.0
        # The median, because a resumed run has one gap that is hours long.
        return left * statistics.median(gaps) if gaps else None


def _bottleneck(roles: tuple[RoleProgress, ...]) -> str | None:
    shares: dict[str, list[float]] = {}
    for worker in roles:
        if not worker.silent_s and "busy" in worker.status:
            shares.setdefault(worker.role, []).append(worker.status["busy"])
    return bottleneck(shares)


_ROLES = ("pretrain", "rollout", "score", "learn", "evaluate")
_VERBS = {"rollout": "generated", "score": "scored", "learn": "trained"}


def panel(progress: Progress, title: str, config: RunConfig) -> RenderableType:
    """Everything about a run at this moment, a dozen lines high.

    Args:
        title: rich markup.
    """
    if not progress.started:
        return Group(title, "  waiting for a worker to start the flow …")
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    for worker in progress.roles:
        if is_pretraining(worker):
            bar = _bar(worker.status["step"], worker.status["num_steps"], _pretrained(worker))
            lines.add_row("pretrain", bar)
    if progress.last_step or progress.version is not None:
        total = config.learner.num_steps
        text = f"step {progress.num_steps_done:,} of {total:,}, {_eta(progress)}"
        lines.add_row("train", _bar(progress.num_steps_done, total, text))
        if any(rate is not None for rate in progress.rates.values()):
            lines.add_row("tokens", _tokens(progress))
        lines.add_row("policy", _policy(progress, config))
        lines.add_row("step", _losses(progress))
        lines.add_row("quality", _quality(progress))
        if progress.bottleneck:
            lines.add_row("now", escape(progress.bottleneck))
    roles = Table.grid(padding=(0, 2))
    for worker in sorted(progress.roles, key=_role_order):
        waits = f"[dim]next waits for {escape(worker.waiting_for)}[/]" if worker.waiting_for else ""
        silent = f"[yellow]no sign of life for {worker.silent_s:.0f} s[/]" if worker.silent_s else ""
        roles.add_row(f"[bold]{escape(worker.role)}[/]", escape(activity(worker)), silent or waits)
    if not progress.roles:
        roles.add_row("[dim]no role is running[/]")
    failures = [f"  [red]{escape(failure)}[/]" for failure in progress.failures[-2:]]
    return Group(title, Padding(lines, (0, 0, 0, 2)), Padding(roles, (0, 0, 0, 2)), *failures)


def plain_line(progress: Progress, config: RunConfig) -> str:
    """Where a run is, in one line for a log."""
    time_shown = f"[{progress.elapsed_s:6.1f} s]"
    if not progress.started:
        return f"{time_shown} waiting for a worker to start the flow"
    pretraining = [worker for worker in progress.roles if is_pretraining(worker)]
    if pretraining:
        return f"{time_shown} " + "; ".join(f"pretrain {_pretrained(worker)}" for worker in pretraining)
    if progress.version is None and progress.last_step is None:
        return f"{time_shown} " + ("; ".join(map(_doing, progress.roles)) or "starting")
    parts = [
        f"step {progress.num_steps_done} of {config.learner.num_steps}, {_eta(progress)}",
        _tokens(progress),
        _policy(progress, config),
        _losses(progress),
        _quality(progress),
    ]
    return f"{time_shown} " + " | ".join(parts)


def activity(worker: RoleProgress) -> str:
    """What a worker does, from its heartbeat."""
    status = worker.status
    match worker.role:
        case "rollout":
            return f"samples with version {status.get('version')}, {status.get('num_trajectories', 0):,} responses"
        case "score":
            return f"scores with {status.get('teacher')}, {status.get('num_trajectories', 0):,} responses"
        case "learn" if "step" in status:
            return f"step {status['step']} of {status['num_steps']}"
        case "evaluate":
            last = status.get("version")
            return "no version evaluated yet" if last is None else f"version {last} evaluated"
        case "pretrain" if "model" in status:
            return f"makes the {status['model']}"
    return "starting"


# -- pieces -------------------------------------------------------------------------------------------------------
def is_pretraining(worker: RoleProgress) -> bool:
    """Does its heartbeat say how far the pre-training of a model is?"""
    return worker.role == "pretrain" and "num_steps" in worker.status


def _pretrained(worker: RoleProgress) -> str:
    status = worker.status
    loss = _nats(status.get("loss_nats"))
    return f"{status['model']}: step {status['step']:,} of {status['num_steps']:,}, loss {loss}"


def _bar(done: int, total: int, text: str) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=max(1, total), completed=done, width=30), text)
    return row


def _eta(progress: Progress) -> str:
    if progress.stopped:
        return f"not going on: {progress.stopped}"
    return "time left not known yet" if progress.eta_s is None else f"{duration(progress.eta_s)} left"


def _tokens(progress: Progress) -> str:
    rates = [f"{_VERBS[role]} {number(progress.rates.get(role), ',.0f')}" for role in _VERBS]
    return f"{', '.join(rates)} tokens/s (last {WINDOW_S:.0f} s)"


def _policy(progress: Progress, config: RunConfig) -> str:
    mean, oldest = number(progress.staleness_mean, ".2f"), number(progress.staleness_max, "d")
    staleness = config.staleness
    bound = f"{staleness.max_staleness} allowed" if staleness.on_stale != "train" else "any age"
    left_out = [
        f", {sum(reasons.values()):,} {what} ({', '.join(sorted(reasons))})"
        for what, reasons in (("dropped", progress.dropped), ("held", progress.held))
        if reasons
    ]
    return f"version {number(progress.version, 'd')}, staleness {mean} mean, {oldest} max of {bound}{''.join(left_out)}"


def _losses(progress: Progress) -> str:
    metrics = progress.last_step.metrics if progress.last_step else {}
    loss, kl, drift = (metrics.get(f"train/{key}_nats") for key in ("loss", "kl", "drift"))
    return f"loss {_nats(loss)}, KL to teacher {_nats(kl)}, drift {_nats(drift, '.5f')}"


def _quality(progress: Progress) -> str:
    known = progress.evaluations
    if not known:
        return "not evaluated yet"
    chosen = known[:1] if len(known) == 1 else (known[0], known[-1])
    return " -> ".join(map(_evaluated, chosen))


def _evaluated(evaluation: Evaluation) -> str:
    accuracy = "" if math.isnan(evaluation.accuracy) else f"accuracy {percent(evaluation.accuracy)}, "
    return f"{accuracy}KL {_nats(evaluation.kl_nats)} at version {evaluation.version.number}"


def _doing(worker: RoleProgress) -> str:
    waits = f", waits for {worker.waiting_for}" if worker.waiting_for else ""
    return f"{worker.role}: {activity(worker)}{waits}"


def _nats(value: float | None, form: str = ".4f") -> str:
    return f"{number(value, form)} nats"


def _role_order(worker: RoleProgress) -> tuple[int, str]:
    return (_ROLES.index(worker.role) if worker.role in _ROLES else len(_ROLES), worker.worker)


SATURATED = 0.75
"""A role busy for less of the time waits itself, so no single one holds the others up. The workers' shares are of the
last ten seconds (asyncopd/worker.py)."""
_STAGES = ("rollout", "score", "learn")


def bottleneck(shares: Mapping[str, Sequence[float]]) -> str | None:
    """The bottleneck of a run in one sentence; None while fewer than two of rollout, score and learn are known.

    Args:
        shares: role -> busy share of each of its workers, 0 to 1.
    """
    busy = {role: sum(shares[role]) / len(shares[role]) for role in _STAGES if shares.get(role)}
    if len(busy) < 2:
        return None
    first, *others = sorted(busy, key=lambda role: busy[role], reverse=True)
    if busy[first] < SATURATED:
        told = ", ".join(f"{role} is busy {busy[role]:.0%}" for role in (first, *others))
        return f"no role is the bottleneck, they wait for each other: {told} of the last seconds"
    waiting = [role for role in others if busy[role] < SATURATED]
    if not waiting:
        return f"{first} and {' and '.join(others)} are busy all the time: nothing waits, the machine is the bottleneck"
    shown = ", ".join(f"{role} {busy[role]:.0%}" for role in others)
    verb = "waits" if len(waiting) == 1 else "wait"
    told = f"(busy: {first} {busy[first]:.0%}, {shown})"
    return f"{first} is the bottleneck: {' and '.join(waiting)} {verb} for it {told}"
