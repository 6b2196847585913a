"""Shows a run in the terminal: live while it goes on, and its report when it is over.

    state of the flow --is_over--> follow --look--> ProgressWatch --> RunView --> storage
                                      |-- a terminal: one panel, redrawn in place
                                      `-- anything else: a plain line every few seconds

Following changes nothing: it can be interrupted and started again at any time, also by several people at once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding

from asyncopd.cli.progress import ProgressWatch, panel, plain_line
from asyncopd.config import RunConfig
from asyncopd.errors import StorageError
from asyncopd.local.console import console_table
from asyncopd.report.summary import Summary
from asyncopd.report.text import duration, headline, tables
from storage.run_view import RunView

POLL_S = 0.5
PLAIN_EVERY_S = 5.0


def follow(
    view: RunView,
    config: RunConfig,
    *,
    console: Console,
    is_over: Callable[[], str | None],
    poll_s: float = POLL_S,
    plain_every_s: float = PLAIN_EVERY_S,
) -> str:
    """Show the progress of a run until its flow is over. The run need not exist in storage yet.

    Args:
        is_over: the flow's terminal state, for example `COMPLETED`; None while it is scheduled or runs. Asked once
            per look; what it raises travels to the caller.
        plain_every_s: between lines where the console is not a terminal; the first and the last are always printed.
    Returns:
        What `is_over` answered.
    """
    watch = ProgressWatch(view, config)
    printed_s, num_failures = -math.inf, 0
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        while True:
            # Asked before looking, so that the last look sees everything the flow did.
            state = is_over()
            try:
                progress = watch.look()
            except StorageError as error:
                _print(console, f"storage does not answer, trying again: {error}")
            else:
                if live is None:
                    for failure in progress.failures[num_failures:]:
                        _print(console, f"failure: {failure}")
                    num_failures = len(progress.failures)
                    if state is not None or time.monotonic() - printed_s >= plain_every_s:
                        printed_s = time.monotonic()
                        _print(console, plain_line(progress, config))
                else:
                    title = f"[bold]{escape(view.run_id)}[/]  [dim]followed for {duration(progress.elapsed_s)}[/]"
                    live.update(panel(progress, title, config), refresh=True)
            if state is not None:
                return state
            time.sleep(poll_s)


def show_status(view: RunView, config: RunConfig, *, console: Console) -> None:
    """Print what a run and its roles do at this moment."""
    console.print(panel(ProgressWatch(view, config).look(), f"[bold]{escape(view.run_id)}[/]", config))


def show_report(folder: Path, *, console: Console) -> None:
    """Print the report of a finished run from the folder that `write_report` wrote."""
    path = folder / "summary.json"
    if not path.exists():
        console.print(f"There is no report in {folder}: the flow ended before it wrote one.", markup=False)
        return
    summary = Summary.from_json(path.read_bytes())
    console.print()
    console.rule(f"[bold]{escape(summary.run_id)}", align="left")
    console.print(escape(headline(summary).replace("**", "")), highlight=False)
    for note in summary.notes:
        console.print(f"[yellow]Note.[/] {escape(note)}", highlight=False)
    for shown in tables(summary):
        console.print(Padding(console_table(*shown), (1, 0, 0, 0)))
    for failure in summary.incidents.failures:
        console.print(f"[red]failure[/] {escape(failure)}", highlight=False)
    files = ("report.md", "quality.png", "timeline.png", "training.png", "staleness.png", "lengths.png", "trace.json")
    found = ", ".join(name for name in files if (folder / name).exists())
    _print(console, f"\nreport    {folder / 'report.md'}")
    _print(console, f"files     {found} (trace.json opens at https://ui.perfetto.dev)")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
