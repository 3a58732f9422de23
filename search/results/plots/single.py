"""The front of one objective: its best value, over the trial's number."""

from __future__ import annotations

from matplotlib.axes import Axes

from objectives.questions.questions import Split
from search.results.board import Board
from search.results.picks import named_picks
from search.results.plots.style import FAINT, FRONT, HALO, INK, KNEE, PARENTS, axis_label, whole_numbers


def draw_one_objective(axes: Axes, board: Board, split: Split) -> None:
    """Value over the trial's number: with one objective the front is the best value."""
    name, maximize = board.objectives[0]
    best = named_picks(board)["knee"].trial
    for row in board.rows:
        cell = row.on(split).get(name)
        if cell is None:
            continue
        colour = PARENTS.get(row.kind, FAINT if row.kind == "search" else "white")
        colour = FRONT if row.front and row.kind == "search" else colour
        marker, edge = ("o", "white") if row.kind == "search" else ("D", FRONT if row.front else INK)
        if row.front or row.kind in PARENTS:
            axes.plot(
                [row.trial] * 2, [cell.low, cell.high], color=PARENTS.get(row.kind, FRONT), lw=0.8, zorder=3
            )
        size = 5.0 if row.front or row.kind in PARENTS else 3.2
        axes.plot(row.trial, cell.value, marker, color=colour, mec=edge, mew=0.6, ms=size, zorder=4)
        if row.kind in PARENTS:
            axes.axhline(cell.value, color=colour, lw=0.6, ls=(0, (4, 2)), zorder=1)
            axes.annotate(
                row.label,
                (1.0, cell.value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 2),
                ha="right",
                textcoords="offset points",
                color=colour,
                fontweight="bold",
                path_effects=HALO,
                zorder=10,
            )
        if row.trial == best:
            axes.plot(row.trial, cell.value, "*", color=KNEE, ms=9.5, mec=INK, mew=0.6, zorder=9)
    axes.margins(0.06, 0.12)
    whole_numbers(axes)
    axes.set_xlabel("trial")
    axes.set_ylabel(axis_label(name, maximize))
