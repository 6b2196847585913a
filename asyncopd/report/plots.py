"""Plots of quality, training, staleness and response lengths, and how every plot looks; each function returns a PNG.

One colour per role, of Okabe and Ito's, which colour-blind readers can tell apart. The timeline has its own file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from asyncopd.metrics import DRIFT, ENTROPY, ESS, GRAD_NORM, KL, LOSS
from asyncopd.report.measure import Observations, Responses, accuracy_standard_error
from asyncopd.types import Evaluation, TrainStep

ROLE_COLOURS = {
    "rollout": "#0072B2",
    "score": "#E69F00",
    "learn": "#009E73",
    "evaluate": "#CC79A7",
    "pretrain": "#56B4E9",
}
OTHER = "#999999"
INK = "#222222"
"""Of text; plots.mplstyle has the look of everything else."""
ACCENT = "#0072B2"
SECOND = "#D55E00"


def role_colour(role: str) -> str:
    return ROLE_COLOURS.get(role, OTHER)


def tint(colour: str, strength: float = 0.28) -> tuple[float, float, float]:
    """`colour` mixed with white; `strength` 1 is the colour itself."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return (1 - strength * (1 - red), 1 - strength * (1 - green), 1 - strength * (1 - blue))


styled = style.context(Path(__file__).with_name("plots.mplstyle"))
"""Decorates every plot function: matplotlib reads its settings at many moments between creation and saving."""


class Page:
    """One PNG in the making. Uses no pyplot, so any thread may draw."""

    def __init__(self, rows: int, columns: int, *, width: float, height: float, **grid: Any) -> None:
        """
        Args:
            width, height: inches; 110 pixels each.
            grid: for example `height_ratios`, handed to matplotlib's `subplots`.
        """
        self.figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        FigureCanvasAgg(self.figure)
        axes = self.figure.subplots(rows, columns, squeeze=False, **grid)
        self.axes: list[Axes] = list(axes.ravel())

    def png(self) -> bytes:
        body = io.BytesIO()
        self.figure.savefig(body, format="png")
        return body.getvalue()


def missing(axes: Axes, what: str) -> None:
    """Say in place of a plot why there is none."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, what, ha="center", va="center", color="#777777", transform=axes.transAxes, wrap=True)


FloatArray = NDArray[np.float64]

CURVES = (
    (LOSS, "loss"),
    (KL, "KL to teacher (training responses)"),
    (DRIFT, "drift KL(p_old‖p_θ)"),
    (ESS, "effective sample size"),
    (ENTROPY, "student entropy"),
    (GRAD_NORM, "gradient norm before clipping"),
)
"""(metric, title) of the training curves."""
_EVALUATED: dict[str, Any] = {"color": INK, "linewidth": 2.4, "capsize": 3, "marker": "o", "markersize": 5}


# -- quality ------------------------------------------------------------------------------------------------------
@styled
def plot_quality(seen: Observations) -> bytes:
    """Accuracy and KL to the teacher of every evaluated version, against learner steps and against wall time."""
    page = Page(2, 2, width=12, height=7.2, sharex="col", sharey="row")
    by_step = [(evaluation, float(evaluation.version.number)) for evaluation in seen.evaluations]
    by_time = [(e, at) for e in seen.evaluations if (at := seen.published_s(e.version.number)) is not None]
    columns = (
        ("learner steps", by_step, [(float(step.step), step) for step in seen.steps]),
        ("wall time, s", by_time, [(step.finished - seen.epoch, step) for step in seen.steps]),
    )
    for column, (label, placed, steps) in enumerate(columns):
        _accuracy(page.axes[column], placed)
        _kl(page.axes[2 + column], placed, steps)
        page.axes[2 + column].set_xlabel(label)
    for axes in page.axes[1::2]:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    page.axes[0].set_title("Accuracy, held-out prompts")
    page.axes[2].set_title("KL to the teacher, nats per token")
    return page.png()


def _accuracy(axes: Axes, placed: Sequence[tuple[Evaluation, float]]) -> None:
    known = [(evaluation, x) for evaluation, x in placed if np.isfinite(evaluation.accuracy)]
    if not known:
        missing(axes, "no accuracy was measured")
        return
    at = [x for _, x in known]
    groups = sorted({group for e, _ in known for group in e.accuracy_by_group})
    # One hue from dark to light: groups are ordered, for example by noise.
    shades = colormaps["viridis"](np.linspace(0.15, 0.85, max(2, len(groups))))
    for group, shade in zip(groups, shades, strict=False):
        values = [e.accuracy_by_group.get(group, np.nan) for e, _ in known]
        axes.plot(at, values, color=shade, linewidth=1.2, marker=".", markersize=4, label=group)
    errors = [1.96 * accuracy_standard_error(e) for e, _ in known]
    values = [e.accuracy for e, _ in known]
    axes.errorbar(at, values, errors, label="all prompts,\n95 % interval", **_EVALUATED)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _kl(axes: Axes, placed: Sequence[tuple[Evaluation, float]], steps: Sequence[tuple[float, TrainStep]]) -> None:
    training = [(x, step.metrics[KL.key]) for x, step in steps if KL.key in step.metrics]
    if not training and not placed:
        missing(axes, "no KL was measured")
        return
    if training:
        axes.plot(*zip(*training, strict=True), color=tint(ACCENT, 0.4), linewidth=1, label="training responses")
    if placed:
        errors = [1.96 * e.kl_standard_error_nats for e, _ in placed]
        values = [e.kl_nats for e, _ in placed]
        axes.errorbar([x for _, x in placed], values, errors, label="held-out prompts,\n95 % interval", **_EVALUATED)
    # Training KL is one draw per token, so that a step's can be negative.
    axes.set_ylim(bottom=min([0.0, *(kl for _, kl in training)]))


# -- training -----------------------------------------------------------------------------------------------------
@styled
def plot_training(steps: Sequence[TrainStep]) -> bytes:
    """What every step measured: each step faint, their running mean bold."""
    page = Page(2, 3, width=13, height=6.6)
    for axes, (metric, title) in zip(page.axes, CURVES, strict=True):
        values = [(step.step, step.metrics.get(metric.key, np.nan)) for step in steps]
        points = [(step, value) for step, value in values if np.isfinite(value)]
        axes.set_title(title)
        if not points:
            missing(axes, f"no step reported {metric.key}")
            continue
        x, y = np.array(points, np.float64).T
        window = max(1, len(y) // 20)
        axes.plot(x, y, color=tint(ACCENT, 0.4) if window > 1 else ACCENT, linewidth=1 if window > 1 else 1.8)
        if window > 1:
            axes.plot(x, running_mean(y, window), color=ACCENT, linewidth=2.2)
        axes.set_xlabel("learner step")
        axes.set_ylabel(metric.unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return page.png()


def running_mean(values: FloatArray, window: int) -> FloatArray:
    """Mean over up to `window` values on both sides of each; shorter at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(0, at - window), np.minimum(len(values), at + window + 1)
    return np.asarray((sums[high] - sums[low]) / (high - low))


# -- staleness ----------------------------------------------------------------------------------------------------
@styled
def plot_staleness(steps: Sequence[TrainStep], max_staleness: int) -> bytes:
    """Trained tokens by their staleness: over the whole run, and step by step."""
    page = Page(1, 2, width=12, height=4.2, width_ratios=(1, 1.8))
    left, right = page.axes
    largest = max((versions for step in steps for versions in step.staleness_tokens), default=None)
    if largest is None:
        missing(left, "no step was trained")
        missing(right, "")
        return page.png()
    shares_SA = staleness_shares(steps, largest + 1)
    tokens_S = np.array([step.num_tokens for step in steps], np.float64)
    shares_A = (shares_SA * tokens_S[:, None]).sum(0) / tokens_S.sum()
    left.bar(range(len(shares_A)), shares_A, color=ACCENT, width=0.7)
    for versions, share in enumerate(shares_A):
        if len(shares_A) <= 12:
            left.annotate(f"{share:.0%}", (versions, share), ha="center", va="bottom", fontsize=9, color=INK)
    left.margins(y=0.1)
    left.set_title("Staleness of trained tokens")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_ylabel("share of tokens")
    left.set_xlabel(f"staleness, policy versions (bound τ = {max_staleness})")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(axis="x", visible=False)
    first, last = steps[0].step, steps[-1].step
    extent = (first - 0.5, last + 0.5, -0.5, len(shares_A) - 0.5)
    look: dict[str, Any] = {"origin": "lower", "aspect": "auto", "cmap": "Blues", "interpolation": "nearest"}
    picture = right.imshow(shares_SA.T, vmin=0, vmax=1, extent=extent, **look)
    right.grid(visible=False)
    right.set_title("Step by step")
    right.set_xlabel("learner step")
    right.set_ylabel("staleness, versions")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    shares = PercentFormatter(1.0, decimals=0)
    page.figure.colorbar(picture, ax=right, format=shares, label="share of the step's tokens")
    return page.png()


def staleness_shares(steps: Sequence[TrainStep], num_values: int) -> FloatArray:
    """[S, A] share of each step's tokens that had a staleness of 0, 1, ... versions."""
    shares_SA = np.zeros((len(steps), num_values))
    for row, step in enumerate(steps):
        for versions, count in step.staleness_tokens.items():
            shares_SA[row, versions] = count / max(1, sum(step.staleness_tokens.values()))
    return shares_SA


# -- lengths ------------------------------------------------------------------------------------------------------
@styled
def plot_lengths(responses: Responses) -> bytes:
    """How long responses were, split by how they ended; the count axis is logarithmic, because the tail is heavy."""
    page = Page(1, 1, width=9, height=4.2)
    (axes,) = page.axes
    lengths_B, stopped_B = responses.lengths_B, responses.stopped_B
    if not len(lengths_B):
        missing(axes, "no trajectory shard could be read")
        return page.png()
    longest = int(lengths_B.max())
    bins = np.arange(0.5, longest + 1.5) if longest <= 100 else np.linspace(0.5, longest + 0.5, 81)
    ends = [("ended by itself (stop)", stopped_B, ACCENT), ("hit the limit (length)", ~stopped_B, SECOND)]
    shown = [(label, lengths_B[chosen], colour) for label, chosen, colour in ends if chosen.any()]
    axes.hist(
        [lengths for _, lengths, _ in shown],
        bins=bins.tolist(),
        stacked=True,
        color=[colour for _, _, colour in shown],
        label=[f"{label}: {len(part):,}" for label, part, _ in shown],
    )
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    mean, p99 = float(lengths_B.mean()), float(np.percentile(lengths_B, 99))
    for value in (mean, p99):
        axes.axvline(value, color=INK, linewidth=1, linestyle="--")
    axes.set_title(f"Response lengths: mean {mean:.0f} and 99th percentile {p99:.0f} tokens (dashed)", pad=26)
    axes.set_xlabel("response tokens, EOS included")
    axes.set_ylabel("responses (log scale)")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.99), ncols=2)
    return page.png()
