"""The contract of every engine: a function of (seed, history), whoever asks and whenever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from objectives.evaluation import Evaluation
from objectives.metrics.names import get_metric
from objectives.outcomes import Outcomes
from search.config.sampler import OPTUNA_SAMPLERS, PYMOO_ALGORITHMS, SINGLE_OBJECTIVE, SamplerConfig
from search.errors import ConfigError
from search.samplers import Engine, Sources, make_engine
from search.samplers.gradient import LossGradient
from search.storage.trials import State, TrialRecord

GROUPS = ("embeddings", "layer.0.attention", "layer.0.mlp")
BOUNDS = (-0.2, 1.2)
LINE = tuple(i / 10 for i in range(11))
ALL = [
    *(("optuna", name) for name in OPTUNA_SAMPLERS),
    *(("pymoo", name) for name in PYMOO_ALGORITHMS),
    ("gradient", "adam"),
    ("composite", "gp"),
    ("line", "uniform"),
]
every_engine = pytest.mark.parametrize(("engine", "name"), ALL)


def config(engine: str, name: str, seed: int = 0) -> SamplerConfig:
    genetic = engine == "pymoo" or name.startswith("nsga")
    return SamplerConfig(
        engine=engine,  # type: ignore[arg-type]
        name=name,
        seed=seed,
        population=8 if genetic else None,
        startup=14 if name in ("tpe", "gp") else None,
        points=4 if name == "grid" else None,
    )


BEST = np.array([[0.9, 0.2, 0.6], [0.1, 0.1, 0.9]])  # of each objective


def objective(x: Sequence[float]) -> tuple[float, ...]:
    a = np.asarray(x)
    return float(1 - ((a - BEST[0]) ** 2).sum()), float(((a - BEST[1]) ** 2).sum())


@dataclass(frozen=True)
class Gradient:
    """A function of coefficients and weights as a `WeightedGradient`."""

    function: Callable[[np.ndarray, np.ndarray], LossGradient]
    tokens: int = 30

    def __call__(self, x: np.ndarray, weights: np.ndarray, step: int, /) -> LossGradient:
        return self.function(x, weights)


def slope(x: np.ndarray, weights: np.ndarray) -> LossGradient:
    """Of the weighted sum of squared distances; with three objectives the third is the first once more."""
    away = x - np.vstack([BEST, BEST[0]])[: len(weights)]
    return LossGradient(float(weights @ (away**2).sum(axis=1)), 2 * weights @ away, tokens=30)


def answers(record: TrialRecord) -> Evaluation:
    """Twenty questions of three options whose scores are smooth in the coefficients."""
    x = np.array(list(record.coefficients.values())[:3])
    draw = np.random.default_rng(0)
    centre, pull = draw.random((20, 3, len(x))), 3 * draw.random((20, 3))
    score = -pull * ((x - centre) ** 2).sum(axis=2)
    gold, zero = draw.integers(0, 3, 20), np.zeros(20, dtype=np.int64)
    return Evaluation.of_probabilities(Outcomes.from_loglikelihoods(score, zero + 3, gold, zero), 60, "")


def losses(record: TrialRecord) -> np.ndarray:
    """Squared distances, as `slope` has them."""
    x = np.array(list(record.coefficients.values())[:3])
    return np.asarray(((x - np.vstack([BEST, BEST[0]])[:, : len(x)]) ** 2).sum(axis=1))


def sources(objectives: int = 2) -> Sources:
    metrics = tuple(map(get_metric, ("accuracy", "ece", "brier")[:objectives]))
    return Sources(metrics, lambda: Gradient(slope), answers, lambda record: losses(record)[:objectives])


def known(number: int, state: State = "complete") -> dict[str, str]:
    return {"recipe": str(number)} | ({"evidence": str(number)} if state == "complete" else {})


def aims(name: str) -> tuple[bool, ...]:
    """Whether to maximise each objective: two, or the first one alone where there can be but one."""
    return (True,) if name in SINGLE_OBJECTIVE else (True, False)


def record(
    engine: Engine,
    number: int,
    state: State = "complete",
    history: Sequence[TrialRecord] = (),
    objectives: int = 2,
) -> TrialRecord:
    if number < len(LINE):
        kind, coefficients, tags = (
            "uniform",
            dict.fromkeys(GROUPS, LINE[number]),
            engine.baseline_tags(number),
        )
    else:
        proposal = engine.propose(history, number)
        kind, coefficients, tags = "search", dict(proposal.coefficients), proposal.tags
    values = objective([coefficients[g] for g in GROUPS])[:objectives] if state == "complete" else None
    return TrialRecord(number, kind, state, coefficients, values, known(number, state), tags, None)


def run(
    make: Callable[[], Engine],
    trials: int,
    *,
    fresh: bool,
    failing: frozenset[int] = frozenset(),
    objectives: int = 2,
) -> list[TrialRecord]:
    engine = make()
    history: list[TrialRecord] = []
    for number in range(trials):
        if fresh:
            engine = make()
        state: State = "failed" if number in failing else "complete"
        history.append(record(engine, number, state, history, objectives))
    return history


@every_engine
def test_a_resumed_engine_proposes_what_an_uninterrupted_one_does(engine: str, name: str) -> None:
    def make() -> Engine:
        return make_engine(config(engine, name), GROUPS, BOUNDS, sources(len(aims(name))))

    trials = 17 if name == "gp" else 44
    failing = frozenset({13, 21})
    through = run(make, trials, fresh=False, failing=failing, objectives=len(aims(name)))
    assert run(make, trials, fresh=True, failing=failing, objectives=len(aims(name))) == through
    searched = {tuple(r.coefficients.values()) for r in through[len(LINE) :]}
    assert len(searched) >= 0.8 * (trials - len(LINE))
    assert all(BOUNDS[0] <= v <= BOUNDS[1] for r in through for v in r.coefficients.values())
    assert all(set(r.coefficients) == set(GROUPS) for r in through)


@pytest.mark.parametrize(("engine", "name"), [pair for pair in ALL if pair[0] != "line"])
def test_two_seeds_are_two_searches(engine: str, name: str) -> None:
    first, second = (
        run(
            lambda seed=seed: make_engine(
                config(engine, name, seed), GROUPS, BOUNDS, sources(len(aims(name)))
            ),
            16,
            fresh=False,
            objectives=len(aims(name)),
        )  # type: ignore[misc]
        for seed in (0, 1)
    )
    assert [r.coefficients for r in first[11:]] != [r.coefficients for r in second[11:]]


@every_engine
def test_running_trials_of_other_workers_do_not_stop_it(engine: str, name: str) -> None:
    """Four workers: results arrive in another order than the draws, and after the next generation began."""
    one = make_engine(config(engine, name), GROUPS, BOUNDS, sources(len(aims(name))))
    history: list[TrialRecord] = []
    for number in range(40 if name != "gp" else 16):
        history.append(record(one, number, "running", history))
        if number >= 3:
            late = number - 3 if number % 2 else number - 2
            for place in (late, number - 3):
                done = history[place]
                values = objective([done.coefficients[g] for g in GROUPS])[: len(aims(name))]
                history[place] = TrialRecord(
                    place, done.kind, "complete", done.coefficients, values, known(place), done.tags, None
                )
    another = make_engine(config(engine, name), GROUPS, BOUNDS, sources(len(aims(name)))).propose(
        history, len(history)
    )
    assert set(another.coefficients) == set(GROUPS)


@pytest.mark.parametrize(("engine", "name"), [("optuna", "nsga2"), ("pymoo", "nsga2")])
def test_the_uniform_line_breeds(engine: str, name: str) -> None:
    """Optuna's NSGA-II ignores trials that it did not draw; here the baselines belong to its first generation.

    All random members of the first generation are made worse than every baseline, so children stem from the line.
    """
    one = make_engine(config(engine, name), GROUPS, (0.0, 1.0), sources())
    history: list[TrialRecord] = []
    for number in range(60):
        new = record(one, number, "complete", history)
        if new.kind == "search" and number < 22:
            new = TrialRecord(
                number, new.kind, "complete", new.coefficients, (-9.0, 9.0), known(number), new.tags, None
            )
        history.append(new)
    spread = [np.ptp(list(r.coefficients.values())) for r in history[26:40]]
    assert (
        np.median(spread) < 0.5
    )  # random recipes of three groups: about 0.5, and rarely equal in two groups
    if engine == "optuna":  # its crossover copies coefficients, pymoo's blends them
        assert any(len(set(r.coefficients.values())) < 3 for r in history[26:40])


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_hundreds_of_generations_are_taken_up(name: str) -> None:
    """Optuna selects the parents of a generation from those of the one before, and so on to the first."""
    config = SamplerConfig(name=name, population=4)
    one = make_engine(config, GROUPS, BOUNDS, sources())
    (key,) = one.baseline_tags(0)
    rng = np.random.default_rng(0)
    history = []
    for number in range(4 * 1100):
        x = rng.uniform(*BOUNDS, len(GROUPS)).tolist()
        tags = {key: number // 4}
        coefficients = dict(zip(GROUPS, x, strict=True))
        history.append(TrialRecord(number, "search", "complete", coefficients, objective(x), {}, tags, None))
    assert one.propose(history, len(history)).tags == {key: 1100}


def test_one_and_three_objectives() -> None:
    for engine, name in ALL:
        for maximize in ((True,), (True, False, False))[: 1 if name in SINGLE_OBJECTIVE else 2]:
            one = make_engine(config(engine, name), GROUPS, BOUNDS, sources(len(maximize)))
            history: list[TrialRecord] = []
            for number in range(30 if name != "gp" else 14):
                new = record(one, number, "running", history)
                values = (objective([new.coefficients[g] for g in GROUPS]) * 2)[: len(maximize)]
                history.append(
                    TrialRecord(
                        number, new.kind, "complete", new.coefficients, values, known(number), new.tags, None
                    )
                )
            assert len({tuple(r.coefficients.values()) for r in history}) > 11, (engine, name)


def test_a_grid_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match="grid of 11 points in 30 dimensions"):
        make_engine(SamplerConfig(name="grid"), tuple(map(str, range(30))), BOUNDS, sources())


@pytest.mark.parametrize("name", PYMOO_ALGORITHMS)
def test_with_one_objective_every_genetic_algorithm_climbs(name: str) -> None:
    """Those for several objectives, too: their fronts are then single values, in order. Random search is the rule."""

    def best(engine: str, name: str, seed: int) -> float:
        one = make_engine(config(engine, name, seed), GROUPS, BOUNDS, sources(1))
        history: list[TrialRecord] = []
        for number in range(90):
            history.append(record(one, number, "complete", history, objectives=1))
        return max(r.values[0] for r in history if r.values)

    found = [best("pymoo", name, seed) for seed in range(3)]
    assert np.mean(found) > np.mean([best("optuna", "random", seed) for seed in range(3)])
