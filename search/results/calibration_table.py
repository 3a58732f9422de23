"""Calibrators side by side over several splits of the report questions: one half fits, the other half tests.

No question that a merge was chosen on is used, and none that a temperature was fitted on tests it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from objectives.calibrators.logits import OptionLogits
from objectives.calibrators.methods import METHODS, fit
from objectives.metrics.diversity import DiversityMetric
from objectives.metrics.names import get_metric
from objectives.outcomes import Outcomes
from search.errors import ConfigError
from search.results.alternatives import AUTOMATIC, CAPE, Scores
from search.results.board import Board, Row
from search.results.intervals import Cell
from search.results.picks import named_picks

SPLITS = 5
METRICS = ("accuracy", "ece", "mce", "ece:mass", "brier", "nll", "auroc")


@dataclass(frozen=True)
class Entry:
    """One model with one method.

    Attributes:
        temperatures: one a split; empty for CAPE, ones for `vanilla`.
        values: by metric, one value a split, on the half that was not fitted on.
        sampled: what is measured on sampled answers, on all prompts of the report split, at the board's temperature;
            empty if not sampled.
    """

    model: str
    method: str
    temperatures: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]
    sampled: Mapping[str, Cell]

    @property
    def label(self) -> str:
        return self.model if self.method == "vanilla" else f"{self.model} + {self.method}"


@dataclass(frozen=True)
class CalibrationTable:
    """All entries; `questions` is (fitted on, tested on) in each of the `SPLITS` splits.

    Attributes:
        metrics: those of sampled answers that an entry has.
    """

    entries: tuple[Entry, ...]
    questions: tuple[int, int]
    metrics: tuple[DiversityMetric, ...] = ()

    @property
    def caption(self) -> str:
        fitted, tested = self.questions
        return (
            f"Mean [smallest, largest] over {SPLITS} random splits of the report questions: {fitted} fit the "
            f"temperature, the other {tested} test it. ECE and MCE in 15 equal-width bins, AECE in 15 of equal mass."
            + (
                " Diversities and preferences: of answers to all prompts of the report split, with 95 % bootstrap "
                "intervals."
                if self.metrics
                else ""
            )
        )

    def text(self) -> str:
        """A table for a terminal: mean over the splits, and the smallest and largest value in brackets."""
        return "\n".join(_aligned(self.rows()))

    def markdown(self) -> str:
        """The same in Markdown."""
        header, *body = self.rows()
        lines = [header, ["---"] * len(header), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rows(self) -> list[list[str]]:
        """Header, then a line an entry; a spread reads `mean [smallest, largest]`."""
        arrows = {name: "up" if get_metric(name).maximize else "down" for name in METRICS}
        titles = [f"{'aece' if name == 'ece:mass' else name} {arrows[name]}" for name in METRICS]
        titles += [f"{metric.name} {'up' if metric.maximize else 'down'}" for metric in self.metrics]
        body = [
            [
                entry.label,
                _spread(entry.temperatures, 2),
                *(_spread(entry.values[name], 3) for name in METRICS),
                *(_interval(entry.sampled.get(metric.name)) for metric in self.metrics),
            ]
            for entry in self.entries
        ]
        return [["model", "temperature", *titles], *body]


def calibration_table(board: Board, scores: Scores) -> CalibrationTable:
    """Parents, picks and what `calibrate` was asked for, with the automatic methods (not `pre`) and those asked for.

    Raises:
        ConfigError: the report split is not scored yet, or has fewer than four questions.
    """
    pre, *experts = board.parents
    if not pre.report or not all(row.report for row in experts):
        raise ConfigError(f"study '{board.study}': the report split is not scored yet. Resume it first.")
    n = board.questions["report"]
    if n < 4:
        raise ConfigError(f"study '{board.study}': {n} questions in the report split cannot be split again.")
    halves = [_halves(n, seed) for seed in range(SPLITS)]
    entries = []
    for row, title in _models(board, scores):
        automatic = AUTOMATIC if row.kind != "pre" else ()
        for method in dict.fromkeys(["vanilla", *automatic, *scores.asked(row.trial)]):
            if not scores.suits(method):
                continue
            entry = _entry(scores, row, title, method, pre.trial, halves, _sampled(board, row, method))
            if entry is not None:
                entries.append(entry)
    sampled = [one for one in board.sampled if any(one.name in entry.sampled for entry in entries)]
    return CalibrationTable(tuple(entries), (len(halves[0][0]), len(halves[0][1])), tuple(sampled))


def _models(board: Board, scores: Scores) -> list[tuple[Row, str]]:
    """Parents, the named picks, and what `calibrate` was asked for, each trial once."""
    found = {row.trial: (row, row.label) for row in board.parents}
    for name, row in named_picks(board).items():
        if row.report:
            known = found.get(row.trial)
            found[row.trial] = (row, f"{row.label} ({name})" if known is None else known[1])
    for row in board.rows:
        if scores.asked(row.trial) and row.report:
            found.setdefault(row.trial, (row, row.label))
    return list(found.values())


def _entry(
    scores: Scores,
    row: Row,
    title: str,
    method: str,
    pre: int,
    halves: Sequence[tuple[Any, Any]],
    sampled: Mapping[str, Cell],
) -> Entry | None:
    """None where a score that the method reads was not measured on the report split."""
    tested: list[Outcomes]
    temperatures: list[float] = []
    if method == CAPE:
        averaged = scores.averaged(row.trial, "report")
        if averaged is None:
            return None
        tested = [averaged.select(test) for _, test in halves]
    else:
        layers = "layers" in METHODS[method]
        own, reference = scores.logits(row.trial, "report", layers), scores.logits(pre, "report", layers)
        if own is None or reference is None:
            return None
        tested = []
        for fitted_on, test in halves:
            found = fit(method, own.select(fitted_on), reference.select(fitted_on))
            temperatures.append(found.temperature)
            final: OptionLogits = own.final.select(test)
            tested.append(found.apply(final))
    metrics = [get_metric(name) for name in METRICS]
    values = {metric.name: tuple(metric.value(outcomes) for outcomes in tested) for metric in metrics}
    return Entry(title, method, tuple(temperatures), values, sampled)


def _sampled(board: Board, row: Row, method: str) -> dict[str, Cell]:
    """What is measured on sampled answers of a model as it is, or of the alternative with this method."""
    same = (one for one in board.alternatives if one.label == f"{row.label} + {method}")
    shown = row if method == "vanilla" else next(same, None)
    cells = {} if shown is None else shown.report
    return {metric.name: cells[metric.name] for metric in board.sampled if metric.name in cells}


def _halves(n: int, seed: int) -> tuple[Any, Any]:
    """Indices of a random half of n questions and of the others, both ascending."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if max(values) == min(values):
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _interval(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
