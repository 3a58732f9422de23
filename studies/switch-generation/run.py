"""The whole study: checkpoints and measurements of all seeds, tables and picture.

    python studies/switch-generation/run.py --seeds 5 --workers 2

Prints Markdown; writes build/results.md and build/lengths.png. Finished seeds and rollouts are found again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from measure import BUILD, HERE, LENGTHS

from objectives.metrics.bootstrap import interval, resample_weights
from objectives.metrics.names import get_metric
from objectives.outcomes import Outcomes
from search.results.arms import RANDOM, ROUTER, SWITCH

RESAMPLES = 1000
SAMPLES = 8  # answers to a question
BEST, ORACLE, TURN = "best candidate alone", "best candidate per question", "candidates in turn"
PAIRS = (
    (SWITCH, BEST),
    (SWITCH, RANDOM),
    (SWITCH, ROUTER),
    (SWITCH, "greedy soup"),
    (SWITCH, "logit average"),
    (RANDOM, BEST),
)

Results = Sequence[dict[str, Any]]


def accuracy(result: dict[str, Any], label: str) -> np.ndarray:
    """`(n,)` share of right answers to each report question in one seed."""
    if label == BEST:
        label = result["best"]
    if label == ORACLE:
        return np.array(result["oracle"])
    right = result["in turn"] if label == TURN else result["arms"][label]["right"]
    return np.array(right, dtype=np.float64).mean(axis=1)


def solved(result: dict[str, Any], label: str) -> np.ndarray:
    """`(n,)` whether one of the answers is right."""
    if label == BEST:
        label = result["best"]
    right = result["in turn"] if label == TURN else result["arms"][label]["right"]
    return np.array(right).any(axis=1).astype(np.float64)


def cell(each: np.ndarray, sign: str = "") -> str:
    """Mean of `(seeds, n)` values with its 95 % interval over seeds and questions, both resampled.

    All seeds have the same questions, so a resample takes the same ones in all of them.
    """
    seeds, n = each.shape
    over_questions = resample_weights(n, RESAMPLES, seed=0) / n
    over_seeds = resample_weights(seeds, RESAMPLES, seed=1) / seeds
    drawn = np.einsum("bs,sn,bn->b", over_seeds, each, over_questions)
    low, high = interval(drawn)
    return f"{each.mean():{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def calibration(result: dict[str, Any], label: str) -> float:
    """Expected calibration error of the answer that most agree on, 15 bins; lower is better."""
    arm = result["arms"][result["best"] if label == BEST else label]
    confidence, correct = np.array(arm["confidence"]), np.array(arm["correct"])
    # The answer, and what is left of its share over as many others as there can be: none of them is larger.
    others = np.repeat((1.0 - confidence[:, None]) / SAMPLES, SAMPLES, axis=1)
    n = len(confidence)
    outcomes = Outcomes(
        np.concatenate([confidence[:, None], others], axis=1),
        np.full(n, SAMPLES + 1),
        np.where(correct, 0, 1),
        np.zeros(n, dtype=np.int64),
    )
    return float(get_metric("ece").value(outcomes))


def tables(results: Results) -> str:
    """The Markdown of the README's tables."""
    arms = list(results[0]["arms"])
    lines = [
        "| arm | one answer is right | by seed | most agree on | ECE | any of 8 | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in [*arms, TURN, ORACLE]:
        each = np.array([accuracy(one, label) for one in results])
        seeds = " ".join(f"{value:.3f}" for value in each.mean(axis=1))
        if label in (TURN, ORACLE):
            chance = (
                "" if label == ORACLE else f"{np.mean([solved(one, label).mean() for one in results]):.3f}"
            )
            lines.append(f"| {label} | {cell(each)} | {seeds} | | | {chance} | |")
            continue
        voted = np.mean([np.mean(one["arms"][label]["correct"]) for one in results])
        error = np.mean([calibration(one, label) for one in results])
        some = np.mean([solved(one, label).mean() for one in results])
        tokens = np.mean([one["arms"][label]["tokens"] for one in results])
        lines.append(
            f"| {label} | {cell(each)} | {seeds} | {voted:.3f} | {error:.3f} | {some:.3f} | {tokens:.2f}x |"
        )
    lines += ["", "| difference in right answers | | by seed |", "|---|---|---|"]
    for one, other in PAIRS:
        each = np.array([accuracy(result, one) - accuracy(result, other) for result in results])
        seeds = ", ".join(f"{gap.mean():+.3f}" for gap in each)
        lines.append(f"| {one}, minus {other} | {cell(each, '+')} | {seeds} |")
    none = np.array([_unsolved(result) for result in results])
    rescued = np.array([solved(result, SWITCH) * _unsolved(result) for result in results])
    by_chance = np.array([solved(result, RANDOM) * _unsolved(result) for result in results])
    shares = [found.sum() / max(1.0, none.sum()) for found in (rescued, by_chance)]
    lines += [
        "",
        f"Questions that none of the 24 answers of the candidates gets right: {none.mean():.3f} of all; of these the "
        f"switcher solves {shares[0]:.3f} in {SAMPLES} answers, random switching {shares[1]:.3f}.",
        "",
        "| tokens of a segment | switch | random switching | tokens of the switch |",
        "|---|---|---|---|",
    ]
    for at, length in enumerate(LENGTHS):
        entries = [result["lengths"][at] for result in results]
        switch, chance = (np.array([entry[label] for entry in entries]) for label in (SWITCH, RANDOM))
        tokens = np.mean([entry[f"{SWITCH} tokens"] for entry in entries])
        lines.append(f"| {length} | {cell(switch)} | {cell(chance)} | {tokens:.2f}x |")
    equal = [result["lengths"][-1]["equals routing"] for result in results]
    speeds = {name: [result["speed"][name] for result in results] for name in results[0]["speed"]}
    said = ", ".join(f"{name} {np.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for name, v in speeds.items())
    entropies = ", ".join(f"{result['labels']['entropy']:.2f}" for result in results)
    lines += [
        "",
        f"Segments of {LENGTHS[-1]} tokens, the whole answer: labels and answers are the router's in {sum(equal)} of "
        f"{len(equal)} seeds.",
        f"Of the host alone: {said}. Entropy of the labels in nats, of 1.10: {entropies}.",
    ]
    return "\n".join(lines)


def _unsolved(result: dict[str, Any]) -> np.ndarray:
    """`(n,)` 1 where no answer of any candidate is right."""
    names = list(result["arms"])[:3]
    return 1.0 - np.max([solved(result, name) for name in names], axis=0)


def figure(results: Results) -> Figure:
    """Right answers against the length of a segment, seeds thin and their mean bold."""
    drawing = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = drawing.subplots()
    for label, colour in ((SWITCH, "#1b7f5c"), (RANDOM, "#999999")):
        each = np.array([[np.mean(entry[label]) for entry in result["lengths"]] for result in results])
        axes.plot(LENGTHS, each.T, color=colour, lw=0.6, alpha=0.5)
        axes.plot(LENGTHS, each.mean(axis=0), "o-", color=colour, lw=1.8, ms=4, label=label)
    for label, style in ((ROUTER, "--"), (BEST, ":"), ("greedy soup", "-.")):
        mean = np.mean([accuracy(result, label).mean() for result in results])
        axes.axhline(mean, color="#444444", lw=1.0, ls=style, label=label)
    axes.set_xscale("log")
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a segment (an item of an answer has 3)", fontsize=8)
    axes.set_ylabel("right answers on report questions", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7, frameon=False)
    return drawing


def run_seeds(seeds: Sequence[int], workers: int) -> list[dict[str, Any]]:
    """Builds and measures the seeds, so many processes at once."""
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}

    def one(seed: int) -> None:
        for script in ("prepare.py", "measure.py"):
            if script == "measure.py" and (BUILD / f"seed-{seed}" / "results.json").exists():
                continue
            command = [sys.executable, str(HERE / script), "--seed", str(seed)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=threads)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, seeds))
    return [json.loads((BUILD / f"seed-{seed}" / "results.json").read_text()) for seed in seeds]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="All seeds of the study, its tables and its picture.")
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds 1 to this one; 0 was used to design the study"
    )
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    results = run_seeds(range(1, given.seeds + 1), given.workers)
    text = tables(results)
    (BUILD / "results.md").write_text(text + "\n", encoding="utf-8")
    figure(results).savefig(BUILD / "lengths.png", dpi=150)
    print(text)


if __name__ == "__main__":
    main()
