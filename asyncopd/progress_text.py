"""The progress of a run as a terminal panel and as one line for a log."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table

from asyncopd.config import RunConfig
from asyncopd.progress import WINDOW_S, Progress, RoleProgress
from asyncopd.summary_text import duration, number, percent
from asyncopd.types import Evaluation

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
