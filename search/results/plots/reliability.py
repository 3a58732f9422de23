"""Reliability diagrams (Guo et al. 2017, "On Calibration of Modern Neural Networks"), as small multiples.

Above, how often each confidence is claimed; below, how often it is earned. Any number of models, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from objectives.metrics.calibration import ReliabilityBins, ece, reliability_bins
from objectives.outcomes import N_BINS, Outcomes
from search.results.plots.style import (
    COLUMN,
    INK,
    POST,
    PRE,
    QUIET,
    caption,
    caption_height,
    drawn,
    label,
    said,
)

FEW = 10  # a bin with fewer questions says little and is faded
_Z = 1.959964  # 97.5 % quantile of the normal distribution

# Inches around and between the parts of a panel.
_LEFT, _RIGHT, _BETWEEN, _TITLE, _GAP, _X_AXIS = 0.5, 0.1, 0.2, 0.24, 0.1, 0.42
_TICKS = [0.0, 0.25, 0.5, 0.75, 1.0]
_GAP_COLOUR = "#F5D0B5"  # vermilion on white

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """One model's answers under a title."""

    title: str
    outcomes: Outcomes


@drawn
def reliability_figure(
    panels: Sequence[Panel],
    *,
    where: str = "",
    n_bins: int = N_BINS,
    share: Sequence[Panel] | None = None,
    bare: bool = False,
) -> Figure:
    """One diagram a panel, all with the same axes.

    Args:
        where: what the questions are, for the caption, such as `Report split`.
        share: all panels that must have the same axes, if they are drawn in several figures.
        bare: leave out legend and caption, where a page has its own.
    """
    count = max(len(panels), 1)
    per_row = count if count <= 4 else 3
    rows = -(-count // per_row)
    width = (0.75 if bare else 1) * COLUMN if count == 1 else 2 * COLUMN  # smaller: larger letters on a page
    text = (
        f"{f'{where}. ' if where else ''}{n_bins} equal-width bins. Error bars: 95 % binomial (Wilson) "
        f"intervals of a bin's accuracy. Bins with fewer than {FEW} questions are faded."
    )
    # Placed by hand, in inches: both parts of a panel have one width, and the lower one is square.
    side = (width - _LEFT - _RIGHT - _BETWEEN * (per_row - 1)) / per_row
    upper = max(0.36 * side, 0.72)
    panel_height = _TITLE + upper + _GAP + side + _X_AXIS
    legend_at = caption_height(text, width)
    below = 0.0 if bare else legend_at + (0.34 if count == 1 else 0.22)
    height = rows * panel_height + below
    figure = Figure(figsize=(width, height))
    tallest = max((_shares(panel, n_bins).max(initial=0.0) for panel in share or panels), default=1.0)
    for index, panel in enumerate(panels):
        row, column = divmod(index, per_row)
        left, low = _LEFT + column * (side + _BETWEEN), below + (rows - 1 - row) * panel_height + _X_AXIS
        under = figure.add_axes((left / width, low / height, side / width, side / height))
        above = figure.add_axes((left / width, (low + side + _GAP) / height, side / width, upper / height))
        _histogram(above, panel, n_bins, tallest, first=column == 0)
        _diagram(under, panel, n_bins, first=column == 0)
    if not panels:
        said(figure.subplots(), "No answers to draw.")
    if bare:
        return figure
    figure.legend(
        handles=[
            Patch(facecolor=PRE, edgecolor=INK, lw=0.4, label="accuracy"),
            Patch(facecolor=_GAP_COLOUR, hatch="////", edgecolor=POST, lw=0.4, label="gap to confidence"),
            Line2D([], [], color=INK, lw=0.9, ls="--", label="avg. accuracy"),
            Line2D([], [], color=POST, lw=0.9, ls="--", label="avg. confidence"),
            Line2D([], [], color=QUIET, lw=0.8, ls=(0, (4, 2)), label="perfect calibration"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, (legend_at - 0.03) / height),
        ncols=3 if count == 1 else 5,
        columnspacing=1.0,
        handlelength=1.5,
        handletextpad=0.4,
        borderaxespad=0.1,
    )
    caption(figure, text)
    return figure


def wilson(right: npt.ArrayLike, n: npt.ArrayLike) -> tuple[Floats, Floats]:
    """95 % intervals of a share (Wilson 1927): lower and upper ends; (0, 1) where n is 0.

    >>> low, high = wilson([5], [10]); round(float(low[0]), 3), round(float(high[0]), 3)
    (0.237, 0.763)
    """
    count = np.asarray(n, dtype=np.float64)
    share = np.asarray(right, dtype=np.float64) / np.maximum(count, 1.0)
    scale = 1.0 / (count + _Z**2)
    middle = (count * share + _Z**2 / 2) * scale
    reach = _Z * scale * np.sqrt(count * share * (1 - share) + _Z**2 / 4)
    return np.asarray(np.clip(middle - reach, 0.0, 1.0)), np.asarray(np.clip(middle + reach, 0.0, 1.0))


def _shares(panel: Panel, n_bins: int) -> Floats:
    if not len(panel.outcomes):
        return np.zeros(n_bins)
    return np.asarray(reliability_bins(panel.outcomes, n_bins).count / len(panel.outcomes))


def _histogram(axes: Axes, panel: Panel, n_bins: int, tallest: float, *, first: bool) -> None:
    axes.set_title(label(panel.title, 32), fontsize=7.5)
    middle = (np.arange(n_bins) + 0.5) / n_bins
    axes.bar(
        middle, 100 * _shares(panel, n_bins), width=1 / n_bins, color="#9AA0A6", edgecolor="white", lw=0.4
    )
    if len(panel.outcomes):
        axes.axvline(float(panel.outcomes.correct.mean()), color=INK, lw=0.9, ls="--")
        axes.axvline(float(panel.outcomes.confidence.mean()), color=POST, lw=0.9, ls="--")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 100 * tallest * 1.08 or 1.0)
    axes.set_xticks(_TICKS, [])
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    if first:
        axes.set_ylabel("% of questions", fontsize=6.5)
        axes.yaxis.set_label_coords(-0.32 / _side(axes), 0.5)
    else:
        axes.tick_params(labelleft=False)


def _side(axes: Axes) -> float:
    """Width of the axes in inches."""
    figure = axes.get_figure(root=True)
    return float(axes.get_position().width * (figure.get_figwidth() if figure else 1.0))


def _diagram(axes: Axes, panel: Panel, n_bins: int, *, first: bool) -> None:
    axes.plot([0, 1], [0, 1], color=QUIET, lw=0.8, ls=(0, (4, 2)), zorder=5)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
    names = [f"{tick:g}" for tick in _TICKS]
    axes.set_xticks(_TICKS, names)
    axes.set_yticks(_TICKS, names if first else [])
    if first:
        axes.set_ylabel("accuracy")
        axes.yaxis.set_label_coords(-0.32 / _side(axes), 0.5)
    if not len(panel.outcomes):
        axes.text(0.5, 0.5, "no questions", ha="center", va="center", color=QUIET)
        return
    bins = reliability_bins(panel.outcomes, n_bins)
    for faded in (False, True):
        _bars(axes, bins, np.flatnonzero((bins.count > 0) & ((bins.count < FEW) == faded)), faded=faded)
    value = float(ece(panel.outcomes, n_bins=n_bins)[0])
    axes.text(
        0.035,
        0.965,
        f"ECE = {value:.3f} ({n_bins} bins)\nn = {len(panel.outcomes):,}",
        va="top",
        ha="left",
        fontsize=6.5,
        linespacing=1.35,
        zorder=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def _bars(axes: Axes, bins: ReliabilityBins, index: npt.NDArray[np.intp], *, faded: bool) -> None:
    middle, width = (bins.low + bins.high)[index] / 2, (bins.high - bins.low)[index]
    accuracy, confidence, count = bins.accuracy[index], bins.confidence[index], bins.count[index]
    alpha = 0.3 if faded else 1.0
    axes.bar(middle, accuracy, width, color=PRE, edgecolor=INK, lw=0.4, alpha=alpha, zorder=2)
    gap, bottom = np.abs(confidence - accuracy), np.minimum(confidence, accuracy)
    # White below the gap: one colour, whether it lies on top of the bar or (under-confident) inside it.
    axes.bar(middle, gap, width, bottom=bottom, color="white", lw=0, zorder=2.4)
    axes.bar(
        middle,
        gap,
        width,
        bottom=bottom,
        facecolor=_GAP_COLOUR,
        edgecolor=POST,
        hatch="////",
        lw=0.4,
        alpha=alpha,
        zorder=2.5,
    )
    axes.hlines(accuracy, middle - width / 2, middle + width / 2, color=INK, lw=1.1, alpha=alpha, zorder=3)
    low, high = wilson(accuracy * count, count)
    axes.errorbar(
        middle,
        accuracy,
        yerr=np.maximum([accuracy - low, high - accuracy], 0.0),
        fmt="none",
        ecolor=INK,
        elinewidth=0.7,
        capsize=1.2,
        capthick=0.5,
        alpha=min(2 * alpha, 1.0),
        zorder=4,
    )
