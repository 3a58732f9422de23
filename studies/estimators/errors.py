"""How far the accuracy estimators are off, on simulated recipes and on those of a finished study.

    python studies/estimators/errors.py                # the simulation
    python studies/estimators/errors.py quickstart     # the stored answers of a study

A seed draws the questions, the subset and, in the simulation, the recipes. An entry is the mean absolute error over the
recipes, in points of accuracy (hundredths): mean ± standard deviation over the seeds. The interval is a 95 % bootstrap
over the seeds. Nothing is merged or scored.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import kendalltau

from objectives.estimators.irt import Items, fit_items
from objectives.estimators.methods import ESTIMATORS
from objectives.estimators.subset import choose_subset
from objectives.metrics.bootstrap import interval, resample_weights
from objectives.outcomes import Booleans, Floats
from search.cli.naming import storage_url
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore

SIZES = (10, 20, 30, 50, 100)
TARGET = 30  # the size that the last columns are about
SEEDS = 50
DIMENSIONS = 2
BANK = 20  # search trials in the bank, beside the baselines
QUESTIONS = 500  # that count as all of them
PARENTS = (0, 1)  # places in the bank


@dataclass(frozen=True)
class World:
    """Recipes that were scored on everything, and recipes whose accuracy is to be estimated.

    Attributes:
        bank: `(m, n)` right answers; the parents come first. children: `(k, n)` right answers.
    """

    bank: Booleans
    children: Booleans


def simulated(seed: int, *, noise: float, items: int = 200, models: int = 40, children: int = 20) -> World:
    """Answers drawn from a two-dimensional 2PL model.

    A child's ability is l g_0 + (1 - l) g_1, l uniform in [-0.2, 1.2], plus normal noise of this standard deviation:
    0 makes mp-IRT's assumption true, 1 breaks it (abilities themselves have a standard deviation of 1).
    """
    random = np.random.default_rng(seed)
    discrimination = random.lognormal(0.0, 0.5, (DIMENSIONS, items))
    difficulty = random.normal(0.0, 1.5, items)
    ability = random.normal(0.0, 1.0, (models, DIMENSIONS))
    share = random.uniform(-0.2, 1.2, (children, 1))
    child = (
        share * ability[0] + (1.0 - share) * ability[1] + noise * random.normal(size=(children, DIMENSIONS))
    )

    def answers(g: Floats) -> Booleans:
        chance = 1.0 / (1.0 + np.exp(difficulty - g @ discrimination))
        return np.asarray(random.random(chance.shape) < chance)

    return World(answers(ability), answers(child))


def stored(url: str, name: str) -> Callable[[int], World]:
    """Worlds of a study's stored answers to its search questions: a seed draws the questions."""
    folder = EvidenceFolder(url, name)
    records = [record for record in StudyStore.open(url, name).trials() if record.state == "complete"]
    parents = [record for kind in ("pre", "post") for record in records if record.kind == kind]
    uniform = [record for record in records if record.kind == "uniform"]
    searched = [
        record for record in records if record.kind == "search" and "same_as" not in record.attributes
    ]
    ordered = [*parents, *uniform, *searched]
    correct = np.array(
        [folder.load(str(record.attributes["evidence"])).outcomes.correct for record in ordered]
    )
    known = len(ordered) - len(searched) + BANK
    if len(ordered) <= known or correct.shape[1] < max(SIZES):
        raise SystemExit(
            f"{name}: too few search trials or questions (wanted above {BANK} and {max(SIZES)})."
        )
    print(
        f"{known} recipes in the bank, {len(ordered) - known} to estimate; accuracies {_range(correct[known:])}"
    )

    def world(seed: int) -> World:
        drawn = correct[:, choose_subset(correct.shape[1], min(QUESTIONS, correct.shape[1]), seed).index]
        return World(drawn[:known], drawn[known:])

    return world


def estimates(world: World, items: Items, size: int, seed: int) -> dict[str, Floats]:
    """`(k,)` estimated accuracies of the children by estimator; all of them are scored on one subset."""
    chosen = choose_subset(len(items), size, seed)
    answers = world.children[:, chosen.index]
    parents = items.ability[list(PARENTS)]
    found = {
        name: np.array([estimator.estimate(items, parents, chosen.index, y, chosen.weights) for y in answers])
        for name, estimator in ESTIMATORS.items()
    }
    known = world.bank.mean()
    found["control: bank's mean"] = np.full(len(answers), known)
    found["control: paired difference"] = answers.mean(axis=1) - world.bank[:, chosen.index].mean() + known
    return found


def measure(
    draw: Callable[[int], World], seeds: int, sizes: Sequence[int] = SIZES
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Mean absolute error and Kendall's tau over the children, `(seeds, sizes)`, by estimator.

    Tau is the agreement of the estimates' order with the true one; nan where all estimates are equal.
    """
    error, tau = defaultdict(list), defaultdict(list)
    for seed in range(seeds):
        world = draw(seed)
        items = fit_items(world.bank, DIMENSIONS)
        truth = world.children.mean(axis=1)
        for size in sizes:
            # Not the seed that drew the world: the same random numbers would choose from it.
            for name, values in estimates(world, items, size, seeds + seed).items():
                error[name].append(np.abs(values - truth).mean())
                tau[name].append(kendalltau(values, truth).statistic)
    shape = (seeds, len(sizes))
    return (
        {name: np.reshape(values, shape) for name, values in error.items()},
        {name: np.reshape(values, shape) for name, values in tau.items()},
    )


def table(draw: Callable[[int], World]) -> Iterator[str]:
    """Markdown lines."""
    error, tau = measure(draw, SEEDS)
    at = SIZES.index(TARGET)
    weights = resample_weights(SEEDS)
    plain = error["mean"][:, at]
    yield f"| estimator | {' | '.join(f'n = {size}' for size in SIZES)} | of the mean's at {TARGET} | tau at {TARGET} |"
    yield "|---" * (3 + len(SIZES)) + "|"
    for name, values in error.items():
        cells = [f"{100 * np.mean(column):.1f} ± {100 * np.std(column, ddof=1):.1f}" for column in values.T]
        share = values[:, at].mean() / plain.mean()
        low, high = interval((weights @ values[:, at]) / (weights @ plain))
        order = tau[name][:, at].mean()
        yield f"| {name} | {' | '.join(cells)} | {share:.0%} [{low:.0%}, {high:.0%}] | {order:.2f} |"


def _range(correct: Booleans) -> str:
    accuracy = correct.mean(axis=1)
    return f"{accuracy.min():.3f} to {accuracy.max():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", help="of a finished study; without it, the simulation")
    parser.add_argument("--storage", help="default: sqlite:///runs/NAME/study.db")
    parser.add_argument("--items", type=int, default=200, help="questions of the simulation (default: 200)")
    arguments = parser.parse_args()
    if arguments.name is None:
        for noise in (0.0, 0.5, 1.0):
            print(f"\nnoise {noise}\n")
            for line in table(partial(simulated, noise=noise, items=arguments.items)):
                print(line)
        return
    url = storage_url(arguments.storage, arguments.name)
    for line in table(stored(url, arguments.name)):
        print(line)


if __name__ == "__main__":
    main()
