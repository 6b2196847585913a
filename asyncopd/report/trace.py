"""The timeline of a run in the Chrome trace-event format, which https://ui.perfetto.dev and chrome://tracing open.

    process = role, thread = track of one worker: its work, what it waits for, overhead of the platform

Events of one thread must not overlap, but a worker's lanes do: they are put on as many threads as that needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from asyncopd.report.intervals import by_worker, is_busy, is_orchestration, is_wait, packed
from asyncopd.types import Span

ROLES = ("learn", "score", "rollout", "evaluate", "pretrain")
"""Top to bottom as Perfetto shows them; roles not named come last."""
_TRACKS: tuple[tuple[str, Callable[[Span], bool]], ...] = (
    ("", is_busy),
    (" waiting", is_wait),
    (" overhead", is_orchestration),
)


def to_trace(spans: Sequence[Span], run_id: str, epoch: float) -> str:
    """The JSON object of a trace; times in it are microseconds after `epoch` (Unix seconds)."""
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
