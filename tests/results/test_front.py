"""search/front.py: laws of dominance and volume, moocore and slices as oracles, and picks that do not wobble."""

from __future__ import annotations

from itertools import product
from random import Random

import moocore
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from search.errors import ConfigError, EvaluationError
from search.front import best, hypervolume, hypervolume_batch, knee, non_dominated, prefer

LAW = settings(deadline=None, max_examples=60)  # no deadline: the machine may be busy

Floats = npt.NDArray[np.float64]


@st.composite
def point_sets(draw: st.DrawFn, max_m: int = 4, min_n: int = 0) -> tuple[Floats, tuple[bool, ...]]:
    """Up to 12 points on a coarse grid (many duplicates and ties) and a direction for each objective."""
    m, n = draw(st.integers(1, max_m)), draw(st.integers(min_n, 12))
    points = draw(hnp.arrays(np.float64, (n, m), elements=st.integers(-4, 4).map(lambda v: v / 4)))
    return points, tuple(draw(st.lists(st.booleans(), min_size=m, max_size=m)))


def _by_definition(points: Floats, maximise: tuple[bool, ...]) -> list[bool]:
    gain = np.where(maximise, points, -points)
    return [not any((q >= p).all() and (q > p).any() for q in gain) for p in gain]


@LAW
@given(point_sets())
def test_front_is_the_definition(case: tuple[Floats, tuple[bool, ...]]) -> None:
    points, maximise = case
    assert non_dominated(points, maximise=maximise).tolist() == _by_definition(points, maximise)


@LAW
@given(point_sets())
def test_front_is_idempotent_and_not_empty(case: tuple[Floats, tuple[bool, ...]]) -> None:
    points, maximise = case
    front = non_dominated(points, maximise=maximise)
    assert non_dominated(points[front], maximise=maximise).all()
    assert front.any() == (len(points) > 0)


@LAW
@given(point_sets(), st.randoms(use_true_random=False))
def test_front_follows_a_permutation(case: tuple[Floats, tuple[bool, ...]], random: Random) -> None:
    points, maximise = case
    order = list(range(len(points)))
    random.shuffle(order)
    front = non_dominated(points, maximise=maximise)
    np.testing.assert_array_equal(non_dominated(points[order], maximise=maximise), front[order])


@LAW
@given(point_sets(min_n=1))
def test_front_equals_moocore_on_distinct_points(case: tuple[Floats, tuple[bool, ...]]) -> None:
    points, maximise = case
    points = np.unique(points, axis=0)  # moocore keeps one of several duplicates, we keep all
    assume(points.shape[1] > 1)
    expected = moocore.is_nondominated(points, maximise=list(maximise))
    np.testing.assert_array_equal(non_dominated(points, maximise=maximise), expected)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_front_of_many_points_equals_moocore(m: int) -> None:
    points = np.random.default_rng(m).random((2000, m))
    maximise = [j % 2 == 0 for j in range(m)]
    expected = moocore.is_nondominated(points, maximise=maximise)
    np.testing.assert_array_equal(non_dominated(points, maximise=maximise), expected)


def test_duplicates_stay_together() -> None:
    points = [[0.5, 0.1], [0.5, 0.1], [0.4, 0.1], [0.4, 0.1], [-0.0, 0.0], [0.0, -0.0]]
    front = non_dominated(points, maximise=(True, False))
    assert front.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1])
def test_unmeasured_points_neither_stand_nor_dominate(bad: float, column: int) -> None:
    points = np.array([[0.5, 0.1], [0.9, 0.01], [0.2, 0.3]])
    points[1, column] = bad
    assert non_dominated(points, maximise=(True, False)).tolist() == [True, False, False]
    assert hypervolume(points, [0, 1], maximise=(True, False)) == pytest.approx(0.45)
    assert knee(points, maximise=(True, False)) == 0


@pytest.mark.parametrize("empty", [[], np.zeros((0, 2))])
def test_nothing(empty: npt.ArrayLike) -> None:
    assert non_dominated(empty, maximise=(True, False)).tolist() == []
    assert hypervolume(empty, [0, 1], maximise=(True, False)) == 0.0
    with pytest.raises(EvaluationError, match="no trial has finite objectives"):
        knee(empty, maximise=(True, False))


def test_all_failed() -> None:
    points = np.full((3, 2), np.nan)
    assert not non_dominated(points, maximise=(True, False)).any()
    with pytest.raises(EvaluationError):
        best(points, 0, maximise=(True, False))


@pytest.mark.parametrize("points", [[[1.0, 2.0, 3.0]], [1.0, 2.0], [[[1.0, 2.0]]]])
def test_shapes_are_checked(points: npt.ArrayLike) -> None:
    for call in (
        lambda: non_dominated(points, maximise=(True, False)),
        lambda: hypervolume(points, [0, 0], maximise=(True, False)),
    ):
        with pytest.raises(ValueError, match="wanted"):
            call()
    with pytest.raises(ValueError, match="finite"):
        hypervolume([[1.0, 2.0]], [0, np.inf], maximise=(True, False))
    with pytest.raises(ValueError, match="wanted"):
        non_dominated([[]], maximise=())


def sliced(loss: Floats, limit: Floats) -> float:
    """Volume below `limit` by its definition: slices along the last objective (While et al. 2006, "HSO")."""
    inside = np.unique(loss[(loss < limit).all(axis=1)], axis=0)
    if not len(inside):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - inside.min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    thickness = np.diff(inside[:, -1], append=limit[-1])
    return sum(
        thick * sliced(inside[: i + 1, :-1], limit[:-1])
        for i, thick in enumerate(thickness.tolist())
        if thick > 0.0
    )


@LAW
@given(point_sets(min_n=1), st.data())
def test_hypervolume_equals_its_definition(
    case: tuple[Floats, tuple[bool, ...]], data: st.DataObject
) -> None:
    points, maximise = case
    m = points.shape[1]
    corner = data.draw(st.lists(st.sampled_from([-1.25, -0.5, 0.0, 0.3, 1.25]), min_size=m, max_size=m))
    sign = np.where(maximise, -1.0, 1.0)
    found = hypervolume(points, sign * np.array(corner), maximise=maximise)
    assert found == pytest.approx(sliced(points * sign, np.array(corner)), abs=1e-12)


@LAW
@given(point_sets(min_n=1), st.data())
def test_hypervolume_equals_moocore(case: tuple[Floats, tuple[bool, ...]], data: st.DataObject) -> None:
    points, maximise = case
    m = points.shape[1]
    assume(m > 1)
    corner = data.draw(st.lists(st.sampled_from([-1.25, -0.5, 0.0, 0.3, 1.25]), min_size=m, max_size=m))
    ref = np.where(maximise, -1.0, 1.0) * np.array(corner)
    expected = moocore.hypervolume(points, ref=ref, maximise=list(maximise))
    assert hypervolume(points, ref, maximise=maximise) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("m", "n"), [(2, 500), (3, 150), (4, 40), (5, 20)])
def test_hypervolume_of_random_points_equals_moocore(m: int, n: int) -> None:
    random = np.random.default_rng(m)
    for maximise in ((True,) * m, (True, *(False,) * (m - 1))):
        points = random.random((n, m))
        ref = np.where(maximise, 0.1, 0.9)
        expected = moocore.hypervolume(points, ref=ref, maximise=list(maximise))
        assert hypervolume(points, ref, maximise=maximise) == pytest.approx(expected, rel=1e-12)


@LAW
@given(point_sets(), st.data())
def test_hypervolume_laws(case: tuple[Floats, tuple[bool, ...]], data: st.DataObject) -> None:
    points, maximise = case
    m = len(maximise)
    ref = np.where(maximise, -1.5, 1.5)
    volume = hypervolume(points, ref, maximise=maximise)
    # Dominated points, duplicates and order change nothing.
    front = points[non_dominated(points, maximise=maximise)]
    again = hypervolume(np.vstack([front, points[::-1]]), ref, maximise=maximise)
    assert again == pytest.approx(volume, abs=1e-12)
    assert hypervolume(front, ref, maximise=maximise) == pytest.approx(volume, abs=1e-12)
    # One more point never lowers it, and raises it exactly when it is not weakly dominated.
    extra = data.draw(hnp.arrays(np.float64, (1, m), elements=st.integers(-5, 5).map(lambda v: v / 4)))
    more = hypervolume(np.vstack([points, extra]), ref, maximise=maximise)
    gain, new = np.where(maximise, points, -points), np.where(maximise, extra, -extra)
    covered = bool((gain >= new).all(axis=1).any())
    assert more >= volume - 1e-12
    assert (more > volume + 1e-9) == (not covered)
    # A shift of everything changes nothing; flipping an objective with its sign changes nothing.
    assert hypervolume(points + 0.5, ref + 0.5, maximise=maximise) == pytest.approx(volume, abs=1e-9)
    flipped = tuple(not up for up in maximise)
    assert hypervolume(-points, -ref, maximise=flipped) == pytest.approx(volume, abs=1e-12)


def test_points_outside_the_reference_add_nothing() -> None:
    points = [[0.5, 0.5], [0.9, 1.0], [0.0, 0.1], [-1.0, 2.0], [0.99, 1.7]]
    assert hypervolume(points, [0, 1], maximise=(True, False)) == pytest.approx(0.25)
    assert hypervolume([[0.5, 0.5, 3.0]], [0, 1, 1], maximise=(True, False, False)) == 0.0
    assert hypervolume([[2.0], [3.0], [-1.0]], [1.0], maximise=(True,)) == 2.0


@pytest.mark.parametrize("m", [5, 6, 8])
def test_many_objectives_equal_slices(m: int) -> None:
    random = np.random.default_rng(m)
    points = random.random((9, m))
    points[3] = points[2]
    points[4, 0] = np.nan
    points[5, 1] = 2.0  # outside
    kept = np.delete(points, [4, 5], axis=0)
    maximise, ref = (False,) * m, np.ones(m)
    found = hypervolume(points, ref, maximise=maximise)
    assert found == pytest.approx(sliced(kept, ref), rel=1e-12)
    assert hypervolume(-points, -ref, maximise=(True,) * m) == pytest.approx(found, rel=1e-12)
    assert hypervolume(np.empty((0, m)), ref, maximise=maximise) == 0.0
    assert hypervolume(points + 2.0, ref, maximise=maximise) == 0.0


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_batch_is_one_by_one(m: int) -> None:
    random = np.random.default_rng(m)
    stack = random.normal(size=(30, 12, m))
    stack[random.random(stack.shape) < 0.05] = np.nan
    maximise, ref = tuple(j % 2 == 0 for j in range(m)), np.zeros(m)
    expected = [hypervolume(points, ref, maximise=maximise) for points in stack]
    np.testing.assert_array_equal(hypervolume_batch(stack, ref, maximise=maximise), expected)
    assert hypervolume_batch(np.zeros((4, 0, m)), ref, maximise=maximise).tolist() == [0.0] * 4


def _distance_to_chord(points: Floats) -> Floats:
    """Signed distance of 2-D points (both maximised, scaled) from the chord of the extremes."""
    unit = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    start, end = unit[unit[:, 0].argmin()], unit[unit[:, 0].argmax()]
    along = end - start
    offset = unit - start
    return np.asarray((along[0] * offset[:, 1] - along[1] * offset[:, 0]) / np.hypot(*along))


@LAW
@given(hnp.arrays(np.float64, (8, 2), elements=st.floats(0, 1)))
def test_knee_is_farthest_from_the_chord(points: Floats) -> None:
    points = points[non_dominated(points, maximise=(True, True))]
    assume(len(points) > 1 and (np.ptp(points, axis=0) > 1e-3).all())
    distance = _distance_to_chord(points)
    assert distance[knee(points, maximise=(True, True))] == pytest.approx(distance.max(), abs=1e-8)


@LAW
@given(point_sets(min_n=1), st.randoms(use_true_random=False))
def test_picks_are_on_the_front_and_do_not_depend_on_order_or_scale(
    case: tuple[Floats, tuple[bool, ...]],
    random: Random,
) -> None:
    points, maximise = case
    m = len(maximise)
    order = list(range(len(points)))
    random.shuffle(order)
    stretched = points * np.array([1.0, 1000.0, 0.01, 3.0])[:m] + 7.0
    for weights in ([1.0] * m, [float(j + 1) for j in range(m)], [1.0, *[0.0] * (m - 1)]):
        pick = prefer(points, weights, maximise=maximise)
        assert non_dominated(points, maximise=maximise)[pick]
        shuffled = order[prefer(points[order], weights, maximise=maximise)]
        np.testing.assert_array_equal(points[shuffled], points[pick])
        assert not (points[:pick] == points[pick]).all(axis=1).any()  # the lowest index of duplicates
        assert prefer(stretched, weights, maximise=maximise) == pick
        assert prefer(points, [5.0 * w for w in weights], maximise=maximise) == pick
        mirrored = tuple(not up for up in maximise)
        assert prefer(-points, weights, maximise=mirrored) == pick
    assert knee(points, maximise=maximise) == prefer(points, [1.0] * m, maximise=maximise)


@LAW
@given(point_sets(min_n=1))
def test_best_is_best(case: tuple[Floats, tuple[bool, ...]]) -> None:
    points, maximise = case
    for j, up in enumerate(maximise):
        value = points[best(points, j, maximise=maximise), j]
        assert value == (points[:, j].max() if up else points[:, j].min())


def test_knee_of_one_of_identical_and_of_a_straight_front() -> None:
    up = (True, True)
    assert knee([[0.3, 0.4]], maximise=up) == 0
    assert knee([[0.3, 0.4]] * 3, maximise=up) == 0
    assert (
        knee([[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], maximise=up) == 2
    )  # balanced
    assert knee([[0.0, 1.0], [1.0, 0.0]], maximise=up) == 1  # better in the first objective
    assert knee([[0.0, 1.0], [0.1, 0.1], [1.0, 0.0]], maximise=up) == 2  # bends inwards: an extreme


def test_an_objective_that_does_not_vary_does_not_count() -> None:
    points = [[0.5, 0.1, 3.0], [0.6, 0.2, 3.0], [0.58, 0.12, 3.0]]
    assert knee(points, maximise=(True, False, True)) == 2
    assert best(points, 2, maximise=(True, False, True)) == 2


def test_prefer_moves_along_the_front() -> None:
    points = [[1 - x**2, x] for x in np.linspace(0, 1, 11)]
    picks = [prefer(points, [w, 1 - w], maximise=(True, True)) for w in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert picks[0] == 0
    assert picks[-1] == 10
    assert picks == sorted(picks)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0], [np.inf, 1.0]]
)
def test_prefer_refuses_weights(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="prefer: weights are"):
        prefer([[1.0, 2.0]], weights, maximise=(True, True))


def test_inputs_stay_as_they_are() -> None:
    points = np.random.default_rng(0).random((20, 3))
    points.flags.writeable = False
    for maximise in product((True, False), repeat=3):
        non_dominated(points, maximise=maximise)
        hypervolume(points, [0.5] * 3, maximise=maximise)
        knee(points, maximise=maximise)
