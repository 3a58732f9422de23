"""A model of what merges of the quickstart pair answer, in place of merging and scoring them.

Every score of every option of every search question (relative to its question's mean,
`search.samplers.answers_model`) is a ridge
regression on the coefficients, their squares and their products, fitted to the stored answers of real studies. The
objectives are computed from predicted scores by the product's own metrics, and engines that learn from answers are
given them as evidence. One prediction takes a millisecond.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from objectives.evaluation import Evaluation
from objectives.outcomes import Floats, Outcomes
from search.errors import StorageError
from search.front import worst_corner
from search.recipe import Recipe
from search.running.problem import Problem
from search.samplers.answers_model import predicted_outcomes, relative_scores
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import stored_config
from search.storage.store import StudyStore

RIDGES = tuple(float(r) for r in 10.0 ** np.arange(-4.0, 3.0, 0.5))
FOLDS = 10


@dataclass(frozen=True)
class Answers:
    """What real studies of one pair answered, each recipe once.

    Attributes:
        x: `(t, d)` coefficients, in the order of `names`. scores: `(t, n * k)`. like: the questions.
        seconds: of merging and scoring each recipe. tokens: of one evaluation. failed: trials that failed, of `tried`.
    """

    names: tuple[str, ...]
    x: Floats
    scores: Floats
    like: Outcomes
    seconds: Floats
    tokens: int
    failed: int
    tried: int

    @classmethod
    def of(cls, stores: Sequence[StudyStore]) -> Answers:
        """Reads the stored answers of several studies of the same pair and questions.

        Raises:
            StorageError: they are not of the same pair and questions.
        """
        found: dict[str, tuple[dict[str, float], Outcomes]] = {}
        seconds, tokens, failed, tried = [], 0, 0, 0
        for store in stores:
            if store.attribute("identity") != stores[0].attribute("identity"):
                raise StorageError(f"study '{store.name}' is of another pair than '{stores[0].name}'.")
            folder = EvidenceFolder(store.url, store.name)
            seconds += trial_seconds(store)
            for record in store.trials():
                tried, failed = tried + record.finished, failed + (record.state == "failed")
                key = str(record.attributes.get("recipe"))
                if record.state == "complete" and key not in found:
                    evaluation = folder.load(str(record.attributes["evidence"]))
                    tokens = evaluation.scored_tokens
                    found[key] = dict(record.coefficients), evaluation.outcomes
        names = tuple(next(iter(found.values()))[0])
        x = np.array([[coefficients[name] for name in names] for coefficients, _ in found.values()])
        scores = np.array([relative_scores(outcomes) for _, outcomes in found.values()])
        like = next(iter(found.values()))[1]
        return cls(names, x, scores, like, np.array(seconds), tokens, failed, tried)

    def of_questions(self, count: int) -> Answers:
        """The same about the first `count` questions only."""
        k = self.like.probability.shape[1]
        like = self.like.select(slice(0, count))
        changed = copy(self)
        object.__setattr__(changed, "like", like)
        object.__setattr__(changed, "scores", self.scores[:, : len(like) * k])
        object.__setattr__(changed, "tokens", self.tokens * len(like) // len(self.like))
        return changed


def trial_seconds(store: StudyStore) -> list[float]:
    """Seconds of merging and scoring of every trial that was scored; of old studies from claim to commit."""
    found = []
    for record in store.trials():
        if record.state != "complete" or "same_as" in record.attributes:
            continue
        lap = record.attributes.get("seconds")
        whole = record.seconds if lap is None else lap["merge"] + lap["score"]
        if whole:
            found.append(float(whole))
    return found


class Surrogate:
    """Scores of any recipe; the ridge is the one with the least leave-one-out error."""

    def __init__(self, x: Floats, scores: Floats) -> None:
        self.mean = scores.mean(axis=0)
        features = _features(x)
        self._shift, spread = features.mean(axis=0), features.std(axis=0)
        self._scale = np.where(spread > 0.0, spread, 1.0)
        z = (features - self._shift) / self._scale
        left, values, right = np.linalg.svd(z, full_matrices=False)
        centred = scores - self.mean
        rotated = left.T @ centred
        errors = []
        for ridge in RIDGES:
            shrunk = values**2 / (values**2 + ridge)
            leverage = (left**2) @ shrunk + 1.0 / len(x)
            residual = centred - (left * shrunk) @ rotated
            errors.append(float(((residual / (1.0 - leverage)[:, None]) ** 2).mean()))
        self.ridge = RIDGES[int(np.argmin(errors))]
        self.weights = right.T @ ((values / (values**2 + self.ridge))[:, None] * rotated)

    def scores(self, x: Floats) -> Floats:
        """`(c, n * k)` scores of recipes `(c, d)`."""
        return np.asarray(self.mean + (_features(x) - self._shift) / self._scale @ self.weights)


def _features(x: Floats) -> Floats:
    """Coefficients, squares and products: `(t, d + d (d + 1) / 2)`."""
    rows, columns = np.triu_indices(x.shape[1])
    return np.hstack([x, x[:, rows] * x[:, columns]])


def held_out(answers: Answers, value: Callable[[Outcomes], Sequence[float]], seed: int = 0) -> Floats:
    """`(t, 3, objectives)`: of every recipe the true objectives, those predicted by a fit without its fold, and the
    mean of the other folds."""
    order = np.random.default_rng(seed).permutation(len(answers.x))
    true = np.array([value(_outcomes(row, answers.like)) for row in answers.scores])
    found = np.empty((len(order), 3, true.shape[1]))
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        model = Surrogate(answers.x[rest], answers.scores[rest])
        predicted = [value(_outcomes(row, answers.like)) for row in model.scores(answers.x[fold])]
        found[fold] = np.stack(
            [true[fold], predicted, np.tile(true[rest].mean(axis=0), (len(fold), 1))], axis=1
        )
    return found


def _outcomes(row: Floats, like: Outcomes) -> Outcomes:
    return predicted_outcomes(row.astype(np.float32), like=like)


class SimulatedMaterials(Problem):
    """Problem that predict instead of merging and scoring; all else is the product's."""

    _surrogate: Surrogate
    _answers: Answers
    _recipe: Recipe

    @classmethod
    def build(cls, problem: Problem, answers: Answers) -> SimulatedMaterials:
        """Simulated problem of the study that the answers are from."""
        made = cls(**{one.name: getattr(problem, one.name) for one in fields(Problem)})
        made.__dict__["idle"] = problem.idle
        made._set("_surrogate", Surrogate(answers.x, answers.scores))
        made._set("_answers", answers)
        return made

    def sampled_by(self, sampler: Any, trials: int) -> SimulatedMaterials:
        """The same for another engine and budget."""
        twin = copy(self)
        changes = {"sampler": sampler, "trials": trials, "tokens": None, "batch_tokens": 1024}
        twin._set("config", self.config.model_copy(update=changes))
        return twin

    def merge(self, recipe: Recipe) -> None:
        """Remembers the recipe."""
        self._set("_recipe", recipe)

    def evaluate(self, split: str, progress: Any = None) -> Evaluation:
        """What the surrogate predicts of the recipe merged last."""
        return self.predicted(self._recipe)

    def predicted(self, recipe: Recipe) -> Evaluation:
        """Simulated evidence of a recipe."""
        answers = self._answers
        x = np.array([[recipe.coefficients[name] for name in answers.names]])
        outcomes = _outcomes(self._surrogate.scores(x)[0], answers.like)
        digest = hashlib.sha256(b"simulated").hexdigest()
        return Evaluation.of_probabilities(outcomes, answers.tokens, digest)

    def corner(self) -> Floats:
        """The parents' worst values: where hypervolumes are measured from."""
        parents = [one.recipe for one in self.baselines if one.kind != "uniform"]
        values = [[m.value(self.predicted(one).outcomes) for m in self.metrics] for one in parents]
        return worst_corner(np.array(values), maximise=[m.maximize for m in self.metrics])

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def load(url: str, names: Sequence[str], questions: int | None = None) -> tuple[SimulatedMaterials, Answers]:
    """Simulated problem from finished studies, the first of which names the pair.

    Raises:
        StorageError: a study is missing.
    """
    stores = [StudyStore.open(url, name) for name in names]
    answers = Answers.of(stores)
    if questions is not None:
        answers = answers.of_questions(questions)
    return SimulatedMaterials.build(Problem.open(stored_config(stores[0]), "cpu"), answers), answers
