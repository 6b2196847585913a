"""What a study stores: finished cells, one JSON object each and never written twice, and from them tables and plots."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes

from asyncopd.ports import NamedBytes
from asyncopd.report.plots import INK, Page, styled

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


# -- cells -------------------------------------------------------------------------------------------------------
def digest(settings: Any) -> str:
    """First 12 hex digits of the sha256 of the canonical JSON: equal settings, equal digest."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class CellStore:
    """Cells of one study under one set of settings; other settings have other cells."""

    def __init__(self, store: NamedBytes, study: str, settings: Mapping[str, Any]) -> None:
        """
        Args:
            store: at the study's output directory.
            settings: everything that decides a cell's numbers, besides its name; JSON.
        """
        self._store = store
        self.folder = f"cells/{study}-{digest(settings)}"
        self._store.put_if_absent(f"{self.folder}/settings.json", json.dumps(settings, indent=1).encode())

    def find(self, name: str) -> dict[str, Any] | None:
        """The finished cell, or None."""
        body = self._store.find(self._key(name))
        cell: dict[str, Any] | None = None if body is None else json.loads(body)
        return cell

    def put(self, name: str, cell: Mapping[str, Any]) -> bool:
        """Store a finished cell. False when it was there before; that one is kept."""
        return self._store.put_if_absent(self._key(name), json.dumps(cell, sort_keys=True).encode())

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}.json"


# -- study estimators ---------------------------------------------------------------------------------------------
def write_estimators(store: NamedBytes, rows: Sequence[Row]) -> str:
    """Write estimators.parquet, .md and .png. Returns the Markdown."""
    text = estimators_markdown(rows)
    store.put("estimators.parquet", parquet(rows))
    store.put("estimators.md", text.encode())
    store.put("estimators.png", plot_estimators(rows))
    return text


def estimators_markdown(rows: Sequence[Row]) -> str:
    """One table for each teacher cost and direction of drift; figures are medians over the snapshots."""
    drifts = sorted({row["drift_target_nats"] for row in rows})
    parts = []
    for direction in ("trained", "random"):
        for cost in sorted({row["teacher_ids"] for row in rows}):
            names = list(dict.fromkeys(row["estimator"] for row in rows if row["teacher_ids"] == cost))
            header = ["estimator", "target", *(f"bias, drift {d:g}" for d in drifts)]
            header += [f"variance, drift {d:g}" for d in drifts]
            body = []
            for name in names:
                chosen = [r for r in rows if r["estimator"] == name and r["teacher_ids"] == cost]
                biases = [_at(chosen, direction, drift, "relative_bias") for drift in drifts]
                variances = [_at(chosen, direction, drift, "relative_variance") for drift in drifts]
                body.append(
                    [name, chosen[0]["target"], *(f"{b:.3f}" for b in biases), *(f"{v:.3g}" for v in variances)]
                )
            parts.append(f"### {cost} teacher ids per prefix, {direction} drift\n\n{markdown_table(header, body)}")
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
        for line, name in enumerate(_PLOTTED_BIAS):
            _line(page.axes[column], rows, direction, drifts, name, "relative_bias", line)
        for line, name in enumerate(_PLOTTED_VARIANCE):
            _line(page.axes[2 + column], rows, direction, drifts, name, "relative_variance", line)
        page.axes[column].set_title(f"Relative bias, {direction} drift")
        page.axes[2 + column].set_title(f"Relative variance, {direction} drift")
        page.axes[2 + column].set_xlabel("drift KL(p_old‖p_θ), nats")
        page.axes[2 + column].set_yscale("log")
        page.axes[column].set_xscale("symlog", linthresh=min(d for d in drifts if d > 0))
        page.axes[column].set_xticks(drifts, [f"{drift:g}" for drift in drifts])
        page.axes[column].minorticks_off()
    for row in (1, 3):
        page.axes[row].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    page.axes[0].set_ylabel("‖E[ĝ] − g‖ / ‖g‖")
    page.axes[2].set_ylabel("E‖ĝ − E[ĝ]‖² / ‖g‖², one prefix")
    return page.png()


def _line(
    axes: Axes, rows: Sequence[Row], direction: str, drifts: Sequence[float], name: str, key: str, number: int
) -> None:
    chosen = [row for row in rows if row["estimator"] == name]
    chosen = [row for row in chosen if row["teacher_ids"] == min(r["teacher_ids"] for r in chosen)]
    colour, marker = _LINES[number % len(_LINES)]
    values = [_at(chosen, direction, drift, key) for drift in drifts]
    axes.plot(drifts, values, color=colour, marker=marker, markersize=5, label=name)


# -- study staleness ----------------------------------------------------------------------------------------------
def write_staleness(store: NamedBytes, rows: Sequence[Row]) -> str:
    """Write staleness.parquet, .md and .png. Returns the Markdown."""
    text = staleness_markdown(rows)
    store.put("staleness.parquet", parquet(rows))
    store.put("staleness.md", text.encode())
    store.put("staleness.png", plot_staleness(rows))
    return text


def staleness_markdown(rows: Sequence[Row]) -> str:
    """Accuracy and KL by lag, mean ± standard error over seeds; one table for each learning rate."""
    lags = sorted({row["lag"] for row in rows})
    parts = []
    for lr in sorted({row["lr"] for row in rows}):
        seeds = len({row["seed"] for row in rows if row["lr"] == lr})
        header = ["estimator", *(f"accuracy, lag {lag}" for lag in lags), *(f"KL, lag {lag}" for lag in lags)]
        body = []
        for name in dict.fromkeys(row["estimator"] for row in rows):
            of_lag = {lag: [r for r in rows if (r["estimator"], r["lag"], r["lr"]) == (name, lag, lr)] for lag in lags}
            body.append(
                [
                    name,
                    *(_mean_and_error(of_lag[lag], "accuracy", "{:.2f} ± {:.2f}") for lag in lags),
                    *(_mean_and_error(of_lag[lag], "kl_nats", "{:.2f} ± {:.2f}") for lag in lags),
                ]
            )
        parts.append(f"### lr {lr:g}, {seeds} seeds, mean ± standard error\n\n{markdown_table(header, body)}")
    return "\n".join(parts)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN error for a single value."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def _mean_and_error(rows: Sequence[Row], key: str, form: str) -> str:
    return form.format(*mean_and_error([row[key] for row in rows])) if rows else "–"


@styled
def plot_staleness(rows: Sequence[Row]) -> bytes:
    """Accuracy and KL against lag, a column for each learning rate; bars are standard errors."""
    lrs = sorted({row["lr"] for row in rows})
    lags = sorted({row["lag"] for row in rows})
    page = Page(2, len(lrs), width=4.4 + 5 * len(lrs), height=8, sharex=True, sharey="row")
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    panels: tuple[tuple[str, str], ...] = (("accuracy", "Accuracy"), ("kl_nats", "KL to the teacher, nats per token"))
    for panel, (key, title) in enumerate(panels):
        for column, lr in enumerate(lrs):
            axes = page.axes[panel * len(lrs) + column]
            for number, name in enumerate(names):
                chosen = [row for row in rows if row["estimator"] == name and row["lr"] == lr]
                of_lag = {lag: [row[key] for row in chosen if row["lag"] == lag] for lag in lags}
                _with_errors(axes, {lag: values for lag, values in of_lag.items() if values}, name, number)
            axes.set_title(f"{title}, lr {lr:g}")
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(lags, [str(lag) for lag in lags])
            if key == "kl_nats":
                axes.set_yscale("log")
                axes.set_xlabel("lag, versions")
    page.axes[len(lrs) - 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return page.png()


def _with_errors(axes: Axes, values_by_lag: Mapping[int, Sequence[float]], name: str, number: int) -> None:
    found = [(lag, *mean_and_error(values)) for lag, values in values_by_lag.items()]
    colour, marker = _LINES[number % len(_LINES)]
    style = "-" if number < len(_LINES) else "--"
    axes.errorbar(
        [lag for lag, _, _ in found],
        [mean for _, mean, _ in found],
        yerr=[0.0 if math.isnan(error) else error for _, _, error in found],
        color=colour,
        marker=marker,
        markersize=5,
        linestyle=style,
        capsize=2.5,
        label=name,
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of equal keys as one Parquet object."""
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), body)
    return body.getvalue()
