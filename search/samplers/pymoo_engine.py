"""pymoo's genetic algorithms, replayed from the study's trials.

pymoo works in generations and keeps its state in memory; a pickle of it would be code and bound to one version. Here
the state is the history itself: every trial carries its generation, and a new process replays ask and tell with the
stored values. The initial population holds the parents and the uniform line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.sampler import SamplerConfig
from search.samplers.engine import Engine, Proposal, seed_of
from search.storage.trials import TrialRecord

POPULATION = 16
_GENERATION = "mergefront:generation"
_MEMBER = "mergefront:member"
_TOLD = "mergefront:told"


class PymooEngine(Engine):
    """Any pymoo algorithm with ask and tell that runs without numba (see `Engine`)."""

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
        self._sign = np.where(maximize, -1.0, 1.0)  # pymoo minimises
        self._population = config.population or POPULATION
        self._start()

    def baseline_tags(self, index: int) -> Mapping[str, Any]:
        """Baselines are the first members of the initial population."""
        return {_GENERATION: 0, _MEMBER: index}

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`."""
        generations: dict[int, list[TrialRecord]] = defaultdict(list)
        for record in history:
            if _GENERATION in record.tags:
                generations[int(record.tags[_GENERATION])].append(record)
        newest = max(generations, default=0)
        if self._generation > newest + 1 or self._generation < 0:
            self._start()
            self._begin(generations[0])
        while True:
            members = {int(r.tags[_MEMBER]): r for r in generations[self._generation]}
            free = [i for i in range(len(self._asked)) if i not in members]
            if free and newest <= self._generation:
                return self._proposal(free[0])
            told = self._told(members, generations[self._generation + 1])
            if not told:  # more workers than members: until one comes back there is nothing to breed from
                x = np.random.default_rng(seed_of(self._config.seed, draw)).uniform(
                    *self._bounds, len(self._groups)
                )
                return Proposal({g: float(v) for g, v in zip(self._groups, x, strict=True)})
            self._tell({i: record for i, record in members.items() if record.number in told})

    # -- one run of the algorithm -------------------------------------------------------------------------------

    def _start(self) -> None:
        self._algorithm: Any = None
        self._generation = -1
        self._asked: NDArray[np.float64] = np.empty((0, len(self._groups)))
        self._individuals: Any = None
        self._told_before: list[int] = []

    def _begin(self, first: Sequence[TrialRecord]) -> None:
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination

        scored = {r.tags[_MEMBER]: r for r in first if r.kind != "search" and r.state != "failed"}
        baselines = [scored[member] for member in sorted(scored)]
        low, high = self._bounds
        known = np.array([[r.coefficients[g] for g in self._groups] for r in baselines])
        known = known.reshape(len(baselines), len(self._groups))
        rng = np.random.default_rng(seed_of(self._config.seed, 0))
        # The baselines lie on one line; at least as many random recipes open the other directions.
        fresh = max(self._population - len(baselines), len(baselines), 1)
        initial = np.vstack([known, rng.uniform(low, high, (fresh, len(self._groups)))])
        problem = Problem(n_var=len(self._groups), n_obj=len(self._sign), xl=low, xu=high)
        self._algorithm = _algorithm(self._config.name, self._population, len(self._sign), initial)
        self._algorithm.setup(problem, termination=NoTermination(), seed=self._config.seed, verbose=False)
        self._ask()

    def _ask(self) -> None:
        self._generation += 1
        self._individuals = self._algorithm.ask()
        self._asked = np.clip(np.atleast_2d(self._individuals.get("X").astype(np.float64)), *self._bounds)

    def _proposal(self, member: int) -> Proposal:
        x = self._asked[member]
        tags = {_GENERATION: self._generation, _MEMBER: member, _TOLD: self._told_before}
        return Proposal({g: float(v) for g, v in zip(self._groups, x, strict=True)}, tags)

    def _told(self, members: Mapping[int, TrialRecord], following: Sequence[TrialRecord]) -> list[int]:
        """Which trials of this generation the algorithm was told: as the next generation recorded it, else now.

        With several workers some are still running when the next generation begins; a replay must leave out the same.
        """
        if following:
            return [int(number) for number in min(following, key=lambda r: r.number).tags[_TOLD]]
        return sorted(record.number for record in members.values() if record.state == "complete")

    def _tell(self, members: Mapping[int, TrialRecord]) -> None:
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        order = sorted(members)
        infills = self._individuals[order]
        values = np.array([members[i].values for i in order], dtype=np.float64) * self._sign
        # The stored coefficients are the truth, should another pymoo version have drawn other ones.
        infills.set("X", np.array([[members[i].coefficients[g] for g in self._groups] for i in order]))
        Evaluator().eval(StaticProblem(self._algorithm.problem, F=values), infills)
        self._algorithm.tell(infills=infills)
        self._told_before = sorted(record.number for record in members.values())
        self._ask()


def _algorithm(name: str, population: int, objectives: int, initial: NDArray[np.float64]) -> Any:
    from pymoo.algorithms.moo.ctaea import CTAEA
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.algorithms.moo.sms import SMSEMOA
    from pymoo.algorithms.moo.spea2 import SPEA2, SPEA2Survival
    from pymoo.algorithms.moo.unsga3 import UNSGA3
    from pymoo.algorithms.soo.nonconvex.ga import GA

    match name:
        case "ga":
            # As Mergenetic has it: simulated binary crossover, polynomial mutation, no duplicates. Genes stay real
            # numbers: its option for a discrete search rounds the first population and no child.
            return GA(pop_size=population, sampling=initial, eliminate_duplicates=True)
        case "nsga2":
            return NSGA2(pop_size=population, sampling=initial)
        case "sms-emoa":
            return SMSEMOA(pop_size=population, sampling=initial)
        case "spea2":
            # Its default survival is one object for all instances and remembers earlier runs.
            return SPEA2(pop_size=population, sampling=initial, survival=SPEA2Survival())
    directions = _reference_directions(objectives, population)
    if name == "ctaea":
        return CTAEA(ref_dirs=directions, sampling=initial)
    by_direction = NSGA3 if name == "nsga3" else UNSGA3
    return by_direction(ref_dirs=directions, pop_size=max(population, len(directions)), sampling=initial)


def _reference_directions(objectives: int, population: int) -> NDArray[np.float64]:
    from pymoo.util.ref_dirs import get_reference_directions

    if objectives == 1:
        return np.ones((1, 1))
    partitions = 1
    while _simplex_points(objectives, partitions + 1) <= population:
        partitions += 1
    return np.asarray(get_reference_directions("das-dennis", objectives, n_partitions=partitions))


def _simplex_points(objectives: int, partitions: int) -> int:
    return comb(objectives + partitions - 1, partitions)
