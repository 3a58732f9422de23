"""The regression that chooses an author: scikit-learn's numbers, and what must not change it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.errors import ConfigError, EvaluationError, MergefrontError
from search.switching.classifier import Classifier, fit_classifier, penalty_losses

LAW = settings(deadline=None, max_examples=15)


def world(
    m: int = 90, d: int = 4, classes: int = 3, seed: int = 0
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Features, labels that depend on them, and groups of three rows that share most of their features."""
    random = np.random.default_rng(seed)
    centre = random.normal(size=(m // 3, d)).repeat(3, axis=0)
    x = centre + 0.3 * random.normal(size=(m, d))
    logits = x @ random.normal(size=(d, classes)) * 1.5
    y = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    return x, y, np.arange(m) // 3


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 10.0])
def test_it_is_scikit_learns_regression(classes: int, penalty: float) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y, _ = world(classes=classes)
    x = x * [1, 10, 100, 0.01] + [0, 5, -7, 3]
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000)
    z = scaler.transform(x)
    if classes == 2:
        # Two classes are one sigmoid there, on the difference of two weights: half its penalty on each is this one's.
        oracle.C = 2 * oracle.C
    wanted = oracle.fit(z, y).predict_proba(z)
    found = softmax(fit_classifier(x, y, classes, penalties=(penalty,)).logits(x))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_penalty_is_the_one_of_least_loss_on_whole_groups_held_out() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y, groups = world()
    penalties = (1e-4, 1e-2, 1.0, 100.0)
    losses = penalty_losses(x, y, 3, groups=groups, penalties=penalties, folds=5, seed=3)
    fold = np.random.default_rng(3).permutation(30)[groups] % 5
    for penalty, loss in zip(penalties, losses, strict=True):
        total = 0.0
        for held in range(5):
            inside, outside = fold != held, fold == held
            scaler = StandardScaler().fit(x[inside])
            oracle = LogisticRegression(C=1 / (penalty * inside.sum()), tol=1e-10, max_iter=10_000)
            oracle.fit(scaler.transform(x[inside]), y[inside])
            p = oracle.predict_log_proba(scaler.transform(x[outside]))
            total -= p[np.arange(len(p)), y[outside]].sum()
        assert loss == pytest.approx(total / len(x), rel=1e-5)
    best = penalties[int(np.argmin(losses))]
    assert 1e-4 < best < 100.0
    chosen = fit_classifier(x, y, 3, groups=groups, penalties=penalties, seed=3)
    plain = fit_classifier(x, y, 3, penalties=(best,))
    np.testing.assert_allclose(chosen.logits(x), plain.logits(x), atol=1e-9)  # two orders of the rows


def test_groups_keep_copies_of_a_row_on_one_side() -> None:
    # Labels are noise, every row is there five times: only without groups does a weak penalty look good.
    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 12)).repeat(5, axis=0), random.integers(0, 2, 20).repeat(5)
    groups = np.arange(20).repeat(5)
    penalties = (1e-3, 100.0)
    weak, strong = penalty_losses(x, y, 2, penalties=penalties)
    assert weak < strong
    weak, strong = penalty_losses(x, y, 2, groups=groups, penalties=penalties)
    assert strong < weak


@LAW
@given(seed=st.integers(0, 50), grouped=st.booleans())
def test_the_order_of_the_rows_changes_nothing(seed: int, grouped: bool) -> None:
    x, y, groups = world(m=45, seed=seed)
    order = np.random.default_rng(seed).permutation(len(x))
    options: dict[str, Any] = {"penalties": (1e-2, 1.0)}
    one = fit_classifier(x, y, 3, groups=groups if grouped else None, **options)
    other = fit_classifier(x[order], y[order], 3, groups=groups[order] if grouped else None, **options)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[name])


@LAW
@given(seed=st.integers(0, 50), factor=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_the_unit_of_a_feature_changes_nothing(seed: int, factor: float, shift: float) -> None:
    x, y, groups = world(m=45, seed=seed)
    scaled = x * [1, factor, 1, 1] + [0, 0, shift, 0]
    one = fit_classifier(x, y, 3, groups=groups, penalties=(1e-2, 1.0))
    other = fit_classifier(scaled, y, 3, groups=groups, penalties=(1e-2, 1.0))
    np.testing.assert_allclose(one.logits(x), other.logits(scaled), atol=1e-5)


def test_a_class_without_rows_has_probability_zero_and_a_still_feature_no_weight() -> None:
    x, y, groups = world()
    rounding = 1e8 + 4 * (y == 1)  # says which class it is, but no more than float32 loses
    x = np.column_stack([x, rounding]).astype(np.float64)
    y = np.where(y == 2, 3, y)
    one = fit_classifier(x, y, 5, groups=groups)
    assert one.weight[:, 4].tolist() == [0.0] * 5
    p = softmax(one.logits(x))
    assert p[:, [2, 4]].max() == 0.0
    np.testing.assert_allclose(
        p.mean(axis=0)[[0, 1, 3]], [np.mean(y == label) for label in (0, 1, 3)], atol=1e-6
    )
    without = fit_classifier(x[:, :4], np.where(y == 3, 2, y), 3, groups=groups)
    np.testing.assert_allclose(softmax(without.logits(x[:, :4])), p[:, [0, 1, 3]], atol=1e-6)


def test_a_class_of_one_group_does_not_spoil_the_choice_of_the_penalty() -> None:
    x, y, groups = world(classes=2)
    y = np.where(groups == 7, 2, y)
    losses = penalty_losses(x, y, 3, groups=groups)
    assert np.isfinite(losses).all()
    assert np.isfinite(fit_classifier(x, y, 3, groups=groups).bias).all()


def test_arrays_are_the_way_there_and_back() -> None:
    x, y, groups = world()
    one = fit_classifier(x, np.where(y == 2, 3, y), 4, groups=groups)
    again = Classifier.from_arrays(one.arrays())
    np.testing.assert_array_equal(again.logits(x), one.logits(x))
    with pytest.raises(ValueError, match="read-only"):
        one.weight[0, 0] = 1.0
    arrays = one.arrays()
    for broken in (
        {**arrays, "more": np.zeros(1)},
        {**arrays, "bias": arrays["bias"].astype(np.float32)},
        {**arrays, "bias": np.zeros(2)},
        {**arrays, "bias": np.full(4, -np.inf)},
        {**arrays, "weight": arrays["weight"] * np.nan},
        {**arrays, "scale": np.zeros(4)},
        {**arrays, "scale": np.ones(3)},
    ):
        with pytest.raises(EvaluationError, match=r"^classifier: "):
            Classifier.from_arrays(broken)


def test_inputs_stay_as_they_were() -> None:
    x, y, groups = world()
    kept = x.copy(), y.copy(), groups.copy()
    fit_classifier(x, y, 3, groups=groups)
    for before, after in zip(kept, (x, y, groups), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": np.zeros(90, dtype=int)}, ConfigError, "class 0"),
        ({"features": np.ones((90, 2))}, ConfigError, "none of 2 features varies"),
        (
            {"features": np.zeros((0, 2)), "labels": np.zeros(0, dtype=int), "groups": None},
            ConfigError,
            "no rows",
        ),
        ({"groups": np.arange(90) % 4}, ConfigError, "4 groups of rows for 5 folds"),
        ({"folds": 1}, ConfigError, "for 1 folds"),
        ({"penalties": ()}, ConfigError, "penalties"),
        ({"penalties": (0.0,)}, ConfigError, "penalties"),
        ({"penalties": (1.0, np.nan)}, ConfigError, "penalties"),
        ({"features": np.full((90, 2), np.inf)}, EvaluationError, "row 0 has a feature"),
        ({"features": np.zeros(90)}, EvaluationError, "shape"),
        ({"labels": np.full(90, 3)}, EvaluationError, "wanted 0 to 2"),
        ({"labels": np.zeros(90)}, EvaluationError, "integers"),
        ({"groups": np.arange(89)}, EvaluationError, "groups"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(
    change: dict[str, Any], error: type[MergefrontError], words: str
) -> None:
    x, y, groups = world()
    given: dict[str, Any] = {"features": x, "labels": y, "classes": 3, "groups": groups, **change}
    with pytest.raises(error, match=words) as caught:
        fit_classifier(**given)
    assert "\n" not in str(caught.value)


def test_other_features_than_it_was_fitted_with_are_refused() -> None:
    x, y, groups = world()
    one = fit_classifier(x, y, 3, groups=groups)
    with pytest.raises(EvaluationError, match="5 features a row"):
        one.logits(np.zeros((2, 5)))
    with pytest.raises(EvaluationError, match="row 1"):
        one.logits([[0.0] * 4, [np.nan] * 4])
