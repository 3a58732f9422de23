"""A comparison in one picture: what fronts reach on unseen questions, and how fast they grew."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from search.results.compare.entrants import LINE
from search.results.compare.standings import Outcome, Standings
from search.results.plots.style import (
    COLUMN,
    FRONT,
    INK,
    KNEE,
    POST,
    PRE,
    QUIET,
    axis_label,
    canvas,
    caption,
    caption_height,
    drawn,
    label,
    said,
)

Floats = npt.NDArray[np.float64]

_HEIGHT = 2.9
# Okabe and Ito (2008) once more; the line is always grey.
_COLOURS = (FRONT, PRE, POST, "#CC79A7", "#56B4E9", "#E69F00", INK, KNEE)


@drawn
def comparison_figure(found: Standings) -> Figure:
    """Left: median attainment surfaces over the seeds on the report split. Right: hypervolume over scored tokens.

    The surface passes through what at least half of an engine's seeds attain (Grunert da Fonseca, Fonseca and Hall
    2001). The curve is the median of the seeds on the search split, the band their range; dots at the end of the budget
    are the means on the report split.
    """
    text = (
        f"{found.study}: {found.budget / found.evaluation:.0f} evaluations' worth of tokens for each study. Left: what "
        f"half of the seeds attain on the report split ({found.questions['report']:,} questions); star: post with a "
        f"fitted temperature. Right: hypervolume on the search split, median and range of the seeds; dots: mean on the "
        f"report split, over its own corner."
    )
    width = 2.4 * COLUMN
    below = caption_height(text, width)
    figure = canvas(width, _HEIGHT + below, below)
    left, right = figure.subplots(1, 2)
    labels = [one.label for one in found.standings]
    others = [name for name in sorted(labels) if name != LINE]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)} | {LINE: QUIET}
    by_label = {name: [one for one in found.outcomes if one.label == name] for name in labels}
    _draw_attainment(left, found, by_label, colours)
    _draw_growth(right, found, by_label, colours)
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.6)
    caption(figure, text)
    return figure


def _draw_attainment(
    axes: Axes, found: Standings, by_label: dict[str, list[Outcome]], colours: dict[str, str]
) -> None:
    axes.set_title("on unseen questions")
    if len(found.objectives) != 2:
        said(axes, "attainment surfaces", "are drawn for two objectives")
        return
    (first, up), (second, second_up) = found.objectives
    sign = np.where([up, second_up], -1.0, 1.0)
    corner = sign * [found.reference[first], found.reference[second]]
    for name, outcomes in by_label.items():
        surface = _median_attainment([sign * one.points for one in outcomes], corner)
        if len(surface):
            xy = sign * _staircase(surface, corner)
            axes.plot(*xy.T, color=colours[name], lw=1.2 if name != LINE else 1.6, label=label(name, 30))
    if (rival := found.temperature) is not None:
        point = (rival.values[first].value, rival.values[second].value)
        axes.plot(*point, "*", color=POST, ms=8, mec="white", mew=0.6, zorder=5)
    axes.set_xlabel(axis_label(first, up))
    axes.set_ylabel(axis_label(second, second_up))


def _median_attainment(sets: list[Floats], corner: Floats) -> Floats:
    """`(p, 2)` points, ascending, of what half of the sets attain; all to be minimised, beyond the corner left out."""
    from moocore import eaf

    inside = [points[(points < corner).all(axis=1)] for points in sets]
    if sum(len(points) > 0 for points in inside) * 2 < len(sets) or not any(map(len, inside)):
        return np.empty((0, 2))
    numbers = np.concatenate([np.full(len(points), i + 1) for i, points in enumerate(inside)])
    # An empty set attains nothing: it is counted by the percentile, which is one of all sets.
    share = 50.0 * len(sets) / sum(len(points) > 0 for points in inside)
    surface = eaf(np.concatenate(inside), numbers, percentiles=[min(share, 100.0)])[:, :2]
    return np.asarray(surface[np.argsort(surface[:, 0], kind="stable")])


def _staircase(surface: Floats, corner: Floats) -> Floats:
    """The border of what ascending points attain, up to the corner: `(q, 2)`."""
    x = np.append(np.repeat(surface[:, 0], 2), corner[0])
    y = np.concatenate([[corner[1]], np.repeat(surface[:, 1], 2)])
    return np.stack([x, y], axis=1)


def _draw_growth(
    axes: Axes, found: Standings, by_label: dict[str, list[Outcome]], colours: dict[str, str]
) -> None:
    axes.set_title("growth")
    grid = np.linspace(0.0, found.budget, 241)
    for name, outcomes in by_label.items():
        curves = np.array([_at(one, grid) for one in outcomes])
        x = grid / found.evaluation
        axes.plot(
            x, np.median(curves, axis=0), color=colours[name], label=label(name, 30), drawstyle="steps-post"
        )
        if len(curves) > 1:
            band = curves.min(axis=0), curves.max(axis=0)
            axes.fill_between(x, *band, color=colours[name], alpha=0.12, lw=0, step="post")
        mean = np.mean([one.report[-1].value for one in outcomes])
        axes.plot(x[-1], mean, "o", color=colours[name], ms=4, mec="white", mew=0.6, clip_on=False, zorder=5)
    axes.set_xlabel("scored tokens, in evaluations of the search split")
    axes.set_ylabel("hypervolume (higher is better →)")
    axes.set_ylim(bottom=0.0)


def _at(one: Outcome, tokens: Floats) -> Floats:
    """Hypervolume on the search split after so many tokens; 0 before the first trial."""
    place = np.searchsorted(np.array(one.tokens), tokens, side="right")
    return np.concatenate([[0.0], one.volumes])[place]
