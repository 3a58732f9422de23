"""Optuna's samplers, each built anew for every draw and fed from the study's trials.

A seeded Optuna sampler that lives on restarts its stream when a study is resumed and proposes the same recipes again
(optuna#3255). Here every draw has a sampler of its own, seeded from (study seed, draw), which sees a mirror of the
study in memory. The mirror also saves one database transaction a coefficient: the trial is stored whole afterwards.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    GridSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.config.sampler import SamplerConfig
from search.errors import ConfigError
from search.samplers.engine import Engine, Proposal, seed_of, sobol_point
from search.storage.trials import State, TrialRecord

optuna.logging.set_verbosity(optuna.logging.ERROR)  # a mirror of a study is no news

POPULATION = 16  # Optuna's default of 50 would make most merge studies a random search
STARTUP = 20  # the baselines count among them; the rest is random
GRID_POINTS = 11
MAX_GRID = 100_000

_ANY_TIME = datetime(2000, 1, 1)  # Optuna wants one; no sampler looks at it

_STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.FAIL,  # engines are shown it as complete, with its estimate
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "waiting": TrialState.RUNNING,  # its recipe is fixed: to a sampler it is on its way
}


class _KnownSpace:
    """Tells a sampler its search space.

    Optuna finds it anew for every sampler, by comparing every distribution of every finished trial.
    """

    space: dict[str, BaseDistribution]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.space


class _TPE(_KnownSpace, TPESampler):
    pass


class _GP(_KnownSpace, GPSampler):
    pass


class _Generations(_KnownSpace):
    """Overrides how Optuna's genetic samplers find the members and remember the parents of a generation.

    Optuna's own memory returns parents in the order of selection the first time and by trial number from then on, and
    NSGA-III draws lots in the selection: a study resumed within a generation would breed other children. Here order
    and lots depend on the generation alone. And Optuna searches all trials for the members of a generation.
    """

    members: Mapping[int, list[int]]  # generation -> numbers of its complete trials
    parents: dict[int, list[FrozenTrial]]
    selector: Callable[[int], BaseSampler]  # generation -> the sampler that selects its parents

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        trials = study.get_trials(deepcopy=False)
        return [trials[number] for number in sorted(self.members.get(generation, ()))]

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        # From the first one on: each selection needs the one before, too deep for a recursion.
        for earlier in range(1, generation + 1):
            if earlier not in self.parents:
                self.parents[earlier] = self.selector(earlier).select_parent(study, earlier)  # type: ignore[attr-defined]
        return self.parents[generation] if generation else []


class _NSGAII(_Generations, NSGAIISampler):
    pass


class _NSGAIII(_Generations, NSGAIIISampler):
    pass


# Optuna's genetic samplers know a trial only by its generation, which they keep below their class's name.
_GENERATION_KEYS = {"nsga2": _NSGAII._get_generation_key(), "nsga3": _NSGAIII._get_generation_key()}


class _Mirrored(FrozenTrial):
    """A trial in the mirror. Optuna copies trials deeply, with all distributions; what they hold is never changed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTrial:
        return copy.copy(self)


class OptunaEngine(Engine):
    """TPE, NSGA-II, NSGA-III, GP, random, QMC and grid behind one door (see `Engine`)."""

    def __init__(
        self,
        config: SamplerConfig,
        groups: tuple[str, ...],
        bounds: tuple[float, float],
        maximize: tuple[bool, ...],
    ) -> None:
        self._config = config
        self._groups = groups
        self._bounds = bounds
        self._generation_key = _GENERATION_KEYS.get(config.name, "")
        self._space: dict[str, BaseDistribution] = {name: FloatDistribution(*bounds) for name in groups}
        self._directions = [StudyDirection.MAXIMIZE if m else StudyDirection.MINIMIZE for m in maximize]
        self._start()
        if config.name == "grid":
            size = (config.points or GRID_POINTS) ** len(groups)
            if size > MAX_GRID:
                raise ConfigError(
                    f"sampler: a grid of {config.points or GRID_POINTS} points in {len(groups)} dimensions has more "
                    f"than {MAX_GRID} points. Use granularity uniform, fewer points, or another sampler."
                )

    def baseline_tags(self, index: int) -> Mapping[str, Any]:
        """Baselines are members of the first generation."""
        return {self._generation_key: 0} if self._generation_key else {}

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`."""
        if self._config.name == "qmc":
            return self._sobol(history)
        self._bring_up_to_date(history)
        self._mirror.sampler = sampler = self._sampler(seed_of(self._config.seed, draw))
        if isinstance(sampler, _KnownSpace):  # to Optuna a study without a complete trial has no space yet
            scored = any(record.state == "complete" for record in history)
            sampler.space = dict(sorted(self._space.items())) if scored else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._mirror.ask(self._space)
        frozen = self._mirror.get_trials(deepcopy=False)[-1]
        # Until the history says otherwise this trial is one that somebody started and that never came back.
        self._mirrored[draw] = (trial.number, "running")
        return Proposal(dict(frozen.params), dict(frozen.system_attrs))

    def _start(self) -> None:
        self._mirror = optuna.create_study(directions=self._directions)
        # Trial -> its number in the mirror, and its state there.
        self._mirrored: dict[int, tuple[int, State]] = {}
        self._members: dict[int, list[int]] = defaultdict(list)
        self._parents: dict[int, list[FrozenTrial]] = {}

    def _bring_up_to_date(self, history: Sequence[TrialRecord]) -> None:
        numbers = {record.number for record in history}
        if self._mirrored.keys() - numbers:  # asked before for a draw that never became a trial: start over
            self._start()
        for record in history:
            known = self._mirrored.get(record.number)
            state = "running" if record.state == "waiting" else record.state
            if known is not None and known[1] == "running":
                # What was asked for may have been brought into a simplex before it became a trial.
                self._mirror.get_trials(deepcopy=False)[known[0]].params = dict(record.coefficients)
            if known is not None and known[1] == state:
                continue
            if known is None:
                self._mirror.add_trial(self._frozen(record))
                number = len(self._mirrored)
            else:
                number = known[0]
                self._mirror.sampler = (
                    RandomSampler()
                )  # others act on a tell; the record is all that counts here
                failed = record.state == "failed"
                self._mirror.tell(number, record.values, state=TrialState.FAIL if failed else None)
            self._mirrored[record.number] = (number, state)
            generation = record.tags.get(self._generation_key)
            if state == "complete" and generation is not None:
                self._members[generation].append(number)

    def _frozen(self, record: TrialRecord) -> FrozenTrial:
        finished = record.state in ("complete", "failed")
        return _Mirrored(
            number=-1,  # the mirror numbers and identifies its trials itself
            trial_id=-1,
            state=_STATES[record.state],
            value=None,
            values=record.values,
            datetime_start=_ANY_TIME,
            datetime_complete=_ANY_TIME if finished else None,
            params=dict(record.coefficients),
            distributions=self._space,
            user_attrs={},
            system_attrs=dict(record.tags),
            intermediate_values={},
        )

    def _sampler(self, seed: int) -> BaseSampler:
        population = self._config.population or POPULATION
        startup = STARTUP if self._config.startup is None else self._config.startup
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            match self._config.name:
                case "tpe":
                    return _TPE(n_startup_trials=startup, multivariate=True, constant_liar=True, seed=seed)
                case "nsga2":
                    return self._genetic(_NSGAII(population_size=population, seed=seed))
                case "nsga3":
                    return self._genetic(_NSGAIII(population_size=population, seed=seed))
                case "gp":
                    # A fixed set of questions is scored: the same recipe always gives the same numbers.
                    return _GP(n_startup_trials=startup, deterministic_objective=True, seed=seed)
                case "grid":
                    axis = [
                        float(value)
                        for value in np.linspace(*self._bounds, self._config.points or GRID_POINTS)
                    ]
                    return GridSampler(dict.fromkeys(self._groups, axis), seed=self._config.seed)
                case _:
                    return RandomSampler(seed=seed)

    def _genetic(self, sampler: _NSGAII | _NSGAIII) -> BaseSampler:
        sampler.members, sampler.parents = self._members, self._parents
        sampler.selector = lambda generation: self._sampler(seed_of(self._config.seed, generation, purpose=1))
        return sampler

    def _sobol(self, history: Sequence[TrialRecord]) -> Proposal:
        """Scrambled Sobol points straight from scipy: Optuna's QMCSampler keeps its place in the study's attributes,
        which a resumed study would have to restore; here the place is the count of earlier search trials."""
        place = sum(1 for record in history if record.kind == "search")
        unit = sobol_point(len(self._groups), self._config.seed, place)
        low, high = self._bounds
        return Proposal(
            {name: float(low + u * (high - low)) for name, u in zip(self._groups, unit, strict=True)}
        )
