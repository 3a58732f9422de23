"""objectives/estimators: the published oracles, recovery and ranking on simulated recipes, laws, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.estimators.irt import Items, fit_ability, fit_items, fit_mixture
from objectives.estimators.methods import ESTIMATORS, Estimator, get_estimator, p_irt
from objectives.estimators.subset import choose_subset
from search.errors import ConfigError, EvaluationError, MergefrontError
from tests.scripts import load_script

LAW = settings(deadline=None, max_examples=60)
NAMES = st.sampled_from(sorted(ESTIMATORS))
IRT = sorted(name for name, estimator in ESTIMATORS.items() if estimator.ability is not None)


def drawn(seed: int, items: int = 12, dimensions: int = 2, bank: int = 5) -> Items:
    """Items with parameters of ordinary size; the first two recipes of the bank are the parents."""
    random = np.random.default_rng(seed)
    return Items(
        random.normal(size=(dimensions, items)),
        random.normal(size=items),
        random.normal(size=(bank, dimensions)),
    )


@st.composite
def scored(draw: st.DrawFn) -> tuple[Items, np.typing.NDArray[Any], np.typing.NDArray[Any]]:
    """Items, some of them in any order, and answers to those."""
    items = drawn(draw(st.integers(0, 1000)), draw(st.integers(1, 12)), draw(st.integers(1, 3)))
    index = draw(st.permutations(range(len(items))))[: draw(st.integers(1, len(items)))]
    correct = draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index)))
    return items, np.array(index), np.array(correct)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("estimators/errors.py")


@pytest.fixture(scope="module")
def measured(study: ModuleType) -> Callable[[float], Any]:
    """Mean absolute errors at all sizes by estimator, for a noise around the parents' line; each measured once."""
    known: dict[float, Any] = {}

    def at(noise: float) -> Any:
        if noise not in known:
            draw = partial(study.simulated, noise=noise, children=10)
            error, _ = study.measure(draw, seeds=16)
            known[noise] = {name: values.mean(axis=0) for name, values in error.items()}
        return known[noise]

    return at


# -- oracles ----------------------------------------------------------------------------------------------------


@LAW
@given(seed=st.integers(0, 1000), name=NAMES, right=st.lists(st.booleans(), min_size=12, max_size=12))
def test_all_questions_give_the_mean_exactly(seed: int, name: str, right: list[bool]) -> None:
    items = drawn(seed)
    found = ESTIMATORS[name].estimate(items, items.ability[:2], np.arange(12), right)
    assert found == np.mean(right)


def test_a_one_hot_mixture_is_the_parent() -> None:
    """Answers drawn from one parent lead to its one-hot mixture and to its ability."""
    items = drawn(3, items=4000)
    parents = items.ability[:2]
    for j, one_hot in enumerate(np.eye(2)):
        correct = np.random.default_rng(j).random(4000) < items.probability(parents[j])
        mixture = fit_mixture(items, parents, np.arange(4000), correct)
        np.testing.assert_allclose(mixture, one_hot, atol=0.15)
        np.testing.assert_allclose(mixture @ parents, parents[j], atol=0.15)
        np.testing.assert_allclose(fit_ability(items, np.arange(4000), correct), parents[j], atol=0.15)


@pytest.mark.parametrize("name", IRT)
def test_seen_answers_are_never_replaced(name: str) -> None:
    """With items that tell nothing about each other, the estimate is exactly answers and even chances."""
    items = Items(np.zeros((2, 10)), np.zeros(10), np.array([[1.0, 0.0], [0.0, 1.0]]))
    estimator = ESTIMATORS[name]
    for correct in ([1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]):
        mean = np.mean(correct)
        filled = 0.4 * mean + 0.6 * 0.5
        found = estimator.estimate(items, items.ability, [7, 2, 0, 4], correct)
        assert found == pytest.approx(estimator.c * mean + (1.0 - estimator.c) * filled, abs=1e-12)


def test_the_formulas_by_hand() -> None:
    items = drawn(5)
    index, correct, weights = np.array([1, 4, 8]), np.array([1, 0, 1]), np.array([1.0, 2.0, 5.0])
    parents, unseen = items.ability[:2], np.setdiff1d(np.arange(12), [1, 4, 8])
    mean, share = 0.75, 2 / 3  # (1 + 5) / 8, and what was seen of the twelve: two of three
    own = fit_ability(items, index, correct)
    mixed = fit_mixture(items, parents, index, correct) @ parents
    for name, ability in (("p-irt", own), ("mp-irt", mixed)):
        logit = items.discrimination[:, unseen].T @ ability - items.difficulty[unseen]
        filled = 3 / 12 * share + 9 / 12 * np.mean(1.0 / (1.0 + np.exp(-logit)))
        assert p_irt(items, ability, index, share) == pytest.approx(filled)
        assert ESTIMATORS[name].estimate(items, parents, index, correct, weights) == pytest.approx(filled)
        mixing = get_estimator(f"g{name}", c=0.3)
        found = mixing.estimate(items, parents, index, correct, weights)
        assert found == pytest.approx(0.3 * mean + 0.7 * filled)
    assert ESTIMATORS["weighted"].estimate(items, parents, index, correct, weights) == mean
    assert ESTIMATORS["mean"].estimate(items, parents, index, correct, weights) == pytest.approx(2 / 3)


@pytest.mark.parametrize("answer", [0, 1])
def test_separable_answers_give_finite_abilities(answer: int) -> None:
    items = drawn(0)
    index, correct = np.arange(12), np.full(12, answer)
    assert np.abs(fit_ability(items, index, correct)).max() < 5.0
    assert np.abs(fit_mixture(items, items.ability[:2], index, correct)).max() < 5.0


def test_fits_are_stationary() -> None:
    """At the fitted point the gradient of the stated objective, written out here, vanishes."""
    items = drawn(1)
    index, y = np.array([0, 3, 5, 9]), np.array([1.0, 1.0, 0.0, 1.0])
    a, parents = items.discrimination[:, index], items.ability[:2]
    g = fit_ability(items, index, y, ridge=2.0)
    np.testing.assert_allclose(a @ (items.probability(g)[index] - y) + 2.0 * g, 0.0, atol=1e-9)
    mixture = fit_mixture(items, parents, index, y, ridge=0.5)
    slope = parents @ a @ (items.probability(mixture @ parents)[index] - y)
    np.testing.assert_allclose(slope + 0.5 * (mixture - 0.5), 0.0, atol=1e-9)


def test_probabilities_are_clipped() -> None:
    items = Items(np.array([[1e6, -1e6]]), np.zeros(2), np.zeros((1, 1)))
    high, low = items.probability([1.0])
    assert 1.0 - 1e-12 < high < 1.0
    assert 0.0 < low < 1e-12


# -- simulated recipes ------------------------------------------------------------------------------------------


def test_items_are_recovered() -> None:
    """200 items, 40 recipes, two dimensions: probabilities and abilities, up to the choice of axes."""
    random = np.random.default_rng(0)
    truth = Items(
        random.lognormal(0.0, 0.5, (2, 200)), random.normal(0.0, 1.5, 200), random.normal(size=(40, 2))
    )
    chance = truth.probability(truth.ability)
    found = fit_items(random.random(chance.shape) < chance, 2)
    assert np.corrcoef(found.difficulty, truth.difficulty)[0, 1] > 0.9
    assert np.sqrt(np.mean((found.probability(found.ability) - chance) ** 2)) < 0.12
    basis = np.column_stack([found.ability, np.ones(40)])
    residual = truth.ability - basis @ np.linalg.lstsq(basis, truth.ability, rcond=None)[0]
    assert (residual.var(axis=0) < 0.2 * truth.ability.var(axis=0)).all()


def test_abilities_of_the_bank_are_standardised(study: ModuleType) -> None:
    items = fit_items(study.simulated(0, noise=0.0).bank, 3)
    np.testing.assert_allclose(items.ability.mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(items.ability.T @ items.ability / len(items.ability), np.eye(3), atol=1e-9)


@pytest.mark.slow
def test_parents_help_most_with_few_questions(measured: Callable[[float], Any]) -> None:
    error = measured(0.0)
    for at, size in enumerate((10, 20, 30)):
        best = min(error, key=lambda name: error[name][at])
        assert best in ("mp-irt", "gmp-irt"), size
        assert error["gmp-irt"][at] < 0.9 * error["mean"][at], size
    share = error["mp-irt"] / error["mean"]
    assert share[0] < 0.75
    assert share[0] < share[-1]


def test_off_the_parents_line_the_mixture_is_biased(measured: Callable[[float], Any]) -> None:
    """Children far from every mixture: mp-IRT falls behind the mean, gmp-IRT half as far or not at all."""
    error = measured(2.0)
    assert error["mp-irt"][-1] > 1.1 * error["mean"][-1]
    assert (error["gmp-irt"] < error["mp-irt"]).all()
    assert (error["mp-irt"] / error["mean"])[2] > (measured(0.0)["mp-irt"] / measured(0.0)["mean"])[2] + 0.1


# -- laws -------------------------------------------------------------------------------------------------------


@LAW
@given(case=scored(), name=NAMES, seed=st.integers(0, 100))
def test_estimates_are_shares_and_order_does_not_matter(case: Any, name: str, seed: int) -> None:
    items, index, correct = case
    weights = np.random.default_rng(seed).uniform(0.5, 3.0, index.size)
    estimator, parents = ESTIMATORS[name], items.ability[:2]
    found = estimator.estimate(items, parents, index, correct, weights)
    assert 0.0 <= found <= 1.0
    order = np.random.default_rng(seed).permutation(index.size)
    again = estimator.estimate(items, parents, index[order], correct[order], weights[order])
    assert again == found


@LAW
@given(
    answers=st.integers(2, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=3, max_size=6)
    )
)
def test_every_bank_is_fitted_and_always_alike(answers: list[list[int]]) -> None:
    bank = np.array(answers)
    items, again = fit_items(bank, 2), fit_items(bank.astype(bool), 2)
    for name, array in items.to_arrays().items():
        assert np.isfinite(array).all()
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, again.to_arrays()[name])


def test_the_order_of_the_bank_does_not_matter(study: ModuleType) -> None:
    bank = study.simulated(1, noise=0.0).bank
    before = bank.copy()
    rows, columns = np.random.default_rng(0).permutation(40), np.random.default_rng(1).permutation(200)
    items, other = fit_items(bank, 2), fit_items(bank[rows][:, columns], 2)
    expected = items.probability(items.ability)[rows][:, columns]
    np.testing.assert_allclose(other.probability(other.ability), expected, atol=1e-3)
    np.testing.assert_array_equal(bank, before)


@pytest.mark.parametrize("sizes", [[5], [3, 3], [1, 1, 50], [7, 2, 2, 9]])
def test_subsets_stand_for_all_questions(sizes: list[int]) -> None:
    strata = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    total = strata.size
    for size in range(len(sizes), total + 1):
        chosen = choose_subset(total, size, seed=size, strata=strata)
        assert len(chosen) == size
        assert (np.diff(chosen.index) > 0).all()
        for stratum, count in enumerate(sizes):
            inside = strata[chosen.index] == stratum
            assert inside.any()
            assert chosen.weights[inside].sum() == pytest.approx(count)
        again = choose_subset(total, size, seed=size, strata=strata)
        np.testing.assert_array_equal(chosen.index, again.index)


def test_subsets_are_uniform() -> None:
    times = np.zeros(10)
    for seed in range(2000):
        times[choose_subset(10, 3, seed).index] += 1
    assert np.abs(times / 2000 - 0.3).max() < 0.05


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_items(np.eye(2), 2), ConfigError, "2 scored recipes and 2 questions for 2 dimensions"),
        (lambda: fit_items(np.eye(3), 0), ConfigError, "for 0 dimensions"),
        (lambda: fit_items([[0], [1], [1]], 2), ConfigError, "3 scored recipes and 1 questions for 2 dim"),
        (lambda: fit_items(np.eye(3), 1, difficulty_ridge=0.0), ConfigError, "difficulty_ridge: found 0.0"),
        (lambda: fit_items(np.zeros((3, 0)), 1), EvaluationError, "shape (3, 0)"),
        (lambda: fit_items([[0, 1], [1, 2], [0, 0]], 1), EvaluationError, "an answer is 2 "),
        (lambda: fit_items([[0.0, np.nan], [1, 1], [0, 0]], 1), EvaluationError, "an answer is nan"),
        (lambda: fit_ability(drawn(0), [], []), EvaluationError, "at least one"),
        (lambda: fit_ability(drawn(0), [12], [1]), EvaluationError, "no item 12 (wanted 0 to 11)"),
        (lambda: fit_ability(drawn(0), [-1], [1]), EvaluationError, "no item -1"),
        (lambda: fit_ability(drawn(0), [0.5], [1]), EvaluationError, "wanted integers"),
        (lambda: fit_ability(drawn(0), [3, 3], [1, 1]), EvaluationError, "item 3 occurs twice"),
        (lambda: fit_ability(drawn(0), [3, 4], [1]), EvaluationError, "1 answers to 2 items"),
        (lambda: fit_ability(drawn(0), [3], [1], ridge=-1.0), ConfigError, "ridge: found -1.0"),
        (lambda: fit_mixture(drawn(0), [[1.0, 0.0]], [3], [1]), ConfigError, "1 parents"),
        (lambda: fit_mixture(drawn(0), np.ones((2, 3)), [3], [1]), EvaluationError, "wanted (parents, 2)"),
        (
            lambda: ESTIMATORS["weighted"].estimate(drawn(0), [], [3], [1], [0.0]),
            EvaluationError,
            "weights: shape (1,)",
        ),
        (lambda: Estimator("mine", "own", 1.5), ConfigError, "c is 1.5"),
        (lambda: get_estimator("gmpirt"), ConfigError, "Did you mean 'gmp-irt'?"),
        (lambda: get_estimator("p-irt", c=0.5), ConfigError, "p-irt has no c"),
        (lambda: Items(np.ones((1, 2)), np.ones(3), np.ones((1, 1))), EvaluationError, "do not fit together"),
        (
            lambda: Items(np.ones((1, 2)), np.array([0.0, np.inf]), np.ones((1, 1))),
            EvaluationError,
            "difficulty holds a number that is not finite",
        ),
        (lambda: choose_subset(5, 6, 0), ConfigError, "6 of 5 questions"),
        (lambda: choose_subset(5, 0, 0), ConfigError, "0 of 5 questions"),
        (lambda: choose_subset(3, 1, 0, strata=[0, 0, 1]), ConfigError, "1 questions for 2 tasks"),
        (lambda: choose_subset(3, 1, 0, strata=[0, 0]), ConfigError, "strata have shape (2,)"),
    ],
)
def test_errors_are_one_line(call: Callable[[], object], error: type[MergefrontError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
