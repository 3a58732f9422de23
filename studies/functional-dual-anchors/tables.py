"""The study's tables and picture, from what its seeds got right on the report half."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experts import GROUPS
from matplotlib.axes import Axes
from numpy.typing import NDArray

from objectives.metrics.bootstrap import interval, resample_weights
from search.results.plots.style import (
    FAINT,
    FRONT,
    INK,
    POST,
    PRE,
    axis_label,
    canvas,
    caption,
    caption_height,
    drawn,
    render,
)

Floats = NDArray[np.float64]
STARTS = ("pre", "task arithmetic", "TSV-Merge", "WUDI")
CONTROLS = ("unoptimised rows", "unoptimised noise", "real data")
PLAIN = ("pre", "task arithmetic", "TSV-Merge", "WUDI")
RIVALS = {"pre": ("task arithmetic",), "task arithmetic": ("FDA(pre)", "TSV-Merge")}
STEPS = (0, 10, 25, 100)
RESAMPLES = 2000
Metric = Callable[[Floats], Floats]


@dataclass(frozen=True, eq=False)
class Results:
    """All seeds on one half of the questions, which are the same for every seed.

    Attributes:
        correct: by row, `(seeds, n)` float64.
        weights: `(1 + resamples, n)`: the questions as they are, then resampled within each group.
    """

    correct: Mapping[str, Floats]
    seconds: Mapping[str, Sequence[float]]
    choices: Mapping[str, Sequence[str]]
    task: NDArray[np.int64]
    weights: Floats

    @classmethod
    def read(cls, folders: Sequence[Path], half: str) -> Results:
        facts = [json.loads((folder / "measured.json").read_text())["rows"] for folder in folders]
        arrays = [np.load(folder / "measured.npz") for folder in folders]
        task = arrays[0][f"task/{half}"]
        assert all(np.array_equal(task, one[f"task/{half}"]) for one in arrays), (
            "one world, one set of questions"
        )
        rows = list(facts[0])
        drawn_ = resample_weights(len(task), RESAMPLES, strata=task)
        return cls(
            {row: np.array([one[f"{row}/{half}"] for one in arrays], dtype=np.float64) for row in rows},
            {row: [one[row]["seconds"] for one in facts] for row in rows},
            {row: [one[row]["choice"] for one in facts] for row in rows},
            task,
            np.concatenate([np.ones((1, len(task))), drawn_]),
        )

    def accuracy(self, row: str) -> Floats:
        """`(1 + resamples, seeds, groups)`."""
        columns = [np.where(self.task == number, self.weights, 0.0) for number in range(len(GROUPS))]
        found = [(w / w.sum(axis=1, keepdims=True)) @ self.correct[row].T for w in columns]
        return np.stack(found, axis=2)

    def mean(self, row: str) -> Floats:
        """Mean accuracy over the groups, `(1 + resamples, seeds)`."""
        return self.accuracy(row).mean(axis=2)

    def share(self, row: str) -> Floats:
        """Accuracy over that of the group's own expert, mean over the groups, `(1 + resamples, seeds)`."""
        own = np.stack([self.accuracy(group)[:, :, k] for k, group in enumerate(GROUPS)], axis=2)
        own = np.maximum(own, 1 / len(self.task))  # an expert that knows nothing counts as one right answer
        return (self.accuracy(row) / own).mean(axis=2)

    def experts(self) -> Floats:
        """Each expert on its own group."""
        return np.stack([self.accuracy(group)[:, :, k] for k, group in enumerate(GROUPS)], axis=2).mean(
            axis=2
        )


def write_tables(folders: Sequence[Path], out: Path) -> str:
    """Markdown of all tables; the picture goes to `order.png` in `out`."""
    results = Results.read(folders, "report")
    (out / "order.png").write_bytes(render(_picture(results)).png)
    text = "\n\n".join((_order(results), _controls(results), _curve(results), _choices(results)))
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    return text


def _order(results: Results) -> str:
    lines = [
        "| merge | accuracy | by seed | of the experts' | seconds |",
        "|---|---|---|---|---|",
        f"| each expert on its own group | {_cell(results.experts())} | {_seeds(results.experts())} | 1 | |",
    ]
    for row in [*PLAIN, *(f"FDA({start})" for start in STARTS)]:
        found = results.mean(row)
        taken = results.seconds[row]
        seconds = "" if row == "pre" else f"{np.mean(taken):.1f}"
        lines.append(
            f"| {row} | {_cell(found)} | {_seeds(found)} | {_cell(results.share(row))} | {seconds} |"
        )
    return "\n".join(lines)


def _controls(results: Results) -> str:
    lines = ["| start | FDA over | difference |", "|---|---|---|"]
    for start in STARTS:
        fda = results.mean(f"FDA({start})")
        for other in (start, *RIVALS.get(start, ()), *_controls_of(results, start)):
            name = other.removesuffix(f"({start})")
            told = "the start itself" if other == start else f"{name}, {_cell(results.mean(other))}"
            lines.append(f"| {start} | {told} | {_difference(fda - results.mean(other))} |")
    return "\n".join(lines)


def _controls_of(results: Results, start: str) -> list[str]:
    return [row for row in results.correct if row.endswith(f"({start})") and row.startswith(CONTROLS)]


def _curve(results: Results) -> str:
    lines = [
        "| steps of construction | FDA(pre) | FDA(task arithmetic) | seconds, FDA(pre) |",
        "|---|---|---|---|",
    ]
    for steps in STEPS:
        cells = [_cell(results.mean(f"{steps} steps({start})")) for start in STARTS[:2]]
        # Without construction it is a control, made before: nothing was computed again.
        seconds = f"{np.mean(results.seconds[f'{steps} steps(pre)']):.1f}" if steps else ""
        lines.append(f"| {steps} | {cells[0]} | {cells[1]} | {seconds} |")
    return "\n".join(lines)


def _choices(results: Results) -> str:
    rows = [row for row in results.choices if row not in (*GROUPS, "pre") and " steps(" not in row]
    lines = ["| merge | chosen on the search half, by seed |", "|---|---|"]
    return "\n".join(lines + [f"| {row} | {'; '.join(results.choices[row])} |" for row in rows])


def _cell(samples: Floats) -> str:
    over = samples.mean(axis=1)
    low, high = interval(over[1:])
    return f"{_number(over[0])} [{_number(low)}, {_number(high)}]"


def _difference(samples: Floats) -> str:
    over = samples.mean(axis=1)
    low, high = interval(over[1:])
    return f"{over[0]:+.3f} [{low:+.3f}, {high:+.3f}]; seeds {', '.join(f'{one:+.3f}' for one in samples[0])}"


def _seeds(samples: Floats) -> str:
    return ", ".join(_number(one) for one in samples[0])


def _number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else f"{value:.3f}"


@drawn
def _picture(results: Results):  # type: ignore[no-untyped-def]
    text = (
        f"Report half, {len(results.task)} questions about the news of four groups, mean over the groups. Bars: mean "
        f"of {len(results.correct['pre'])} seeds of training with 95 % bootstrap interval over questions; dots: "
        "seeds. Dashed: each expert on its own group."
    )
    width, height = 7.0, 3.1
    figure = canvas(width, height, caption_height(text, width))
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1.0))
    _bars(left, results)
    for start, colour in zip(STARTS[:2], (PRE, POST), strict=True):
        values = np.array(
            [results.mean(f"{steps} steps({start})") for steps in STEPS]
        )  # (steps, samples, seeds)
        over = values.mean(axis=2)
        places = np.arange(len(STEPS))
        right.fill_between(
            places, *np.quantile(over[:, 1:], (0.025, 0.975), axis=1), color=colour, alpha=0.15, lw=0
        )
        right.plot(places, over[:, 0], "o-", color=colour, ms=3.5, label=f"FDA({start})")
    right.set_xticks(np.arange(len(STEPS)), [str(steps) for steps in STEPS])
    right.set_xlabel("steps of construction")
    right.set_ylabel("accuracy")
    right.set_title("Accuracy over construction")
    right.legend()
    caption(figure, text)
    return figure


def _bars(axes: Axes, results: Results) -> None:
    rows: list[tuple[str, str, str]] = [("pre", "pre", PRE)]
    for start in STARTS:
        if start != "pre":
            rows.append((start, start, FAINT))
        rows.append((f"FDA({start})", f"FDA({start})", FRONT))
        rows += [(row, f"  {row.partition('(')[0]}", "white") for row in _controls_of(results, start)]
    for place, (row, _, colour) in enumerate(rows):
        samples = results.mean(row)
        over = samples.mean(axis=1)
        low, high = interval(over[1:])
        axes.barh(place, over[0], color=colour, edgecolor=INK, lw=0.5, height=0.72)
        axes.plot([low, high], [place, place], color=INK, lw=1.0, zorder=4)
        axes.plot(samples[0], [place] * samples.shape[1], "o", color=INK, ms=1.8, zorder=5)
    axes.axvline(float(results.experts()[0].mean()), color=POST, lw=0.8, ls=(0, (4, 2)))
    axes.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(axis_label("accuracy", True))
    axes.set_title("Anchors, and controls that nobody optimised")
