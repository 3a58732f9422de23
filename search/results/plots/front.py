"""The front with all that it must be compared to, per split: what a reader of a study looks at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from objectives.questions.questions import Split
from search.front import non_dominated
from search.results.arms import Arm
from search.results.board import SPLITS, Board, Row
from search.results.picks import named_picks
from search.results.plots.arms import arms_legend, draw_arms
from search.results.plots.single import draw_one_objective
from search.results.plots.style import (
    COLUMN,
    FAINT,
    FRONT,
    HALO,
    INK,
    KNEE,
    PARENTS,
    POST,
    QUIET,
    SHADE,
    axis_label,
    canvas,
    caption,
    caption_height,
    drawn,
    label,
    said,
)

Floats = npt.NDArray[np.float64]

_PANEL_HEIGHT = 2.75
_MANY = 1500  # dots from which on the SVG holds them as a bitmap
_GAIN = "#C9EADF"  # the front's green on white
_NAME = np.array([0.2, 0.1])  # of the parents' spread: within so much their names would overlap


@drawn
def front_figure(board: Board, splits: Sequence[Split], setting: str = "") -> Figure:
    """A column of panels per split, a row per pair of the first three objectives, with common limits.

    Dominated trials are grey, the front is green with its attainment staircase, parents and uniform line are
    diamonds, a star marks the knee, bars are 95 % intervals. With two objectives the areas up to the
    reference point are filled: what the uniform line dominates in grey, what the front adds in green. With one
    objective the x axis is the trial's number. What several checkpoints write together is a numbered ball, filled for
    the trained switcher; the caption has the names.

    Args:
        setting: how the trials were proposed, for the caption, such as `optuna tpe, seed 0`.
    """
    pairs = list(combinations(range(min(len(board.objectives), 3)), 2))
    drawings: list[tuple[int, int] | None] = [*pairs] or [None]
    rows, width = len(drawings), COLUMN * len(splits)
    text = _caption(board, splits, setting)
    columns = 6 if len(splits) > 1 else 3
    handles = _legend(len(board.objectives), calibrated=bool(board.alternatives), arms=board.arms)
    below = caption_height(text, width) + 0.06 + 0.14 * -(-len(handles) // columns)
    height = _PANEL_HEIGHT * rows + below + 0.08
    figure = canvas(width, height, below)
    panels = figure.subplots(rows, len(splits), squeeze=False)
    for column, split in enumerate(splits):
        scored = any(row.on(split) for row in board.rows)
        for panel, pair in zip(panels[:, column], drawings, strict=True):
            if not scored:
                said(panel, f"The {split} split is scored", "when the search is complete.")
            elif pair is None:
                draw_one_objective(panel, board, split)
            else:
                _Panel(panel, board, split, pair).draw(first=column == 0)
        questions = f"{board.questions.get(split, 0):,}{' unseen' if split == 'report' else ''} questions"
        panels[0, column].set_title(f"{split.capitalize()} split: {questions}")
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, (caption_height(text, width) - 0.02) / height),
        ncols=columns,
        columnspacing=1.2,
        handletextpad=0.4,
        borderaxespad=0.1,
    )
    caption(figure, text)
    return figure


def staircase(points: npt.ArrayLike, limit: npt.ArrayLike, *, maximise: Sequence[bool]) -> Floats:
    """Corners `(k, 2)` of the attainment surface of `(n, 2)` points, drawn out to `limit` on the bad side.

    All that lies on its bad side is dominated by one of the points. Dominated points do not change it; no
    points give no corners.

    >>> staircase([[1.0, 1.0], [2.0, 3.0]], [0.0, 9.0], maximise=(True, False)).tolist()
    [[2.0, 9.0], [2.0, 3.0], [1.0, 3.0], [1.0, 1.0], [0.0, 1.0]]
    """
    sign = np.where(np.asarray(maximise), -1.0, 1.0)
    loss = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    loss = np.unique(loss[non_dominated(loss, maximise=maximise)] * sign, axis=0)  # ascending x: descending y
    if not len(loss):
        return np.empty((0, 2))
    end = np.asarray(limit, dtype=np.float64) * sign
    corners = [[loss[0, 0], max(end[1], loss[0, 1])], loss[0].tolist()]
    for before, here in pairwise(loss):
        corners += [[here[0], before[1]], here.tolist()]
    corners.append([max(end[0], loss[-1, 0]), loss[-1, 1]])
    return np.array(corners) * sign + 0.0


class _Panel:
    """One pair of objectives on one split."""

    def __init__(self, axes: Axes, board: Board, split: Split, pair: tuple[int, int]) -> None:
        self.axes, self.board, self.split = axes, board, split
        self.names = [board.objectives[j][0] for j in pair]
        self.maximise = tuple(board.maximize[j] for j in pair)
        self.reference = np.array([board.reference[name] for name in self.names])
        self.scored = [row for row in board.rows if row.on(split)]
        self.taken: list[tuple[Floats, Floats]] = []  # by what has a name or a mark: see draw_arms
        self.whole = len(board.objectives) == 2  # else a projection, in which areas would mislead

    def draw(self, *, first: bool) -> None:
        self.axes.set_xlabel(axis_label(self.names[0], self.maximise[0]))
        self.axes.set_ylabel(axis_label(self.names[1], self.maximise[1]))
        limits = [_limits(self.board, name) for name in self.names]
        self.axes.set(xlim=limits[0], ylim=limits[1])
        if not first:
            self.axes.set_ylabel("")
            self.axes.tick_params(labelleft=False)
        front = [row for row in self.scored if row.front]
        line = [row for row in self.board.uniform_line() if row.on(self.split)]
        if self.whole:
            self._fill(front, _GAIN, zorder=0.3)
            self._fill(line, SHADE, zorder=0.4)
            self.axes.plot(*self.reference, "+", color=QUIET, ms=6, mew=0.9, zorder=4)
        dominated = self._points([row for row in self.scored if not row.front and row.kind == "search"])
        many = len(dominated) > _MANY
        self.axes.plot(*dominated.T, "o", color=FAINT, ms=2.6, mew=0, zorder=2, rasterized=many)
        self._stairs(front)
        self._uniform_line(line)
        tempered = [row for row in self.board.alternatives if {*self.names} <= row.on(self.split).keys()]
        self.axes.plot(*self._points(tempered).T, "^", color="white", ms=4.4, mec=POST, mew=0.9, zorder=7)
        self.taken += [(point, np.zeros(2)) for point in self._points(tempered)]
        for row in front:
            if row.kind not in PARENTS:
                self._bars(row, FRONT, alpha=0.4)
        found = self._points([row for row in front if row.kind == "search"])
        self.axes.plot(*found.T, "o", color=FRONT, ms=4.2, mec="white", mew=0.5, zorder=6)
        knee = named_picks(self.board)["knee"]
        if knee.on(self.split):
            self.axes.plot(*self._points([knee]).T, "*", color=KNEE, ms=9.5, mec=INK, mew=0.6, zorder=9)
            self.taken.append((self._points([knee])[0], np.zeros(2)))
        draw_arms(self.axes, self.board, self.split, self.names, self.taken)

    def _points(self, rows: Sequence[Row | Arm]) -> Floats:
        values = [[row.on(self.split)[name].value for name in self.names] for row in rows]
        return np.array(values, dtype=np.float64).reshape(-1, 2)

    def _fill(self, rows: Sequence[Row], colour: str, zorder: float) -> None:
        """The area that these rows dominate, up to the reference point: their hypervolume."""
        points = self._points(rows)
        good = np.where(self.maximise, 1.0, -1.0)
        inside = points[((points - self.reference) * good > 0).all(axis=1)]
        if len(inside):
            corners = staircase(inside, self.reference, maximise=self.maximise)
            self.axes.fill(*np.vstack([corners, self.reference]).T, color=colour, lw=0, zorder=zorder)

    def _stairs(self, front: Sequence[Row]) -> None:
        points = np.vstack([self._points(front), self.reference])
        limit = np.where(self.maximise, points.min(axis=0), points.max(axis=0))
        corners = staircase(points[:-1], limit, maximise=self.maximise)
        self.axes.plot(*corners.T, color=FRONT, lw=1.3, zorder=4, ls="-" if self.whole else (0, (3, 1.5)))

    def _uniform_line(self, line: Sequence[Row]) -> None:
        points = self._points(line)
        named: list[tuple[float, float]] = []
        path = self._points([row for row in line if row.kind != "expert"])
        self.axes.plot(*path.T, color=INK, lw=0.8, ls=(0, (1, 1.2)), zorder=3)
        for row, (x, y) in zip(line, points, strict=True):
            ring = FRONT if row.front else INK
            if row.kind == "uniform":
                self.axes.plot(
                    x, y, "D", color="white", ms=3.2, mec=ring, mew=1.1 if row.front else 0.7, zorder=5
                )
                continue
            colour = PARENTS[row.kind]
            self._bars(row, colour, alpha=0.8)
            self.axes.plot(
                x, y, "D", color=colour, ms=5.6, mec=FRONT if row.front else "white", mew=0.9, zorder=8
            )
            # Where parents coincide, their names stand on both sides, then further out.
            near = np.abs(np.array([*named, (np.inf, np.inf)]) - (x, y)) < _NAME * np.ptp(points, axis=0)
            named.append((x, y))
            self._name(row.label, colour, (x, y), points.mean(axis=0), int(near.all(axis=1).sum()))

    def _name(self, name: str, colour: str, point: tuple[float, float], middle: Floats, others: int) -> None:
        """Writes a parent's name on the side that looks away from the uniform line; so many others are near."""
        right, up = (point[0] >= middle[0]) != (others % 2 == 1), point[1] >= middle[1]
        lines = 4 + 9 * (others // 2)
        there = np.array(point)
        self.taken.append((there, np.zeros(2)))
        for step in range(0, 5 * len(label(name, 16)), 5):
            across, along = (9 + step) * (1 if right else -1), (lines + 4) * (1 if up else -1)
            self.taken.append((there, np.array([across, along])))
        self.axes.annotate(
            label(name, 16),
            point,
            xytext=(5 if right else -5, lines if up else -lines),
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if up else "top",
            color=colour,
            fontweight="bold",
            fontsize=8,
            zorder=10,
            path_effects=HALO,
        )

    def _bars(self, row: Row, colour: str, alpha: float) -> None:
        across, up = (row.on(self.split)[name] for name in self.names)
        style: dict[str, Any] = {
            "color": colour,
            "alpha": alpha,
            "lw": 0.7,
            "zorder": 3.5,
            "solid_capstyle": "butt",
        }
        self.axes.plot([across.low, across.high], [up.value] * 2, **style)
        self.axes.plot([across.value] * 2, [up.low, up.high], **style)


def _limits(board: Board, name: str) -> tuple[float, float]:
    """Limits of an objective's axis, the same on both splits so that these can be compared.

    Front, baselines, their intervals and the reference are inside; dominated trials and arms only as far as half of
    that again on either side, so that one bad merge does not squeeze everything else.
    """
    cells = [(row, row.on(split)[name]) for row in board.rows for split in SPLITS if row.on(split)]
    core = [board.reference[name]]
    core += [x for row, cell in cells if row.front or row.kind != "search" for x in (cell.low, cell.high)]
    core += [row.on(s)[name].value for row in board.alternatives for s in SPLITS if name in row.on(s)]
    low, high = min(core), max(core)
    span = high - low
    if span <= 0:
        span = max(abs(low) * 0.1, 0.02)  # identical points: a frame with the point in its middle
        low, high = low - span / 2, high + span / 2
    values = [cell.value for _, cell in cells]
    values += [arm.on(split)[name].value for arm in board.arms for split in SPLITS if name in arm.on(split)]
    near = [value for value in values if low - span / 2 <= value <= high + span / 2]
    return min([low, *near]) - 0.06 * span, max([high, *near]) + 0.06 * span


def _caption(board: Board, splits: Sequence[Split], setting: str) -> str:
    text = f"{board.study}: {len(board.rows)} trials, {len(board.of_kind('search'))} from the search"
    text += (
        f"{f' ({setting})' if setting else ''}; {len(board.front)} on the front, chosen on the search split. "
    )
    if len(board.objectives) > 2:
        text += f"Pairs of the first 3 of {len(board.objectives)} objectives; the front is that of all. "
    volumes = [
        f"{split} {board.hypervolume[split].front:.4f} vs {board.hypervolume[split].uniform:.4f}"
        for split in splits
        if any(row.on(split) for row in board.rows)
    ]
    corner = ", ".join(f"{name} {value:.3f}" for name, value in board.reference.items())
    text += (
        f"Hypervolume, front vs uniform line: {', '.join(volumes)}; reference {corner}. " if volumes else ""
    )
    text += "Bars: 95 % bootstrap intervals."
    if len(board.objectives) == 1:
        return text
    if board.arms:
        named = ", ".join(f"{arm.label} ({number})" for number, arm in enumerate(board.arms, start=1))
        text += f" Balls, other ways to use the checkpoints together: {named}."
    frame = {name: _limits(board, name) for name, _ in board.objectives[:3]}
    outside = sum(_is_outside(row, splits[0], frame) for row in board.rows)
    missing = [f"{outside} dominated trials"] if outside else []
    for arm in board.arms:
        off = [split for split in splits if _is_outside(arm, split, frame)]
        missing += [arm.label if len(off) == len(splits) else f"{arm.label} ({off[0]} split)"] if off else []
    return f"{text} Not shown: {', '.join(missing)} outside the frame." if missing else text


def _is_outside(row: Row | Arm, split: Split, frame: Mapping[str, tuple[float, float]]) -> bool:
    """Whether a row lies outside the frame on a split."""
    cells = row.on(split)
    return any(not low <= cells[name].value <= high for name, (low, high) in frame.items() if name in cells)


def _legend(objectives: int, calibrated: bool, arms: Sequence[Arm]) -> list[Line2D | Patch]:
    one = objectives == 1
    front = Line2D(
        [], [], color=FRONT, marker="o", ms=4.2, mec="white", mew=0.5, lw=0 if one else 1.3, label="front"
    )
    line = Line2D(
        [],
        [],
        color=INK,
        marker="D",
        ms=3.2,
        mfc="white",
        mew=0.7,
        lw=0 if one else 0.8,
        ls=":",
        label="uniform line",
    )
    handles: list[Line2D | Patch] = [
        front,
        Line2D([], [], color=KNEE, marker="*", ms=8, mec=INK, mew=0.6, lw=0, label="best" if one else "knee"),
        line,
        Line2D([], [], color=FAINT, marker="o", ms=3, mew=0, lw=0, label="dominated"),
    ]
    if calibrated and objectives > 1:
        mark = Line2D([], [], color="white", marker="^", ms=4.4, mec=POST, mew=0.9, lw=0, label="calibrated")
        handles.insert(3, mark)
    if objectives > 1:
        handles[3:3] = arms_legend(arms)
    if objectives == 2:
        handles.insert(3, Patch(color=_GAIN, lw=0, label="gain over it"))
        handles.append(Line2D([], [], color=QUIET, marker="+", ms=6, mew=0.9, lw=0, label="reference"))
    return handles
