"""Tables and plots of a study, from the rows of its cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from asyncopd.ports import NamedBytes
from asyncopd.report.plots import INK, Page, styled
from asyncopd.report.text import table
from asyncopd.study.cells import parquet

Row = Mapping[str, Any]
# Okabe and Ito's colours, with a marker each so that no line is told apart by colour alone.
_LINES = (
    ("#009E73", "o"),
    ("#0072B2", "s"),
    ("#D55E00", "^"),
    ("#CC79A7", "v"),
    ("#E69F00", "D"),
    ("#56B4E9", "P"),
    ("#999999", "X"),
    (INK, "*"),
)
_PLOTTED_BIAS = (
    "head 4 + tail 4",
    "draws, clip (exact baseline)",
    "draws, truncate (exact baseline)",
    "draws, A_old",
    "draws, no ratio",
    "reverse KL, teacher top-8, bucket",
    "reverse KL, student top-8, drop",
)
_PLOTTED_VARIANCE = (
    "head 4 + tail 4",
    "head 8 + tail 8",
    "draws, leave-one-out",
    "draws, no baseline",
    "sampled token alone",
    "sampled token, exact baseline",
    "teacher draws 8",
)


def write(study: str, store: NamedBytes, rows: Sequence[Row]) -> str:
    """Write <study>.parquet, .md and .png. Returns the Markdown."""
    markdown, plot = {
        "estimators": (estimators_markdown, plot_estimators),
        "staleness": (staleness_markdown, plot_staleness),
    }[study]
    text = markdown(rows)
    store.put(f"{study}.parquet", parquet(rows))
    store.put(f"{study}.md", text.encode())
    store.put(f"{study}.png", plot(rows))
    return text


# -- study estimators ---------------------------------------------------------------------------------------------
def estimators_markdown(rows: Sequence[Row]) -> str:
    """One table for each teacher cost and direction of drift; figures are medians over the snapshots."""
    drifts = sorted({row["drift_target_nats"] for row in rows})
    header = ["estimator", "target"]
    header += [f"{figure}, drift {drift:g}" for figure in ("bias", "variance") for drift in drifts]
    parts = []
    for direction in ("trained", "random"):
        for cost in sorted({row["teacher_ids"] for row in rows}):
            body = []
            for name in dict.fromkeys(row["estimator"] for row in rows if row["teacher_ids"] == cost):
                chosen = [r for r in rows if r["estimator"] == name and r["teacher_ids"] == cost]
                biases = [f"{_at(chosen, direction, drift, 'relative_bias'):.3f}" for drift in drifts]
                variances = [f"{_at(chosen, direction, drift, 'relative_variance'):.3g}" for drift in drifts]
                body.append([name, chosen[0]["target"], *biases, *variances])
            parts.append(f"### {cost} teacher ids per prefix, {direction} drift\n\n{table(header, body)}\n")
    return "\n".join(parts)


def _at(rows: Sequence[Row], direction: str, drift: float, key: str) -> float:
    found = [
        row[key] for row in rows if row["drift_target_nats"] == drift and (drift == 0 or row["direction"] == direction)
    ]
    value = float(np.median(found)) if found else math.nan
    # Rounding, not a measurement.
    return 0.0 if value < 1e-9 else value


@styled
def plot_estimators(rows: Sequence[Row]) -> bytes:
    """Bias at 8 teacher ids, and variance, against drift; both directions of drift."""
    page = Page(2, 2, width=12, height=8.4, sharey="row", sharex=True)
    drifts = sorted({row["drift_target_nats"] for row in rows})
    for column, direction in enumerate(("trained", "random")):
        bias, variance = page.axes[column], page.axes[2 + column]
        panels = ((bias, "relative_bias", _PLOTTED_BIAS), (variance, "relative_variance", _PLOTTED_VARIANCE))
        for axes, key, names in panels:
            for number, name in enumerate(names):
                chosen = [row for row in rows if row["estimator"] == name]
                chosen = [row for row in chosen if row["teacher_ids"] == min(r["teacher_ids"] for r in chosen)]
                _line(axes, name, number, drifts, [_at(chosen, direction, drift, key) for drift in drifts])
            axes.set_title(f"{key.capitalize().replace('_', ' ')}, {direction} drift")
        variance.set_xlabel("drift KL(p_old‖p_θ), nats")
        variance.set_yscale("log")
        bias.set_xscale("symlog", linthresh=min(d for d in drifts if d > 0))
        bias.set_xticks(drifts, [f"{drift:g}" for drift in drifts])
        bias.minorticks_off()
    for row in (1, 3):
        page.axes[row].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    page.axes[0].set_ylabel("‖E[ĝ] − g‖ / ‖g‖")
    page.axes[2].set_ylabel("E‖ĝ − E[ĝ]‖² / ‖g‖², one prefix")
    return page.png()


def _line(
    axes: Axes,
    name: str,
    number: int,
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[float] | None = None,
) -> None:
    colour, marker = _LINES[number % len(_LINES)]
    style = "-" if number < len(_LINES) else "--"
    bars = None if errors is None else np.nan_to_num(errors)
    axes.errorbar(x, y, yerr=bars, color=colour, marker=marker, markersize=5, linestyle=style, capsize=2.5, label=name)


# -- study staleness ----------------------------------------------------------------------------------------------
def staleness_markdown(rows: Sequence[Row]) -> str:
    """Accuracy and KL by lag, mean ± standard error over seeds; one table for each learning rate."""
    lags = sorted({row["lag"] for row in rows})
    columns = [(key, lag) for key in ("accuracy", "kl_nats") for lag in lags]
    header = ["estimator", *(f"{'KL' if key == 'kl_nats' else key}, lag {lag}" for key, lag in columns)]

    def cell(name: str, lr: float, key: str, lag: int) -> str:
        values = [row[key] for row in rows if (row["estimator"], row["lag"], row["lr"]) == (name, lag, lr)]
        return "{:.2f} ± {:.2f}".format(*mean_and_error(values)) if values else "–"

    parts = []
    for lr in sorted({row["lr"] for row in rows}):
        seeds = len({row["seed"] for row in rows if row["lr"] == lr})
        names = dict.fromkeys(row["estimator"] for row in rows)
        body = [[name, *(cell(name, lr, *column) for column in columns)] for name in names]
        parts.append(f"### lr {lr:g}, {seeds} seeds, mean ± standard error\n\n{table(header, body)}\n")
    return "\n".join(parts)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN error for a single value."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


@styled
def plot_staleness(rows: Sequence[Row]) -> bytes:
    """Accuracy and KL against lag, a column for each learning rate; bars are standard errors."""
    lrs = sorted({row["lr"] for row in rows})
    lags = sorted({row["lag"] for row in rows})
    page = Page(2, len(lrs), width=4.4 + 5 * len(lrs), height=8, sharex=True, sharey="row")
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    panels = {"accuracy": "Accuracy", "kl_nats": "KL to the teacher, nats per token"}
    for panel, (key, title) in enumerate(panels.items()):
        for column, lr in enumerate(lrs):
            axes = page.axes[panel * len(lrs) + column]
            for number, name in enumerate(names):
                chosen = [row for row in rows if row["estimator"] == name and row["lr"] == lr]
                measured = [lag for lag in lags if any(row["lag"] == lag for row in chosen)]
                found = [mean_and_error([row[key] for row in chosen if row["lag"] == lag]) for lag in measured]
                _line(axes, name, number, measured, [mean for mean, _ in found], [error for _, error in found])
            axes.set_title(f"{title}, lr {lr:g}")
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(lags, [str(lag) for lag in lags])
            if key == "kl_nats":
                axes.set_yscale("log")
                axes.set_xlabel("lag, versions")
    page.axes[len(lrs) - 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return page.png()
