"""Comparisons and counterfactuals as terminal tables and as Markdown, with what their figures may be read as."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from asyncopd.evaluate import Difference, Outcome, accuracy_difference, kl_difference
from asyncopd.study.counterfactual import Cell

COMPARISON_NOTE = (
    "All arms trained on the same rollouts from the same start, and answered the same {prompts} held-out prompts with "
    "the same random numbers. A difference is arm minus first arm with its standard error over prompts: paired (prompt "
    "by prompt), and unpaired (as if each arm had prompts of its own). It is about these trained students; other "
    "rollouts or seeds would train others."
)
COUNTERFACTUAL_NOTE = (
    "Exact: which rollouts each step consumes under the setting, their staleness (recorded versions against the "
    "replayed learner's clock), and every ratio, drift and ESS, recomputed by the replayed learner on the recorded "
    "log-probs. Approximate: the closed loop. The rollouts were made by the original run's policies at its own "
    "staleness, not by the replayed learner's, so lag acts as a delay line between production and consumption. Every "
    "setting starts from version {first} of the run, which had trained the first {lag} batches of the most delayed "
    "setting already; the figures are therefore of clocks {measured} to {last} only. Under another order than "
    "the run's, rollouts that overtook each other may come a few clocks earlier or later than that. In arrival order "
    "whole shards arrive, at the times at which the original run's scores appeared; in index order a batch waits until "
    "all of it is there (idle)."
)


def comparison_table(names: Sequence[str], arms: Sequence[Outcome]) -> RenderableType:
    """Each arm's accuracy and KL, and its differences from the first."""
    table = Table(title=f"{len(arms)} arms on the same rollouts", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column, name in enumerate(_COMPARISON_HEADER):
        table.add_column(name, justify="left" if column == 0 else "right", header_style="dim")
    for row in _comparison_rows(names, arms):
        table.add_row(*map(escape, row))
    return table


def comparison_markdown(title: str, names: Sequence[str], arms: Sequence[Outcome]) -> str:
    note = COMPARISON_NOTE.format(prompts=len(arms[0].correct_B))
    return f"# {title}\n\n{_markdown(_COMPARISON_HEADER, _comparison_rows(names, arms))}\n\n{note}\n"


def counterfactual_table(cells: Sequence[Cell]) -> RenderableType:
    table = Table(title="counterfactual staleness", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column, name in enumerate(_CELL_HEADER):
        table.add_column(name, justify="left" if column in (1, 2) else "right", header_style="dim")
    for cell in cells:
        table.add_row(*map(escape, _cell_row(cell)))
    return table


def counterfactual_note(*, first: int, lag: int, measured_from: int, num_clocks: int) -> str:
    return COUNTERFACTUAL_NOTE.format(first=first, lag=lag, measured=measured_from, last=num_clocks - 1)


def counterfactual_markdown(title: str, cells: Sequence[Cell], note: str) -> str:
    return f"# {title}\n\n{_markdown(_CELL_HEADER, [_cell_row(cell) for cell in cells])}\n\n{note}\n"


_COMPARISON_HEADER = (
    "arm",
    "accuracy",
    "difference",
    "paired ±",
    "unpaired ±",
    "KL nats",
    "difference",
    "paired ±",
    "unpaired ±",
)
_CELL_HEADER = (
    "bound",
    "order",
    "on stale",
    "lag",
    "staleness mean",
    "max",
    "loss nats",
    "drift nats",
    "ESS",
    "grad norm",
    "steps",
    "idle",
    "waste",
)


def _comparison_rows(names: Sequence[str], arms: Sequence[Outcome]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, arm in zip(names, arms, strict=True):
        accuracy, kl = accuracy_difference(arms[0], arm), kl_difference(arms[0], arm)
        is_first = arm is arms[0]
        rows.append(
            (
                name,
                f"{100 * arm.accuracy:.1f} %",
                *_difference(accuracy, 100, 2, is_first),
                f"{arm.kl_nats:.4f}",
                *_difference(kl, 1, 4, is_first),
            )
        )
    return rows


def _difference(difference: Difference, scale: float, digits: int, is_first: bool) -> tuple[str, str, str]:
    if is_first:
        return "", "", ""
    return (
        f"{scale * difference.value:+.{digits}f}",
        f"{scale * difference.paired_error:.{digits}f}",
        f"{scale * difference.unpaired_error:.{digits}f}",
    )


def _cell_row(cell: Cell) -> tuple[str, ...]:
    def number(value: float, digits: int) -> str:
        return f"{value:.{digits}f}" if math.isfinite(value) else "–"

    setting = cell.setting
    return (
        str(setting.max_staleness),
        setting.order,
        setting.on_stale,
        str(setting.lag),
        number(cell.staleness_mean, 2),
        str(cell.staleness_max) if cell.num_steps else "–",
        number(cell.loss_nats, 4),
        number(cell.drift_nats, 5),
        number(cell.ess_fraction, 3),
        number(cell.grad_norm, 3),
        f"{cell.num_steps}" + ("" if cell.is_finite else " (not finite)"),
        str(cell.num_idle),
        f"{100 * cell.waste:.1f} %",
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
