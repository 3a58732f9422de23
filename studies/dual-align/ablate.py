"""What the open choices of the Dual-Align reconstruction change, on the stored scores of a study.

    mergefront calibrate quickstart --method dual-align --select post        # measures the layers, once
    python studies/dual-align/ablate.py quickstart

Each row changes one choice; `naive` and `daca` are its limits (constant gate 1, and the confidence term alone). As in
the product's own table, one half of the report questions fits and the other half tests, five times; further columns fit
on fewer questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from objectives.calibrators.daca import daca, naive_alignment
from objectives.calibrators.dual_align import dual_align
from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.logits import LayerwiseLogits
from objectives.calibrators.temperature import temperature_scaling, vanilla
from objectives.metrics.names import get_metric
from search.results.alternatives import Scores
from search.storage.store import StudyStore

SPLITS = 5
SIZES = (25, 50, 100, 400)
CHOICES: dict[str, dict[str, Any]] = {
    "dual-align (defaults)": {},
    "gate 0.5": {"gate": 0.5},
    "gate 0 (process term alone)": {"gate": 0.0},
    "jump of the distance": {"jump": "distance"},
    "stability as a sum": {"stability": "sum"},
    "temperature in the last layer only": {"tempered_layers": "last"},
}

Method = Callable[[LayerwiseLogits, LayerwiseLogits], FittedTemperature]


def methods() -> dict[str, Method]:
    """All rows by name."""
    limits: dict[str, Method] = {
        "vanilla": lambda post, pre: vanilla(post.final),
        "temperature (labels)": lambda post, pre: temperature_scaling(post.final),
        "naive": lambda post, pre: naive_alignment(post.final, pre.final),
        "daca": lambda post, pre: daca(post.final, pre.final),
    }
    return limits | {name: partial(dual_align, **chosen) for name, chosen in CHOICES.items()}


def measure(
    method: Method, post: LayerwiseLogits, pre: LayerwiseLogits, size: int | None
) -> tuple[list[float], list[float]]:
    """Temperatures and ECE on the testing half, a value a split; `size` questions of the other half fit."""
    ece = get_metric("ece")
    temperatures, errors = [], []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(post))
        fits, tests = np.sort(order[: len(order) // 2][:size]), np.sort(order[len(order) // 2 :])
        found = method(post.select(fits), pre.select(fits))
        temperatures.append(found.temperature)
        errors.append(ece.value(found.apply(post.final.select(tests))))
    return temperatures, errors


def table(post: LayerwiseLogits, pre: LayerwiseLogits) -> Iterator[str]:
    """Markdown lines."""
    half = len(post) // 2
    sizes = [size for size in SIZES if size < half]
    yield f"| method | temperature | ECE, {half} fit | {' | '.join(f'ECE, {size} fit' for size in sizes)} |"
    yield "|---" * (3 + len(sizes)) + "|"
    for name, method in methods().items():
        temperatures, errors = measure(method, post, pre, None)
        small = [_spread(measure(method, post, pre, size)[1]) for size in sizes]
        yield f"| {name} | {_spread(temperatures)} | {' | '.join([_spread(errors), *small])} |"


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the study")
    parser.add_argument("--storage", help="default: sqlite:///runs/NAME/study.db")
    arguments = parser.parse_args()
    url = arguments.storage or f"sqlite:///{Path('runs') / arguments.name / 'study.db'}"
    store = StudyStore.open(url, arguments.name)
    scores = Scores.of(store)
    numbers = {record.kind: record.number for record in store.trials() if record.kind in ("pre", "post")}
    post, pre = (scores.logits(numbers[kind], "report", layers=True) for kind in ("post", "pre"))
    if not isinstance(post, LayerwiseLogits) or not isinstance(pre, LayerwiseLogits):
        raise SystemExit(
            f"{arguments.name}: its layers were not read. "
            f"Run mergefront calibrate {arguments.name} --method dual-align --select post first."
        )
    layers = dual_align(post, pre).divergence_layers
    agree = float((post.final.predicted == pre.final.predicted).mean())
    print(f"{len(post)} questions, {post.depth} layers; both parents agree on {agree:.1%} of the questions")
    print(f"questions by divergence layer, 1 to {post.depth}: {', '.join(map(str, layers))}\n")
    for line in table(post, pre):
        print(line)


if __name__ == "__main__":
    main()
