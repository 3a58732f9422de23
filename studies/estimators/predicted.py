"""How well a model of answers predicts the objectives of merges that it has not seen.

    python studies/estimators/predicted.py quickstart

Takes the trials of a finished study in a random order, baselines first, fits the model on the first ones and predicts
the rest, without asking a single question. An entry is the mean absolute error over those, mean ± standard deviation
over the seeds of the order; the first row is what the mean of the fitted ones is off by. Nothing is merged or scored.
"""

from __future__ import annotations

import argparse

import numpy as np

from objectives.metrics.names import get_metric
from objectives.outcomes import Floats
from search.cli.naming import storage_url
from search.samplers.answers_model import AnswersModel, predicted_outcomes, relative_scores
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import stored_config
from search.storage.store import StudyStore

SEEDS = 10
SIZES = (15, 20, 30, 40, 60, 120)
TESTED = 15  # recipes at least


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of a finished study")
    parser.add_argument("--storage", help="default: sqlite:///runs/NAME/study.db")
    arguments = parser.parse_args()
    url = storage_url(arguments.storage, arguments.name)
    store, folder = StudyStore.open(url, arguments.name), EvidenceFolder(url, arguments.name)
    space = stored_config(store).space
    tasks = store.attribute("facts")["tasks"]
    metrics = [get_metric(str(name), tasks) for name, _ in store.attribute("objectives")]
    once = {record.attributes["recipe"]: record for record in store.trials() if record.state == "complete"}
    records = sorted(once.values(), key=lambda record: record.kind == "search")
    outcomes = [folder.load(str(record.attributes["evidence"])).outcomes for record in records]
    x = np.array([list(record.coefficients.values()) for record in records])
    x = (x - space.low) / (space.high - space.low)
    scores = np.array([relative_scores(one) for one in outcomes])
    values = np.array([record.values for record in records])
    first = sum(record.kind != "search" for record in records)

    def errors(size: int, seed: int) -> tuple[Floats, Floats]:
        """Mean absolute errors `(objectives,)` of the fitted ones' mean and of the model."""
        others = first + np.random.default_rng(seed).permutation(len(records) - first)
        order = np.concatenate([np.arange(first), others])
        fitted, tested = order[:size], order[size:]
        predicted = AnswersModel(x[fitted], scores[fitted]).predict(x[tested])
        found = [
            [metric.value(predicted_outcomes(row, like=outcomes[0])) for metric in metrics]
            for row in predicted
        ]
        mean = values[fitted[first:]].mean(axis=0) if size > first else values[:first].mean(axis=0)
        return np.abs(mean - values[tested]).mean(axis=0), np.abs(np.array(found) - values[tested]).mean(
            axis=0
        )

    print(f"| fitted on | {' | '.join(metric.name for metric in metrics)} |\n|---{'|---' * len(metrics)}|")
    sizes = [size for size in SIZES if size + TESTED <= len(records)]
    runs = {size: np.array([errors(size, seed) for seed in range(SEEDS)]) for size in sizes}
    rows = [("their mean", runs[sizes[-1]][:, 0]), *((f"{size} recipes", runs[size][:, 1]) for size in sizes)]
    for label, found in rows:
        cells = [
            f"{mean:.4f} ± {spread:.4f}"
            for mean, spread in zip(found.mean(axis=0), found.std(axis=0, ddof=1), strict=True)
        ]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
