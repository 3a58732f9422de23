"""All seeds of the study, its tables and its picture.

    PYTHONPATH=studies/quickstart python studies/personalized-soups/soups.py --seeds 3 --workers 2

Prints Markdown; writes build/results.md and build/win-rates.png.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import prepare
from experts import BUILD, JOINT
from matplotlib.figure import Figure
from measure import CHOSEN, PLAIN, SOUP, SPOKEN, SUM, measured
from styles import AXES, COMBINATIONS, POLES

from objectives.metrics.bootstrap import interval, resample_weights

NAMES = tuple(" ".join(wishes) for wishes in COMBINATIONS)
SINGLE, ALL = "an expert alone", "soup of 6"
# Arm -> trainings with preferences that eight combinations take.
ARMS = {
    "base": 0,
    SINGLE: 6,
    ALL: 6,
    SOUP: 6,
    SUM: 6,
    CHOSEN: 6,
    f"base{SPOKEN}": 0,
    f"{SOUP}{SPOKEN}": 6,
    f"{SUM}{SPOKEN}": 6,
    f"{CHOSEN}{SPOKEN}": 6,
    f"{JOINT}{SPOKEN}": 1,
}
PAIRS = (  # differences that the README speaks of
    (SOUP, SINGLE),
    (SOUP, ALL),
    (SUM, SOUP),
    (CHOSEN, SOUP),
    (CHOSEN, SUM),
    (f"{SOUP}{SPOKEN}", f"base{SPOKEN}"),
    (f"{SOUP}{SPOKEN}", SOUP),
    (f"{SOUP}{SPOKEN}", f"{JOINT}{SPOKEN}"),
    (f"{SUM}{SPOKEN}", f"{JOINT}{SPOKEN}"),
    (f"{CHOSEN}{SPOKEN}", f"{SOUP}{SPOKEN}"),
    (f"{CHOSEN}{SPOKEN}", f"{JOINT}{SPOKEN}"),
)
RESAMPLES = 1000


def win_rates(arm: np.ndarray, base: np.ndarray) -> np.ndarray:
    """How often an arm's answers are preferred to the base's, a tie counting half.

    Args:
        arm, base: (n, samples, axes) scores; sample j is compared with sample j.

    Returns:
        (n, axes) float64 in [0, 1].

    >>> win_rates(np.array([[[1.0, 2.0], [0.0, 2.0]]]), np.array([[[0.0, 2.0], [1.0, 1.0]]])).tolist()
    [[0.5, 0.75]]
    """
    return ((arm > base) + 0.5 * (arm == base)).mean(axis=1)


@dataclass(frozen=True)
class Results:
    """Everything measured, over seeds.

    Attributes:
        seeds: a mapping a seed, `ARM|COMBINATION` -> (n, samples, preferences) scores.
    """

    seeds: tuple[dict[str, np.ndarray], ...]

    def scores(self, seed: int, arm: str, name: str) -> list[np.ndarray]:
        """Scores of an arm for a combination: of one model, or of each of the three experts alone."""
        found = self.seeds[seed]
        if arm == SINGLE:
            return [found[f"{pole}|{PLAIN}"] for pole in name.split()]
        return [found.get(f"{arm}|{name}", found.get(f"{arm}|{PLAIN}", np.empty(0)))]

    def wins(self, arm: str, name: str) -> np.ndarray:
        """`(seeds, n, axes)` win rates over the base of the same seed."""
        axes = [POLES.index(wish) for wish in name.split()]
        rows = []
        for seed, found in enumerate(self.seeds):
            base = found[f"base|{PLAIN}"][..., axes]
            each = [win_rates(one[..., axes], base) for one in self.scores(seed, arm, name)]
            rows.append(np.mean(each, axis=0))
        return np.stack(rows)

    def overall(self, arm: str) -> np.ndarray:
        """`(seeds, n, axes)`, the mean over the combinations."""
        return np.mean([self.wins(arm, name) for name in NAMES], axis=0)

    def reward(self, arm: str, name: str, pole: str) -> float:
        """Mean over seeds, prompts and samples."""
        column = POLES.index(pole)
        return float(
            np.mean(
                [one[..., column].mean() for s in range(len(self.seeds)) for one in self.scores(s, arm, name)]
            )
        )


def cell(values: np.ndarray, sign: str = "") -> str:
    """Mean of `(n,)` values of the prompts with its 95 % basic bootstrap interval over prompts."""
    value = float(values.mean())
    drawn = resample_weights(len(values), RESAMPLES) @ values / len(values)
    low, high = interval(drawn, value=value)
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def tables(results: Results) -> str:
    """The Markdown of the README's tables."""
    lines = [
        "| arm | trainings | win rate over base | seeds | expertise | informativeness | style |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, cost in ARMS.items():
        found = results.overall(arm)
        each = found.mean(axis=(1, 2))
        axes = " | ".join(f"{value:.3f}" for value in found.mean(axis=(0, 1)))
        seeds = f"{each.min():.3f} to {each.max():.3f}"
        lines.append(f"| {arm} | {cost} | {cell(found.mean(axis=(0, 2)))} | {seeds} | {axes} |")
    lines += ["", "| difference in win rate | | by seed |", "|---|---|---|"]
    for one, other in PAIRS:
        each = results.overall(one).mean(axis=2) - results.overall(other).mean(axis=2)
        seeds = ", ".join(f"{gap.mean():+.3f}" for gap in each)
        lines.append(f"| {one}, minus {other} | {cell(each.mean(axis=0), '+')} | {seeds} |")
    shown = [arm for arm in ARMS if arm not in (SINGLE, ALL)]
    lines += ["", f"| combination | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    for name in NAMES:
        each = [
            " / ".join(f"{results.reward(arm, name, pole):.{digits(pole)}f}" for pole in name.split())
            for arm in shown
        ]
        lines.append(f"| {name} | {' | '.join(each)} |")
    lines += ["", f"| combination | {' | '.join(ARMS)} |", f"|---|{'---|' * len(ARMS)}"]
    for name in NAMES:
        each = [cell(results.wins(arm, name).mean(axis=(0, 2))) for arm in ARMS]
        lines.append(f"| {name} | {' | '.join(each)} |")
    lines += ["", "| axis | base | first pole | second pole | mean of both |", "|---|---|---|---|---|"]
    for one, other in AXES:
        arms = ("base", one, other, f"{one} and {other}")
        each = [
            " / ".join(f"{results.reward(arm, PLAIN, pole):.{digits(pole)}f}" for pole in (one, other))
            for arm in arms
        ]
        lines.append(f"| {one} / {other} | {' | '.join(each)} |")
    better = {
        arm: sum(
            all(results.reward(arm, name, pole) > results.reward("base", name, pole) for pole in name.split())
            for name in NAMES
        )
        for arm in ARMS
        if arm not in ("base", SINGLE)
    }
    said = ", ".join(f"{arm} {count}" for arm, count in better.items())
    return "\n".join([*lines, "", f"Combinations, of 8, with all three mean rewards above base: {said}."])


def digits(pole: str) -> int:
    """Decimals of a reward: numbers of words are large, shares small."""
    return 1 if pole in AXES[1] else 3


def figure(results: Results) -> Figure:
    """Win rates over the base by combination, with 95 % intervals over prompts."""
    shown = {SOUP: "#7aa6c2", CHOSEN: "#1b7f5c", f"{SOUP}{SPOKEN}": "#c2897a", f"{JOINT}{SPOKEN}": "#444444"}
    drawing = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = drawing.subplots()
    weights = None
    for offset, (arm, colour) in enumerate(shown.items()):
        for row, name in enumerate(NAMES):
            values = results.wins(arm, name).mean(axis=(0, 2))
            weights = resample_weights(len(values), RESAMPLES) if weights is None else weights
            low, high = interval(weights @ values / len(values), value=float(values.mean()))
            y = row + (offset - 1.5) * 0.17
            axes.plot([low, high], [y, y], color=colour, lw=1.2)
            axes.plot(values.mean(), y, "o", color=colour, ms=4, label=arm if row == 0 else None)
    axes.axvline(0.5, color="#999999", lw=0.8)
    axes.set_yticks(range(len(NAMES)), NAMES, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("win rate over base, mean of three axes (95 % interval over prompts)", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawing


def run_seeds(seeds: Sequence[int], workers: int) -> list[Path]:
    """Measures the seeds, so many processes at once."""
    prepare.build(prepare.HERE / "build" / "pair", prepare.Settings())  # once, before they all want it
    script = Path(__file__).with_name("measure.py")

    def one(seed: int) -> None:
        subprocess.run(
            [sys.executable, str(script), "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL
        )

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, seeds))
    return [measured(seed) for seed in seeds]


def main() -> None:
    """Command line: how many seeds, and how many at once."""
    parser = argparse.ArgumentParser(description="All seeds of the study, its tables and its picture.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start = time.perf_counter()
    paths = run_seeds(range(1, options.seeds + 1), options.workers)
    results = Results(tuple(dict(np.load(path)) for path in paths))
    text = tables(results)
    (BUILD / "results.md").write_text(text + "\n", encoding="utf-8")
    figure(results).savefig(BUILD / "win-rates.png", dpi=130)
    print(text)
    print(f"soups {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
