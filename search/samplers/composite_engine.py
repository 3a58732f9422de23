"""Bayesian optimisation of a composite function: answers are modelled, objectives are computed from them.

After `startup` space-filling recipes each proposal is the recipe whose predicted objectives add most hypervolume to
the trials so far. NSGA-II looks for it on the model, where an evaluation costs no token. (Astudillo and Frazier 2019,
arXiv 1906.01537, for the composition; the expected value of the scores stands for their distribution here.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from objectives.evaluation import Evaluation
from objectives.metrics.names import Metric
from objectives.outcomes import Outcomes
from search.config.sampler import SamplerConfig
from search.front import hypervolume_batch, non_dominated, worst_corner
from search.merging.baselines import PARENTS
from search.samplers.answers_model import AnswersModel, predicted_outcomes, relative_scores
from search.samplers.engine import Engine, Proposal, seed_of, sobol_point
from search.storage.trials import TrialRecord

STARTUP = 4  # the baselines show one direction only
POPULATION = 40  # of NSGA-II on the model
GENERATIONS = 25
MAX_KNOWN = 400  # trials in the model: its fit takes the cube of their number

Floats = NDArray[np.float64]


class CompositeEngine(Engine):
    """A Gaussian process over answers (see `Engine`).

    Args:
        metrics: the objectives, all of answers to questions.
        answers: what a complete trial answered to the search split.
    """

    def __init__(
        self,
        config: SamplerConfig,
        groups: tuple[str, ...],
        bounds: tuple[float, float],
        metrics: Sequence[Metric],
        answers: Callable[[TrialRecord], Evaluation],
    ) -> None:
        self._config = config
        self._groups = groups
        self._bounds = bounds
        self._metrics = tuple(metrics)
        self._maximize = tuple(metric.maximize for metric in metrics)
        self._startup = STARTUP if config.startup is None else config.startup
        self._answers = answers
        self._scores: dict[int, Floats] = {}  # trial -> (n * k,)
        self._questions: Outcomes | None = None

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`. Trials that are under way count with their predicted objectives."""
        place = sum(record.kind == "search" for record in history)
        known = self._known(history)
        if place < self._startup or len(known) < 2:
            return self._proposal(sobol_point(len(self._groups), self._config.seed, place))
        x = self._unit(known)
        model = AnswersModel(x, np.array([self._scores_of(record) for record in known]))
        values = np.array([record.values for record in known])
        parents = [record.values for record in known if record.kind in PARENTS]
        corner = worst_corner(np.array(parents) if parents else values, maximise=self._maximize)
        open_ = [record for record in history if not record.finished]
        if open_:
            values = np.vstack([values, self._objectives(model, self._unit(open_))])
        start = x[non_dominated(values[: len(x)], maximise=self._maximize)]
        pool, predicted = self._searched(model, start, seed_of(self._config.seed, draw))
        gain = self._gains(predicted, values, corner)
        best = gain if gain.max() > 0.0 else model.variance(pool)
        return self._proposal(pool[int(best.argmax())])

    def _known(self, history: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Complete trials with answers, each recipe once; of very many the baselines, the front and the newest."""
        complete = {
            record.attributes["recipe"]: record
            for record in reversed(history)
            if record.state == "complete" and "evidence" in record.attributes
        }
        known = sorted(complete.values(), key=lambda record: record.number)
        if len(known) <= MAX_KNOWN:
            return known
        on_front = non_dominated(np.array([record.values for record in known]), maximise=self._maximize)
        kept = on_front | np.array([record.kind != "search" for record in known])
        newest_first = np.concatenate([np.flatnonzero(kept), np.flatnonzero(~kept)[::-1]])
        return [known[i] for i in np.sort(newest_first[:MAX_KNOWN])]

    def _searched(self, model: AnswersModel, start: Floats, seed: int) -> tuple[Floats, Floats]:
        """The last population of NSGA-II on the model: `(p, d)` recipes and their `(p, objectives)` predictions."""
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem
        from pymoo.optimize import minimize

        sign = np.where(self._maximize, -1.0, 1.0)
        engine = self

        class OnModel(Problem):  # type: ignore[misc]
            def _evaluate(self, x: Floats, out: dict[str, Any], *_: Any, **__: Any) -> None:
                out["F"] = engine._objectives(model, x) * sign

        rng = np.random.default_rng(seed)
        fresh = rng.random((max(POPULATION - len(start), POPULATION // 2), len(self._groups)))
        population = np.vstack([start[-POPULATION:], fresh])
        problem = OnModel(n_var=len(self._groups), n_obj=len(sign), xl=0.0, xu=1.0)
        algorithm = NSGA2(pop_size=len(population), sampling=population)
        found = minimize(problem, algorithm, ("n_gen", GENERATIONS), seed=seed, verbose=False)
        return np.atleast_2d(found.pop.get("X")), np.atleast_2d(found.pop.get("F")) * sign

    def _gains(self, predicted: Floats, values: Floats, corner: Floats) -> Floats:
        """`(p,)` hypervolume that each of the predicted points adds to the values so far."""
        front = values[non_dominated(values, maximise=self._maximize)]
        stacked = np.concatenate(
            [np.broadcast_to(front, (len(predicted), *front.shape)), predicted[:, None]], axis=1
        )
        with_each = hypervolume_batch(stacked, corner, maximise=self._maximize)
        return with_each - hypervolume_batch(front[None], corner, maximise=self._maximize)

    def _objectives(self, model: AnswersModel, x: Floats) -> Floats:
        """`(c, objectives)` of recipes `(c, d)`, computed from their predicted scores."""
        assert self._questions is not None, "known trials come first"
        found = np.empty((len(x), len(self._metrics)))
        for i, row in enumerate(model.predict(x)):
            outcomes = predicted_outcomes(row, like=self._questions)
            found[i] = [metric.value(outcomes) for metric in self._metrics]
        return found

    def _scores_of(self, record: TrialRecord) -> Floats:
        if record.number not in self._scores:
            outcomes = self._answers(record).outcomes
            self._scores[record.number] = relative_scores(outcomes)
            self._questions = self._questions or outcomes
        return self._scores[record.number]

    def _unit(self, records: Sequence[TrialRecord]) -> Floats:
        low, high = self._bounds
        x = np.array([[record.coefficients[group] for group in self._groups] for record in records])
        return np.asarray((x - low) / (high - low))

    def _proposal(self, unit: Floats) -> Proposal:
        low, high = self._bounds
        x = np.clip(low + unit * (high - low), low, high)
        return Proposal({group: float(c) for group, c in zip(self._groups, x, strict=True)})
