"""How every plot of the report looks: one colour per role, light background, few lines. Colours are Okabe and Ito's,
which colour-blind readers can tell apart."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROLE_COLOURS = {
    "rollout": "#0072B2",
    "score": "#E69F00",
    "learn": "#009E73",
    "evaluate": "#CC79A7",
    "pretrain": "#56B4E9",
}
OTHER = "#999999"
INK = "#222222"
FAINT = "#E3E3E3"
ACCENT = "#0072B2"
SECOND = "#D55E00"

_STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.family": "DejaVu Sans",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def role_colour(role: str) -> str:
    return ROLE_COLOURS.get(role, OTHER)


def tint(colour: str, strength: float = 0.28) -> tuple[float, float, float]:
    """`colour` mixed with white; `strength` 1 is the colour itself."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return (1 - strength * (1 - red), 1 - strength * (1 - green), 1 - strength * (1 - blue))


styled = rc_context(_STYLE)
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
