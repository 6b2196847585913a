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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from asyncopd.cli.progress import Progress, ProgressWatch, panel, plain_line
from asyncopd.config import RunConfig
from asyncopd.errors import StorageError
from asyncopd.report.summary import Summary
from asyncopd.report.text import duration, headline, quality_rows, role_rows, speed_rows
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
    with _display(view.run_id, config, console, plain_every_s) as show:
        while True:
            # Asked before looking, so that the last look sees everything the flow did.
            state = is_over()
            try:
                show(watch.look(), last=state is not None)
            except StorageError as error:
                console.print(f"storage does not answer, trying again: {error}", markup=False, highlight=False)
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
    first, last = summary.first, summary.last
    if first and last:
        title = f"Quality on {last.num_prompts} held-out prompts, ± one standard error"
        header = ("", f"version {first.version}", f"version {last.version}", "change")
        console.print(_table(title, header, quality_rows(first, last), left=(0,)))
    console.print(_table("Speed", ("", "value", "meaning"), speed_rows(summary), left=(0, 2)))
    if summary.roles:
        header_5 = ("role", "processes", "busy", "busy / wall", "waited, while idle, for")
        console.print(_table("Where the time went", header_5, role_rows(summary.roles), left=(0, 4)))
    for failure in summary.incidents.failures:
        console.print(f"[red]failure[/] {escape(failure)}", highlight=False)
    files = ("report.md", "quality.png", "timeline.png", "training.png", "staleness.png", "lengths.png", "trace.json")
    found = ", ".join(name for name in files if (folder / name).exists())
    console.print(f"\nreport    {folder / 'report.md'}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"files     {found} (trace.json opens at https://ui.perfetto.dev)", highlight=False, markup=False)


# -- live ---------------------------------------------------------------------------------------------------------
class _Show(Protocol):
    def __call__(self, progress: Progress, *, last: bool) -> None: ...


@contextlib.contextmanager
def _display(run_id: str, config: RunConfig, console: Console, plain_every_s: float) -> Iterator[_Show]:
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:

            def show_panel(progress: Progress, *, last: bool) -> None:
                title = f"[bold]{escape(run_id)}[/]  [dim]followed for {duration(progress.elapsed_s)}[/]"
                live.update(panel(progress, title, config), refresh=True)

            yield show_panel
        return
    printed_s = -math.inf
    num_failures = 0

    def show_line(progress: Progress, *, last: bool) -> None:
        nonlocal printed_s, num_failures
        for failure in progress.failures[num_failures:]:
            console.print(f"failure: {failure}", markup=False, highlight=False, soft_wrap=True)
        num_failures = len(progress.failures)
        if last or time.monotonic() - printed_s >= plain_every_s:
            printed_s = time.monotonic()
            console.print(plain_line(progress, config), markup=False, highlight=False, soft_wrap=True)

    yield show_line


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> RenderableType:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column in left else "right", header_style="dim")
    for row in rows:
        table.add_row(*map(escape, row))
    return Padding(table, (1, 0, 0, 0))
