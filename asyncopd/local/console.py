"""Tables in a terminal, and progress: a bar there, a plain line every few seconds anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 5.0

Advance = Callable[[int], None]
"""Called with how much of the total is done since the last call."""


@contextlib.contextmanager
def bar(console: Console, description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show `description` with how much of `total` is done, while the body calls what it is given."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda amount: progress.advance(task, amount)
        return
    done, printed_s = 0, time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, printed_s
        done += amount
        if time.monotonic() - printed_s >= PLAIN_EVERY_S:
            printed_s = time.monotonic()
            console.print(f"{description}: {done:,} of {total:,} {unit}", markup=False, highlight=False, soft_wrap=True)

    yield advance


def console_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> Table:
    """A table for a terminal; columns not in `left` align right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column in left else "right", header_style="dim")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
