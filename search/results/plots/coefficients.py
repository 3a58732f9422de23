"""What was found: the coefficients of the picks by depth and component, from `pre` (blue) to `post` (red)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from search.config.sections import SpaceConfig
from search.errors import ConfigError
from search.merging.groups import group_tensors, layer_of_group
from search.merging.space import by_expert
from search.results.board import Board, Row
from search.results.picks import named_picks
from search.results.plots.style import (
    COLUMN,
    INK,
    POST,
    PRE,
    QUIET,
    canvas,
    caption,
    caption_height,
    drawn,
    label,
)

_SHORT = {"embeddings": "emb", "final_norm": "norm", "head": "head", "all": "all tensors", "other": "other"}
_BEFORE = ("embeddings",)  # drawn left of the layers, the other groups outside the layers right of them
_ROW_HEIGHT = 0.24


@dataclass(frozen=True)
class Scale:
    """Colours of coefficients: 0 has that of `pre`, 1 that of `post`, 0.5 is white, beyond is darker."""

    norm: Normalize
    colours: LinearSegmentedColormap

    @classmethod
    def over(cls, values: Iterable[float]) -> Scale:
        reach = max(0.5, *(abs(value - 0.5) for value in values))
        at_pre = 0.5 - 0.25 / reach
        nodes = [(at_pre, PRE), (0.5, "#F7F7F7"), (1 - at_pre, POST)]
        if at_pre > 0:
            nodes = [(0.0, _mixed(PRE, reach)), *nodes, (1.0, _mixed(POST, reach))]
        return cls(Normalize(0.5 - reach, 0.5 + reach), LinearSegmentedColormap.from_list("pre-post", nodes))

    def __call__(self, value: float) -> tuple[float, float, float, float]:
        return self.colours(float(self.norm(value)))


def _mixed(colour: str, reach: float) -> str:
    """The colour darkened the more, the farther the scale goes beyond the parents."""
    share = max(0.35, 0.5 / reach)
    red, green, blue = to_rgb(colour)
    return to_hex((share * red, share * green, share * blue))


@dataclass(frozen=True)
class Grid:
    """Coefficients of one recipe by place; `layers` are (depth, component, column name, coefficient)."""

    layers: tuple[tuple[float, str, str, float], ...]
    outside: tuple[tuple[str, float], ...]
    averaged: bool

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(component for _, component, _, _ in self.layers))

    @property
    def columns(self) -> tuple[tuple[float, str], ...]:
        """Depth and name of each column, from the first layer to the last."""
        return tuple(sorted({(depth, name) for depth, _, name, _ in self.layers}))


def coefficient_grid(coefficients: Mapping[str, float]) -> Grid:
    """Where each coefficient of a recipe belongs in a picture by layer.

    Groups of a layer or block have a cell of their own. With one coefficient per tensor (granularity `tensor`) a
    cell is the mean over the tensors of one layer and component, each tensor counting once; tensors whose place is
    unknown are averaged as `other`.

    >>> coefficient_grid({"layer.0.mlp": 0.25, "head": 1.0}).layers
    ((0.0, 'mlp', '0', 0.25),)
    """
    known = {*_SHORT, *(name for name in coefficients if layer_of_group(name) is not None)}
    averaged = not known.issuperset(coefficients)
    cells = _means(coefficients) if averaged else coefficients
    layers, outside = [], []
    for name, value in cells.items():
        place = layer_of_group(name)
        if place is None:
            outside.append((name, value))
        else:
            layers.append((place[0], place[1], name.split(".")[1], value))
    return Grid(tuple(layers), tuple(outside), averaged)


def _means(coefficients: Mapping[str, float]) -> dict[str, float]:
    """Means over tensors by layer and component."""
    by_layer = SpaceConfig(granularity="layer", components=["attention", "mlp", "norms"])

    placed: list[str] = []
    for name in coefficients:
        try:
            group_tensors([name], by_layer)
            placed.append(name)
        except ConfigError:
            continue
    means = {
        group.name: float(np.mean([coefficients[tensor] for tensor in group.tensors]))
        for group in group_tensors(placed, by_layer)
    }
    other = [value for name, value in coefficients.items() if name not in set(placed)]
    return {**means, "other": float(np.mean(other))} if other else means


@drawn
def coefficients_figure(board: Board) -> Figure:
    """A heat map a pick: depth from left to right, a row a component; white is halfway between parents."""
    picks: dict[int, tuple[list[str], Row]] = {}
    for name, row in named_picks(board).items():
        picks.setdefault(row.trial, ([], row))[0].append(name)
    drawings = [drawing for names, row in picks.values() for drawing in _drawings(names, row)]
    grids = [grid for _, _, grid in drawings]
    first = grids[0]
    cells = max(len(first.columns) + len(first.outside), 1)
    width = COLUMN if cells <= 44 else 2 * COLUMN
    several = len(board.of_kind("expert")) > 1
    end = "expert" if several else "post"
    text = f"0 is pre, 1 is {'the ' if several else ''}{end}; the uniform line has one colour everywhere."
    if first.averaged:
        text += " One coefficient a tensor: a cell is the mean over the tensors of one layer and component."
    below = caption_height(text, width)
    panel = _ROW_HEIGHT * max(len(first.components), 1) + 0.34
    height = panel * len(grids) + 0.66 + below
    figure = canvas(width, height, below)
    panels = figure.subplots(len(grids), 1, squeeze=False)[:, 0]
    values = [
        value for grid in grids for value in (*(c[3] for c in grid.layers), *(v for _, v in grid.outside))
    ]
    scale = Scale.over(values)
    for axes, (title, mean, grid) in zip(panels, drawings, strict=True):
        axes.set_title(label(title, 46), fontsize=7.5, pad=3)
        axes.set_title(f"mean {mean:.2f}", loc="right", fontsize=6.5, fontweight="normal", color=QUIET, pad=3)
        _draw(axes, grid, scale, numbers=cells <= 8, bottom=axes is panels[-1], inches=width - 0.6)
    bar = figure.colorbar(
        ScalarMappable(scale.norm, scale.colours),
        ax=list(panels),
        location="bottom",
        aspect=45,
        pad=0.02,
        fraction=0.05,
    )
    ticks = [0.0, 0.5, 1.0]
    bar.set_ticks(ticks, labels=["0  pre", "0.5", f"{end}  1"])
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(length=2, labelsize=6.5)
    caption(figure, text)
    return figure


def _drawings(names: Sequence[str], row: Row) -> list[tuple[str, float, Grid]]:
    """Title, mean coefficient and grid of each panel of a pick: one an expert, but one for all with a cell each."""
    title, experts = f"{', '.join(names)}: {row.label}", by_expert(row.coefficients)
    if len(experts) > 1 and all(len(each) == 1 for each in experts.values()):
        cells = tuple((expert, value) for expert, each in experts.items() for value in each.values())
        return [(title, float(np.mean([value for _, value in cells])), Grid((), cells, averaged=False))]
    return [
        (
            f"{title}, {expert}" if expert else title,
            float(np.mean(list(each.values()))),
            coefficient_grid(each),
        )
        for expert, each in experts.items()
    ]


def _draw(axes: Axes, grid: Grid, scale: Scale, *, numbers: bool, bottom: bool, inches: float) -> None:
    components = grid.components or ("",)
    rows = len(components)
    cells = len(grid.columns) + len(grid.outside)
    gap = max(0.3, 0.012 * cells)  # between the layers and what lies outside them, in cells
    ticks: list[tuple[float, str]] = []
    across: list[tuple[float, str]] = []

    def cell(x: float, y: float, height: float, value: float) -> None:
        colour = scale(value)
        axes.add_patch(Rectangle((x, y), 1, height, facecolor=colour, edgecolor="white", lw=0.4))
        if numbers:
            dark = sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=False)) < 0.5
            axes.text(
                x + 0.5,
                y + height / 2,
                f"{value:.2f}".replace("-", "\u2212"),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else INK,
            )

    def beside(names: Sequence[tuple[str, float]], x: float) -> float:
        for name, value in names:
            cell(x, 0, rows, value)
            across.append((x + 0.5, _SHORT.get(name, name)))
            x += 1 + gap
        return x

    left = beside([pair for pair in grid.outside if pair[0] in _BEFORE], 0.0)
    start = {depth: left + index for index, (depth, _) in enumerate(grid.columns)}
    for depth, component, _, value in grid.layers:
        cell(start[depth], rows - 1 - components.index(component), 1, value)
    letters = max((len(name) for _, name in grid.columns), default=1)
    every = math.ceil((0.05 * letters + 0.04) * cells / inches)
    ticks += [(start[depth] + 0.5, name) for i, (depth, name) in enumerate(grid.columns) if i % every == 0]
    right = left + len(start) + (gap if start else 0.0)
    right = beside([pair for pair in grid.outside if pair[0] not in _BEFORE], right) - gap
    axes.set_xlim(0, right)
    axes.set_ylim(0, rows)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(
        [rows - 0.5 - i for i in range(rows)], [label(c) for c in components] if grid.components else [""]
    )
    if not bottom:
        axes.set_xticks([])
        return
    axes.set_xticks([t for t, _ in (*ticks, *across)], [label(n, 12) for _, n in (*ticks, *across)])
    for text in axes.get_xticklabels()[len(ticks) :] if cells > 10 else ():
        text.set(rotation=90, fontsize=5.5)
    if grid.layers:
        axes.set_xlabel("layer, from the input to the output", labelpad=2)
