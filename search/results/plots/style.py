"""One look for all pictures: colours, sizes, any text drawn safely, and the same bytes every time."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from objectives.printable import printable

# Okabe and Ito (2008): told apart with every common colour blindness.
PRE = "#0072B2"  # blue
POST = "#D55E00"  # vermilion
FRONT = "#009E73"  # bluish green
KNEE = "#F0E442"  # yellow
ARM = "#A0487B"  # reddish purple, darker: white digits stand on it
INK = "#1A1A1A"
QUIET = "#5F6368"  # captions, reference, grid labels: 6:1 on white
FAINT = "#B4B8BD"  # dominated trials
SHADE = "#EDEFF1"  # areas that belong to the baselines

PARENTS = {"pre": PRE, "post": POST, "expert": POST}  # by the kind of a trial
HALO = [withStroke(linewidth=2.2, foreground="white")]  # keeps text legible on lines

COLUMN = 3.45  # inches: one column of a paper, or a phone
DPI = 300

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 7.5,
    "axes.edgecolor": "#80868B",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#ECEDEF",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.color": "#80868B",
    "ytick.color": "#80868B",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "text.color": INK,
    "text.usetex": False,
    "lines.linewidth": 1.2,
    "savefig.dpi": DPI,
    "svg.fonttype": "path",
    "svg.hashsalt": "mergefront",  # without it every SVG has random ids
    "path.simplify": True,
}

P = ParamSpec("P")


@dataclass(frozen=True)
class Picture:
    """One picture as the bytes of its two files; `width` in inches."""

    png: bytes
    svg: bytes
    width: float


@contextmanager
def _styled() -> Iterator[None]:
    # "default" first: a matplotlibrc of the user's must not change what a study looks like.
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn for such a letter
        yield


def drawn(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes a figure function draw in the house style, whatever the settings around it."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _styled():
            return function(*args, **kwargs)

    return inside


def render(figure: Figure) -> Picture:
    """The figure as PNG (300 dpi) and SVG; equal figures give equal bytes."""
    png = _saved(figure, "png")
    figure.set_layout_engine("none")  # it is laid out now; doing so again takes as long as drawing
    return Picture(png, render_svg(figure), float(figure.get_figwidth()))


def render_svg(figure: Figure) -> bytes:
    """The figure as SVG alone, for pages."""
    return _saved(figure, "svg")


def _saved(figure: Figure, kind: str) -> bytes:
    unset = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    stream = io.BytesIO()
    with _styled():
        figure.savefig(stream, format=kind, metadata=unset)
    return stream.getvalue()


def label(text: str, limit: int | None = None) -> str:
    r"""Any text as matplotlib may draw it: printable, no mathematics between dollars, cut to `limit`.

    >>> label("$x$ of a study", limit=8)
    '\\$x\\$ of \u2026'
    """
    shown = printable(text)
    if limit is not None and len(shown) > limit:
        shown = shown[: limit - 1] + "\u2026"
    return shown.replace("$", r"\$")


def axis_label(name: str, maximize: bool) -> str:
    """An axis title with an arrow towards better; turned by 90 degrees on a y axis it still points there."""
    better = "higher is better \u2192" if maximize else "\u2190 lower is better"
    return f"{label(name, 40)}  ({better})"


def canvas(
    width: float, height: float, below: float, *, wspace: float = 0.04, hspace: float = 0.02
) -> Figure:
    """An empty figure of `width` x `height` inches that lays itself out above its lowest `below` inches."""
    rect = (0.0, below / height, 1.0, 1.0 - below / height)
    return Figure(
        figsize=(width, height), layout=ConstrainedLayoutEngine(rect=rect, wspace=wspace, hspace=hspace)
    )


def whole_numbers(axes: Axes) -> None:
    """Puts ticks on whole numbers only: trials."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def caption(figure: Figure, text: str, *, y: float = 0.05) -> None:
    """Puts a wrapped small caption at the lower left; `y` inches above the lower edge."""
    width = figure.get_figwidth()
    figure.text(
        0.08 / width,
        y / figure.get_figheight(),
        caption_lines(text, width),
        fontsize=6,
        color=QUIET,
        va="bottom",
        linespacing=1.35,
    )


def caption_lines(text: str, width: float) -> str:
    """The caption wrapped for a figure of `width` inches."""
    return "\n".join(textwrap.wrap(label(text), int(23 * width)))


def caption_height(text: str, width: float) -> float:
    """Inches that `caption` takes."""
    return 0.115 * (caption_lines(text, width).count("\n") + 1) + 0.08


def said(axes: Axes, *lines: str) -> None:
    """Says in the middle of empty axes why they are empty."""
    axes.set_axis_off()
    text = "\n".join(label(line) for line in lines)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)
