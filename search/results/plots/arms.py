"""Arms in the picture of the front: numbered balls, moved aside where something lies, with a line to their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from objectives.questions.questions import Split
from search.results.arms import SWITCH, Arm
from search.results.board import Board
from search.results.plots.style import ARM

_APART = 9.0  # points between the middles of two balls, or of a ball and a parent
_PANEL = np.array([205.0, 165.0])  # points: about what a panel is wide and high
_ANGLES = np.deg2rad(np.arange(0, 360, 45) + 22.5)

Floats = npt.NDArray[np.float64]


def draw_arms(
    axes: Axes, board: Board, split: Split, names: Sequence[str], taken: Sequence[tuple[Floats, Floats]]
) -> None:
    """Draws every arm with these two objectives on a split; the trained switcher is filled. Limits must be set.

    Args:
        taken: what must stay to be seen: points `(2,)` of the objectives, and how many points of paper `(2,)` from
            there it lies.
    """
    low = np.array([axes.get_xlim()[0], axes.get_ylim()[0]])
    scale = _PANEL / (np.array([axes.get_xlim()[1], axes.get_ylim()[1]]) - low)
    places = [(point - low) * scale + offset for point, offset in taken]
    for number, arm in enumerate(board.arms, start=1):
        cells = arm.on(split)
        if not {*names} <= cells.keys():
            continue
        point = np.array([cells[name].value for name in names])
        at = (point - low) * scale
        if (at < 0).any() or (at > _PANEL).any():
            continue  # the caption says so
        moved = _free(at, places)
        places.append(at + moved)
        aside = bool(moved.any())
        if aside:
            axes.plot(*point, "o", color=ARM, ms=1.6, mew=0, zorder=9.4)
        axes.annotate(
            str(number),
            (float(point[0]), float(point[1])),
            xytext=(float(moved[0]), float(moved[1])),
            textcoords="offset points",
            ha="center",
            va="center",
            color="white" if arm.label == SWITCH else ARM,
            fontsize=4.8,
            fontweight="bold",
            zorder=9.5,
            bbox={
                "boxstyle": "circle,pad=0.22",
                "facecolor": ARM if arm.label == SWITCH else "white",
                "edgecolor": ARM,
                "linewidth": 0.7,
            },
            arrowprops={"arrowstyle": "-", "color": ARM, "lw": 0.6, "shrinkA": 0, "shrinkB": 0}
            if aside
            else None,
        )


def arms_legend(arms: Sequence[Arm]) -> list[Line2D]:
    """Entries for a legend; the caption has the names."""
    others = [number for number, arm in enumerate(arms, start=1) if arm.label != SWITCH]
    found = []
    if len(others) < len(arms):
        found.append(Line2D([], [], color=ARM, marker="o", ms=6, mec=ARM, mew=0.7, lw=0, label="switch"))
    if others:
        span = str(others[0]) if len(others) == 1 else f"{others[0]} to {others[-1]}"
        ring = Line2D(
            [], [], color="white", marker="o", ms=6, mec=ARM, mew=0.7, lw=0, label=f"{span}: see below"
        )
        found.append(ring)
    return found


def _free(at: Floats, places: Sequence[Floats]) -> Floats:
    """How far to move a ball, `(2,)` points, so that it touches nothing and stays inside; zeros if it need not."""
    tries = [np.zeros(2)]
    tries += [
        np.round(far * _APART * np.array([np.cos(a), np.sin(a)]), 6)
        for far, a in product((1.2, 1.7, 2.4, 3.2), _ANGLES)
    ]
    for moved in tries:
        there = at + moved
        inside = (there > 4).all() and (there < _PANEL - 4).all()
        if (inside or not moved.any()) and all(np.hypot(*(there - place)) >= _APART for place in places):
            return moved
    return tries[0]
