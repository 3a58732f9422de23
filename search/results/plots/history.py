"""Hypervolume over trials: what each further trial was worth, and when the search passed the uniform line."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from search.front import hypervolume, non_dominated
from search.results.board import Board
from search.results.plots.style import (
    COLUMN,
    FRONT,
    INK,
    QUIET,
    SHADE,
    axis_label,
    canvas,
    caption,
    caption_height,
    drawn,
    whole_numbers,
)


def hypervolumes(board: Board) -> npt.NDArray[np.float64]:
    """`(n,)` hypervolume on the search split of the first 1, 2, ... n trials of the board; never falling."""
    points = board.points(board.rows, "search")
    reference = [board.reference[name] for name, _ in board.objectives]
    kept = np.empty((0, len(board.objectives)))
    volumes: list[float] = []
    for point in points:
        more = np.vstack([kept, point])
        front = non_dominated(more, maximise=board.maximize)
        # A trial that the front so far dominates changes nothing, and most do not.
        volumes.append(
            hypervolume(more[front], reference, maximise=board.maximize) if front[-1] else volumes[-1]
        )
        kept = more[front]
    return np.array(volumes)


@drawn
def hypervolume_figure(board: Board, setting: str = "") -> Figure:
    """Hypervolume of the trials so far; the uniform line's is the mark to pass, the baselines are shaded."""
    corner = ", ".join(f"{name} {value:.3f}" for name, value in board.reference.items())
    text = (
        f"{board.study}: search split, {board.questions.get('search', 0):,} questions; reference {corner}"
        f"{f'; {setting}' if setting else ''}. Dots: trials that raised it."
    )
    below = caption_height(text, COLUMN)
    height = 2.2 + below
    figure = canvas(COLUMN, height, below)
    axes = figure.subplots()
    volumes = hypervolumes(board)
    trials = np.array([row.trial for row in board.rows])
    baselines = max((row.trial for row in board.rows if row.kind != "search"), default=0)
    axes.axvspan(-0.5, baselines + 0.5, color=SHADE, lw=0, zorder=0)
    line = board.hypervolume["search"].uniform
    axes.axhline(line, color=INK, lw=0.9, ls=(0, (1, 1.2)), zorder=2)
    axes.plot(trials, volumes, color=FRONT, drawstyle="steps-post", lw=1.3, zorder=3)
    raised = np.diff(volumes, prepend=0.0) > 0
    axes.plot(trials[raised], volumes[raised], "o", color=FRONT, ms=3.2, mec="white", mew=0.4, zorder=4)
    last = int(trials.max(initial=0))
    axes.set_xlim(-0.5, max(last, baselines) + 0.5)
    top = max(float(volumes.max(initial=0.0)), line)
    axes.set_ylim(*((0.0, top * 1.12) if top > 0 else (-0.2, 1.0)))
    inside: dict[str, Any] = {"fontsize": 6.5, "color": QUIET, "zorder": 5}
    ratio = f" ({volumes[-1] / line:.2f} times)" if line > 0 and board.of_kind("search") else ""
    axes.annotate(
        f"uniform line {line:.4f}",
        (1.0, line),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        **inside,
    )
    axes.annotate(
        f"front {volumes[-1]:.4f}{ratio}",
        (1.0, volumes[-1]),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=6.5,
        color=FRONT,
        fontweight="bold",
        zorder=5,
    )
    if last > baselines:
        axes.annotate(
            "baselines",
            (baselines / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="center",
            va="top",
            rotation=90 if last > 5 * baselines else 0,
            **inside,
        )
    whole_numbers(axes)
    axes.set_xlabel("trial")
    axes.set_ylabel(axis_label("hypervolume", maximize=True))
    axes.set_title("Hypervolume over trials")
    caption(figure, text)
    return figure
