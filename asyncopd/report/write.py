"""Writes the report of a run into a folder: figures, Markdown, plots and a trace.

    Observations --measure--> Summary --> report.md, summary.json
         +------------------------------> *.png, trace.json

Nothing here reads storage or talks to Prefect: flows/report.py does the first, flows/train.py the second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncopd.config import RunConfig
from asyncopd.report.measure import Observations, by_worker, is_busy, is_orchestration, is_wait, measure, packed
from asyncopd.report.plots import plot_lengths, plot_quality, plot_staleness, plot_training
from asyncopd.report.summary import Summary
from asyncopd.report.text import to_markdown, with_plots
from asyncopd.report.timeline import plot_timeline
from asyncopd.types import Evaluation, Span


@dataclass(frozen=True)
class Report:
    """The report of a run, also on disk."""

    markdown: str
    """Without the plots, which the file report.md shows as well."""
    table: list[dict[str, Any]]
    """One row per evaluation, JSON values only; a single row with the reason when there are none."""
    summary: Summary
    folder: Path


def write_report(seen: Observations, config: RunConfig, folder: Path) -> Report:
    """Write report.md, summary.json, trace.json and the plots into `folder`, replacing earlier ones.

    Works on a run that is still going on or that stopped half-way; the report then says what is missing.
    """
    summary = measure(seen, config)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "Accuracy and KL to the teacher": ("quality.png", plot_quality(seen)),
        "Timeline of the roles": ("timeline.png", plot_timeline(seen)),
        "Training curves": ("training.png", plot_training(seen.steps)),
        "Staleness": ("staleness.png", plot_staleness(seen.steps, summary.max_staleness)),
        "Response lengths": ("lengths.png", plot_lengths(seen.responses)),
    }
    for name, picture in plots.values():
        (folder / name).write_bytes(picture)
    markdown = to_markdown(summary, str(folder))
    captions = {caption: name for caption, (name, _) in plots.items()}
    (folder / "report.md").write_text(with_plots(markdown, captions), encoding="utf-8")
    (folder / "summary.json").write_text(summary.to_json(), encoding="utf-8")
    (folder / "trace.json").write_text(to_trace(seen.spans, seen.run_id, seen.epoch), encoding="utf-8")
    return Report(markdown=markdown, table=_table(seen, summary), summary=summary, folder=folder)


def _table(seen: Observations, summary: Summary) -> list[dict[str, Any]]:
    rows = [_row(evaluation, seen.published_s(evaluation.version.number)) for evaluation in seen.evaluations]
    return rows or [{"evaluations": "none", "reason": next((n for n in summary.notes if "evaluations" in n), "")}]


def _row(evaluation: Evaluation, published_s: float | None) -> dict[str, Any]:
    """Percentages and nats, rounded for reading; None for what was not measured."""
    groups = {f"accuracy {group} %": 100 * value for group, value in evaluation.accuracy_by_group.items()}
    figures = {
        "wall s": math.nan if published_s is None else published_s,
        "accuracy %": 100 * evaluation.accuracy,
        **groups,
        "KL nats": evaluation.kl_nats,
        "KL s.e. nats": evaluation.kl_standard_error_nats,
        "response tokens": evaluation.mean_response_tokens,
    }
    rounded = {name: round(value, 4) if math.isfinite(value) else None for name, value in figures.items()}
    return {"version": evaluation.version.number, **rounded}


ROLES = ("learn", "score", "rollout", "evaluate", "pretrain")
"""Top to bottom as Perfetto shows them; roles not named come last."""
_TRACKS: tuple[tuple[str, Callable[[Span], bool]], ...] = (
    ("", is_busy),
    (" waiting", is_wait),
    (" overhead", is_orchestration),
)


def to_trace(spans: Sequence[Span], run_id: str, epoch: float) -> str:
    """The timeline in the Chrome trace-event format, which https://ui.perfetto.dev and chrome://tracing open.

    A process is a role, a thread one track of a worker: its work, what it waits for, overhead of the platform. Events
    of one thread must not overlap, but a worker's do: they are put on as many threads as that needs. Times are
    microseconds after `epoch` (Unix seconds).
    """
    events: list[dict[str, Any]] = []
    roles = sorted({span.role for span in spans}, key=lambda r: (ROLES.index(r) if r in ROLES else len(ROLES), r))
    thread = 0
    for process, role in enumerate(roles, start=1):
        events += _named("process", process, 0, role, process)
        for worker, own in by_worker(span for span in spans if span.role == role).items():
            for title, belongs in _TRACKS:
                for number, track in enumerate(packed([span for span in own if belongs(span)]), start=1):
                    thread += 1
                    name = f"{worker}{title}" + (f" {number}" if number > 1 else "")
                    events += _named("thread", process, thread, name, thread)
                    events += (_complete(span, process, thread, epoch) for span in track)
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"run_id": run_id, "epoch_unix_s": epoch}}
    return json.dumps(trace, ensure_ascii=False)


def _complete(span: Span, process: int, thread: int, epoch: float) -> dict[str, Any]:
    # Both ends rounded, not the duration: events that follow one another must not come to overlap.
    start, end = (round((moment - epoch) * 1e6) for moment in (span.start, span.end))
    return {
        "ph": "X",
        "name": span.activity,
        "cat": span.activity.partition(":")[0],
        "pid": process,
        "tid": thread,
        "ts": start,
        "dur": end - start,
        "args": {"detail": span.detail},
    }


def _named(what: str, process: int, thread: int, name: str, order: int) -> Iterable[dict[str, Any]]:
    """Metadata events that name and order a process or thread."""
    place = {"ph": "M", "pid": process, "tid": thread}
    yield {**place, "name": f"{what}_name", "args": {"name": name}}
    yield {**place, "name": f"{what}_sort_index", "args": {"sort_index": order}}
