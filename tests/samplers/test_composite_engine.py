"""A model of answers: what it predicts, and that a search with it finds more than one without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from objectives.evaluation import Evaluation
from objectives.metrics.names import get_metric
from objectives.outcomes import Outcomes
from search.config.sampler import SamplerConfig
from search.front import hypervolume
from search.samplers import make_engine
from search.samplers.answers_model import AnswersModel
from search.samplers.composite_engine import CompositeEngine
from search.samplers.engine import sobol_point
from search.samplers.line_engine import LineEngine
from search.storage.trials import TrialRecord
from tests.conftest import Cli
from tests.pico_study import write_study
from tests.samplers.test_samplers import BOUNDS, GROUPS, LINE, known, sources

FIRST = len(LINE)


def smooth(x: np.ndarray) -> np.ndarray:
    """Fifty scores that ignore the last coordinate."""
    draw = np.random.default_rng(1)
    return np.asarray(
        np.tanh(x[:, :2] @ draw.normal(size=(2, 50))) + (x[:, :1] ** 2) @ draw.normal(size=(1, 50))
    )


def test_scores_are_predicted_from_few_recipes_and_idle_coefficients_found() -> None:
    draw = np.random.default_rng(0)
    x, new = draw.random((25, 3)), draw.random((40, 3))
    model = AnswersModel(x, smooth(x))
    assert np.abs(model.predict(x) - smooth(x)).max() < 0.02
    error = np.abs(model.predict(new) - smooth(new)).mean()
    assert error < 0.05 * np.abs(smooth(new) - smooth(x).mean(axis=0)).mean()
    elsewhere = np.where([False, False, True], draw.random((40, 3)), new)
    moved = [np.abs(model.predict(x) - model.predict(new)).mean() for x in (elsewhere, elsewhere[:, ::-1])]
    assert moved[0] < 0.01 * moved[1]
    assert (model.variance(x) < 0.01).all()
    assert (model.variance(x + 3.0) > model.variance(new).max()).all()


def test_the_order_of_trials_does_not_matter() -> None:
    draw = np.random.default_rng(0)
    x, new = draw.random((15, 3)), draw.random((5, 3))
    order = draw.permutation(15)
    one, other = AnswersModel(x, smooth(x)), AnswersModel(x[order], smooth(x)[order])
    np.testing.assert_allclose(one.predict(new), other.predict(new), atol=1e-3)


def test_equal_answers_are_no_failure() -> None:
    x = np.random.default_rng(0).random((6, 3))
    assert AnswersModel(x, np.ones((6, 4))).predict(x) == pytest.approx(1.0)


def world(record: TrialRecord) -> Evaluation:
    """400 questions of four options: the first coefficients know the answer, the last one only sharpens it."""
    x = np.array([record.coefficients[group] for group in GROUPS])
    draw = np.random.default_rng(0)
    gold, noise = draw.integers(0, 4, 400), draw.normal(size=(400, 4))
    score = noise + (1.5 - 2.0 * (x[0] - 0.9) ** 2 - 2.0 * (x[1] - 0.1) ** 2) * np.eye(4)[gold]
    zero = np.zeros(400, dtype=np.int64)
    outcomes = Outcomes.from_loglikelihoods(np.exp(0.4 + x[2]) * score, zero + 4, gold, zero)
    return Evaluation.of_probabilities(outcomes, 400, "")


def searched(engine: str, name: str, seed: int, trials: int = 26) -> float:
    """Hypervolume after a search whose values are those of its answers."""
    given = replace(sources(), answers=world)
    startup = 4 if engine == "composite" else None
    one = make_engine(
        SamplerConfig(engine=engine, name=name, seed=seed, startup=startup), GROUPS, BOUNDS, given
    )
    history: list[TrialRecord] = []
    for number in range(trials):
        kind, coefficients = "uniform", dict.fromkeys(GROUPS, LINE[min(number, FIRST - 1)])
        if number >= FIRST:
            kind, coefficients = "search", dict(one.propose(history, number).coefficients)
        kind = {0: "pre", FIRST - 1: "post"}.get(number, kind)
        record = TrialRecord(number, kind, "complete", coefficients, None, known(number), {}, None)
        outcomes = world(record).outcomes
        values = tuple(get_metric(metric).value(outcomes) for metric in ("accuracy", "ece"))
        history.append(replace(record, values=values))
    points = np.array([record.values for record in history])
    return hypervolume(points, [0.25, 0.5], maximise=(True, False))


@pytest.mark.slow
def test_it_finds_more_than_a_random_search() -> None:
    composite = [searched("composite", "gp", seed) for seed in range(3)]
    random = [searched("optuna", "random", seed) for seed in range(3)]
    assert min(composite) > max(random)


def test_of_very_many_trials_baselines_front_and_newest_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.samplers.composite_engine.MAX_KNOWN", 20)
    one = make_engine(SamplerConfig(engine="composite", name="gp"), GROUPS, BOUNDS, sources())
    assert isinstance(one, CompositeEngine)
    history = [
        TrialRecord(n, "uniform" if n < FIRST else "search", "complete", {}, (0.0, 1.0), known(n), {}, None)
        for n in range(60)
    ]
    history[FIRST + 1] = replace(history[FIRST + 1], values=(1.0, 0.0))
    numbers = [record.number for record in one._known(history)]
    assert numbers == [*range(FIRST), FIRST + 1, *range(52, 60)]
    assert one._known(history[:20]) == history[:20]


def test_it_begins_with_a_space_filling_design() -> None:
    engine = make_engine(SamplerConfig(engine="composite", name="gp"), GROUPS, BOUNDS, sources())
    proposal = engine.propose([], 0)
    unit = (np.array([proposal.coefficients[group] for group in GROUPS]) - BOUNDS[0]) / (
        BOUNDS[1] - BOUNDS[0]
    )
    np.testing.assert_allclose(unit, sobol_point(len(GROUPS), 0, 0))


def test_the_line_is_refined_evenly_without_the_baselines() -> None:
    engine = LineEngine(GROUPS, (-0.2, 1.2), {})
    history: list[TrialRecord] = []
    for number in range(40):
        coefficients = engine.propose(history, number).coefficients
        assert len(set(coefficients.values())) == 1
        history.append(TrialRecord(number, "search", "running", coefficients, None, {}, {}, None))
    found = sorted({*LINE, *(next(iter(record.coefficients.values())) for record in history)})
    assert len(found) == 51
    assert found[0] == -0.2
    assert found[-1] == 1.2
    assert np.diff(found).max() < 0.08


def test_a_study_with_sampled_answers_is_refused(cli: Cli, tmp_path: Path) -> None:
    study = write_study(
        tmp_path,
        sampler={"engine": "composite"},
        objectives=["accuracy", "distinct-2"],
        diversity={"prompts": "./questions.jsonl"},
    )
    code, _, err = cli("check", str(study))
    assert code == 2
    assert "distinct-2 is measured on sampled ones" in err
