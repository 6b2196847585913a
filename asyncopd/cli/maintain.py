"""`asyncopd maintain audit | collect | quarantine`: what they print."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncopd.cli import Root
from storage.layout import run_of
from storage.maintain.audit import GRACE_S, audit_run
from storage.maintain.collect import collect_run
from storage.maintain.quarantine import set_aside
from storage.runs import find_run
from storage.stores import open_store

FOUND_PROBLEMS = 1
"""Exit status of an audit with findings."""

Json = Annotated[bool, Parameter("--json", help="Print one JSON object.")]


def audit(run_id: str, /, *, root: Root = "runs", json_: Json = False, grace_s: float = GRACE_S) -> int:
    """Verify a run.

    Args:
        run_id: The run; it may be running.
        grace_s: Younger unreferenced objects are no finding.
    """
    store = open_store(root)
    find_run(store, run_id)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # On stderr, so that --json leaves stdout to the object.
    with Progress(TextColumn("verifying"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        report = audit_run(
            store,
            run_id,
            grace_s=grace_s,
            on_progress=lambda done, total, key: bar.update(task, completed=done, total=total, description=key),
        )
    _print(report.to_dict() if json_ else report.to_text())
    return 0 if report.is_clean else FOUND_PROBLEMS


def collect(
    run_id: str, /, *, root: Root = "runs", json_: Json = False, dry_run: bool = False, grace_s: float | None = None
) -> int:
    """Clean a run.

    Args:
        run_id: The run; it may be running.
        dry_run: Only say what would go.
        grace_s: Keep what is younger (default: the run's retention.grace_s).
    """
    store = open_store(root)
    report = collect_run(store, find_run(store, run_id), grace_s=grace_s, dry_run=dry_run)
    _print(report.to_dict() if json_ else report.to_text())
    return 0


def quarantine(key: str, /, *, root: Root = "runs", json_: Json = False) -> int:
    """Set an object aside.

    Args:
        key: As an error or an audit names it, for example runs/R/trajectories/….json.
    """
    store = open_store(root)
    run_id = run_of(key)
    if run_id is not None:
        find_run(store, run_id)
    done = set_aside(store, key)
    lines = [f"{old}\n  -> {new}" for old, new in done.moved.items()]
    fields = {"key": done.key, "moved": done.moved, "consequences": done.consequences}
    _print(fields if json_ else "\n".join([*lines, *done.consequences]))
    return 0


def _print(answer: dict[str, Any] | str) -> None:
    # Not through rich: keys and commands are to be copied, and must not be wrapped.
    print(answer if isinstance(answer, str) else json.dumps(answer, indent=1))
