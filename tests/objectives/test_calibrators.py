"""objectives/calibrators: known answers, laws, independent minimisers, the papers' traps, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as scipy_entropy

from objectives.calibrators.cape import permuted_questions
from objectives.calibrators.daca import daca, naive_alignment
from objectives.calibrators.dual_align import divergence_layers, dual_align
from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.logits import LayerwiseLogits, OptionLogits, vocabulary_digest
from objectives.calibrators.methods import METHODS, fit
from objectives.calibrators.solver import TEMPERATURES
from objectives.calibrators.temperature import temperature_scaling, vanilla
from objectives.calibrators.tempering import entropy, jensen_shannon, tempered
from objectives.evaluator import Evaluator
from objectives.metrics.accuracy import accuracy
from objectives.metrics.calibration import nll
from objectives.outcomes import Floats, Outcomes
from objectives.questions.config import TaskConfig
from objectives.questions.questions import Question
from search.errors import ConfigError, EvaluationError
from tests.objectives.test_tasks import all_of, load, rows, write
from tests.pico import pico_model, pico_tokenizer

EXACT = 1e-6  # what the issue asks of naive alignment and DACA
DUAL_ALIGN = 1e-6  # its minimiser compares values of the loss; measured: 2e-8


def logits(score: Any, gold: Any = None, **more: Any) -> OptionLogits:
    """Every option is real."""
    values = np.asarray(score, dtype=np.float64)
    n, k = values.shape
    return OptionLogits(
        values, np.full(n, k), np.zeros(n, dtype=np.int64), None if gold is None else np.array(gold), **more
    )


def drawn(seed: int = 0, n: int = 200, k: int = 5, depth: int = 6) -> LayerwiseLogits:
    """A calibrated reference: 2 to k options, gold answers drawn from its own distribution, layers that approach it."""
    random = np.random.default_rng(seed)
    options = random.integers(2, k + 1, size=n)
    padding = np.arange(k) >= options[:, None]
    score = np.where(padding, -np.inf, 1.5 * random.normal(size=(n, k)))
    gold = np.array([random.choice(k, p=row) for row in softmax(score, axis=1)])
    noise = random.normal(size=(n, depth, k)) * np.linspace(1.5, 0.3, depth)[None, :, None]
    earlier = np.linspace(0.2, 0.9, depth)[None, :, None] * score[:, None] + noise
    final = OptionLogits(score, options, np.zeros(n, dtype=np.int64), gold, "these questions")
    return LayerwiseLogits(final, np.where(padding[:, None], -np.inf, earlier))


def scaled(pre: LayerwiseLogits, c: float) -> LayerwiseLogits:
    return LayerwiseLogits(replace(pre.final, score=c * pre.final.score), c * pre.earlier)


def flipped(layers: LayerwiseLogits, share: float) -> LayerwiseLogits:
    """The first `share` of the questions answer otherwise: their two best options change places, in every layer.

    The labels follow them, so that the model is right where it disagrees, as often as the reference claims.
    """
    score, earlier = layers.final.score.copy(), layers.earlier.copy()
    assert layers.final.gold is not None
    gold = layers.final.gold.copy()
    for i in range(round(share * len(layers))):
        a, b = np.argsort(-score[i], kind="stable")[:2]
        score[i, [a, b]] = score[i, [b, a]]
        earlier[i][:, [a, b]] = earlier[i][:, [b, a]]
        gold[i] = {a: b, b: a}.get(gold[i], gold[i])
    return LayerwiseLogits(replace(layers.final, score=score, gold=gold), earlier)


# --- a sharpened reference is brought back exactly


@settings(max_examples=60, deadline=None)
@given(c=st.floats(0.02, 50.0), seed=st.integers(0, 10**6), n=st.integers(1, 30))
def test_a_scaled_reference_gives_its_scale(c: float, seed: int, n: int) -> None:
    pre = drawn(seed, n)
    post = scaled(pre, c)
    for method in (naive_alignment, daca):
        fitted = method(post.final, pre.final)
        assert fitted.temperature == pytest.approx(c, rel=EXACT)
        assert fitted.reason is None
        assert (fitted.questions, fitted.used, fitted.agreement) == (n, n, n)


@pytest.mark.parametrize("choice", [{}, {"gate": 0.5}, {"gate": 1.0}, {"gate": 0.0}, {"stability": "sum"}])
@pytest.mark.parametrize("c", [0.2, 3.0, 9.0])
def test_dual_align_gives_the_scale_too(c: float, choice: dict[str, Any]) -> None:
    for seed in range(5):
        pre = drawn(seed, n=40)
        assert dual_align(scaled(pre, c), pre, **choice).temperature == pytest.approx(c, rel=DUAL_ALIGN)


def test_disagreement_makes_naive_alignment_under_confident_but_not_the_others() -> None:
    pre = drawn(n=2000)
    found = {}
    for share in (0.0, 0.2, 0.4):
        post = flipped(scaled(pre, 3.0), share)
        found[share] = {name: fit(name, post, pre) for name in METHODS}
        assert found[share]["daca"].agreement == 2000 - round(2000 * share)
        assert found[share]["daca"].temperature == pytest.approx(3.0, rel=EXACT)
        # The flipped questions' entropies are those of the reference at 3, too.
        assert found[share]["dual-align"].temperature == pytest.approx(3.0, rel=DUAL_ALIGN)
        assert found[share]["temperature"].temperature == pytest.approx(3.0, rel=0.1)
    naive = [found[share]["naive"].temperature for share in (0.0, 0.2, 0.4)]
    assert naive[0] < 0.8 * naive[1] < 0.8 * 0.8 * naive[2]


# --- the counter-example of three options


def test_a_low_confidence_in_the_answer_does_not_mean_an_infinite_temperature() -> None:
    """DACA's proposition 3.3 says so for p < 1/k; with k = 3 and p = 0.3 the optimum is finite: beta 0.523."""
    g, p = [2.0, 1.9, -5.0], [0.3, 0.69, 0.01]
    post, pre = logits([g]), logits([np.log(p)])
    fitted = naive_alignment(post, pre)
    assert 1.0 / fitted.temperature == pytest.approx(0.523, abs=1e-3)
    assert fitted.temperature == pytest.approx(1.91, abs=5e-3)
    assert softmax(np.array(g) / fitted.temperature) @ g == pytest.approx(np.dot(p, g), abs=1e-9)
    assert fitted.reason is None
    assert daca(post, pre).temperature == 1.0  # it never sees the question: the answers differ


@pytest.mark.parametrize(("last", "finite"), [(0.30, True), (0.34, False)])
def test_the_exact_condition_for_an_infinite_temperature(last: float, finite: bool) -> None:
    """No optimum where sum p g <= mean g, here where p of the last option is above 0.3187."""
    g, p = np.array([2.0, 1.9, -5.0]), np.array([0.1, 0.9 - last, last])
    assert (p @ g > g.mean()) == finite
    fitted = naive_alignment(logits([g]), logits([np.log(p)]))
    assert (fitted.temperature < TEMPERATURES[-1]) == finite
    assert (fitted.reason is None) == finite
    assert finite or "falls up to the largest temperature" in str(fitted.reason)


# --- fall-backs and edges


def test_no_agreement_falls_back_to_one() -> None:
    post, pre = logits([[2.0, 0.0], [0.0, 3.0]]), logits([[0.0, 1.0], [1.0, 0.0]])
    fitted = daca(post, pre)
    assert (fitted.temperature, fitted.used, fitted.agreement, fitted.curve) == (1.0, 0, 0, ())
    assert fitted.reason == "post and pre agree on none of 2 questions, so 1 is kept"


@pytest.mark.parametrize("score", [[[0.0, 0.0, 0.0]] * 3, [[-1.0]] * 2])
def test_scores_without_a_preference_keep_one(score: Any) -> None:
    flat = logits(score, np.zeros(len(score), dtype=np.int64))
    layers = LayerwiseLogits(flat, np.repeat(flat.score[:, None], 3, axis=1))
    for method in METHODS:
        fitted = fit(method, layers, layers)
        assert fitted.temperature == 1.0
        assert method == "vanilla" or "same at every temperature" in str(fitted.reason)


def test_answers_that_are_all_right_have_no_finite_optimum() -> None:
    fitted = temperature_scaling(logits([[1.0, 0.0], [2.0, 0.0]], [0, 0]))
    assert fitted.temperature == TEMPERATURES[0]
    assert "falls up to the smallest temperature" in str(fitted.reason)


def test_ties_agree_by_the_first_option() -> None:
    post, pre = logits([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), logits([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert daca(post, pre).agreement == 1


# --- answers never change


@st.composite
def any_logits(draw: st.DrawFn) -> OptionLogits:
    """Scores with exact ties and with gaps below what a softmax can tell apart."""
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    value = st.one_of(
        st.integers(-3, 3).map(float), st.floats(-60, 60), st.integers(0, 3).map(lambda i: i * 1e-16)
    )
    options = np.array(draw(st.lists(st.integers(1, k), min_size=n, max_size=n)))
    score = np.array(draw(st.lists(st.lists(value, min_size=k, max_size=k), min_size=n, max_size=n)))
    gold = np.array([draw(st.integers(0, int(count) - 1)) for count in options])
    padded = np.where(np.arange(k) < options[:, None], score, -np.inf)
    return OptionLogits(padded, options, np.zeros(n, dtype=np.int64), gold)


@settings(max_examples=300, deadline=None)
@given(any_logits(), st.sampled_from(TEMPERATURES))
def test_no_temperature_changes_an_answer(given_logits: OptionLogits, temperature: float) -> None:
    before = Outcomes.from_loglikelihoods(
        given_logits.score, given_logits.options, given_logits.gold, given_logits.task
    )
    assert np.array_equal(given_logits.predicted, before.predicted)
    after = FittedTemperature("any", temperature, 1, 1).apply(given_logits)
    assert np.array_equal(after.predicted, before.predicted)
    assert np.array_equal(after.correct, before.correct)
    if temperature == 1.0:
        assert np.array_equal(after.probability, before.probability)


@settings(max_examples=40, deadline=None)
@given(any_logits(), st.data())
def test_no_method_changes_an_answer(post: OptionLogits, data: st.DataObject) -> None:
    shift = np.array(
        data.draw(st.lists(st.integers(-2, 2), min_size=post.score.size, max_size=post.score.size))
    )
    pre = replace(post, score=post.score + shift.reshape(post.score.shape))
    earlier = np.stack([0.3 * post.score, 0.7 * post.score], axis=1)
    copy = post.score.copy()
    for method in METHODS:
        fitted = fit(method, LayerwiseLogits(post, earlier), LayerwiseLogits(pre, 0.5 * earlier))
        assert 0.0 < fitted.temperature < np.inf
        assert accuracy(fitted.apply(post))[0] == accuracy(vanilla(post).apply(post))[0]
        json.dumps(fitted.to_json(), allow_nan=False)
    assert np.array_equal(post.score, copy)


# --- independent minimisers


@pytest.mark.parametrize("seed", range(4))
def test_temperature_scaling_is_the_minimiser_that_torch_finds(seed: int) -> None:
    post = scaled(drawn(seed), 2.5).final
    fitted = temperature_scaling(post)
    log_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score, gold = torch.tensor(np.maximum(post.score, -1e6)), torch.tensor(post.gold)  # -inf has no gradient
    optimiser = torch.optim.LBFGS(
        [log_temperature],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(score / log_temperature.exp(), gold)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert fitted.temperature == pytest.approx(log_temperature.exp().item(), rel=1e-6)
    assert dict(fitted.curve)[fitted.temperature] == pytest.approx(nll(fitted.apply(post))[0], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(any_logits())
def test_temperature_scaling_is_never_worse_than_nothing_where_it_was_fitted(post: OptionLogits) -> None:
    curve = dict(temperature_scaling(post).curve)
    assert curve[temperature_scaling(post).temperature] <= curve[1.0] + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_alignment_is_the_minimiser_that_scipy_finds(seed: int) -> None:
    pre = drawn(seed).final
    post = replace(
        pre, score=2.0 * pre.score + 3.0 * np.random.default_rng(seed).normal(size=pre.score.shape)
    )
    for method in ("naive", "daca"):
        used = np.ones(len(pre), bool) if method == "naive" else post.score.argmax(1) == pre.score.argmax(1)

        def loss(s: float, used: Any = used) -> float:
            q = softmax(post.score[used] / np.exp(s), axis=1)
            return float(scipy_entropy(softmax(pre.score[used], axis=1), q, axis=1).sum() / len(pre))

        best = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
        fitted = fit(method, post, pre)
        assert fitted.used == used.sum()
        assert np.log(fitted.temperature) == pytest.approx(best.x, abs=1e-5)
        assert dict(fitted.curve)[fitted.temperature] == pytest.approx(best.fun, abs=1e-12)


def test_entropy_and_divergence_equal_scipy() -> None:
    p, q = (tempered(drawn(seed).scores, 1.0)[0] for seed in (0, 1))
    real = np.isfinite(drawn(0).scores).all(axis=2) & np.isfinite(drawn(1).scores).all(axis=2)
    wanted = jensenshannon(p[real], q[real], axis=-1) ** 2
    assert jensen_shannon(p[real], q[real]) == pytest.approx(wanted, abs=1e-12)
    assert not jensen_shannon(p, p).any()
    assert entropy(drawn(0).scores, 2.0) == pytest.approx(
        scipy_entropy(softmax(drawn(0).scores / 2.0, axis=2), axis=2), abs=1e-12
    )


# --- Dual-Align, written down question by question


def by_hand(
    post: LayerwiseLogits,
    pre: LayerwiseLogits,
    tau: float,
    gate: Any,
    jump: str,
    stability: str,
    divided: str,
) -> float:
    total = 0.0
    for i in range(len(post)):
        n = post.final.options[i]
        g, f = post.scores[i, :, :n], pre.scores[i, :, :n]
        d = jensenshannon(softmax(g, axis=1), softmax(f, axis=1), axis=1)
        d = d if jump == "distance" else d**2
        first = max(range(1, len(d)), key=lambda layer, d=d: abs(d[layer] - d[layer - 1]))
        temperatures = [tau if divided == "all" or layer == len(d) - 1 else 1.0 for layer in range(len(d))]
        own = [scipy_entropy(softmax(g[layer] / temperatures[layer])) for layer in range(first, len(d))]
        reference = [scipy_entropy(softmax(f[layer])) for layer in range(first, len(d))]
        combine = np.mean if stability == "mean" else np.sum
        process = (combine(own) - combine(reference)) ** 2
        confidence = float(softmax(f[-1]) @ (log_softmax(f[-1]) - log_softmax(g[-1] / tau)))
        a = float(g[-1].argmax() == f[-1].argmax()) if gate == "agreement" else gate
        total += a * confidence + (1 - a) * process
    return total / len(post)


@pytest.mark.parametrize(
    ("gate", "jump", "stability", "divided"),
    [
        ("agreement", "divergence", "mean", "all"),
        (0.5, "distance", "mean", "all"),
        ("agreement", "distance", "sum", "last"),
        (0.0, "divergence", "sum", "all"),
    ],
)
def test_dual_align_minimises_the_documented_loss(gate: Any, jump: Any, stability: Any, divided: Any) -> None:
    pre, random = drawn(0, n=25), np.random.default_rng(1)
    post = scaled(pre, 2.0)
    post = LayerwiseLogits(
        replace(post.final, score=post.final.score + 3.0 * random.normal(size=post.final.score.shape)),
        post.earlier + 3.0 * random.normal(size=post.earlier.shape),
    )
    fitted = dual_align(post, pre, gate=gate, jump=jump, stability=stability, tempered_layers=divided)
    for temperature, loss in fitted.curve[::5]:
        assert loss == pytest.approx(
            by_hand(post, pre, temperature, gate, jump, stability, divided), abs=1e-10
        )
    least = min(loss for _, loss in fitted.curve)
    assert dict(fitted.curve)[fitted.temperature] == pytest.approx(least, abs=1e-12)
    assert fitted.used == 25
    assert fitted.agreement == (post.final.predicted == pre.final.predicted).sum()
    assert fitted.settings["gate"] == gate


def test_the_divergence_layer_is_the_largest_jump_not_the_largest_value() -> None:
    flat, left, right = [0.0, 0.0], [4.0, 0.0], [0.0, 4.0]
    paths = [
        ([flat, flat, left], [flat, flat, right]),  # parts at layer 3 ...
        ([flat, left, left], [flat, right, right]),  # ... at 2, and stays apart
        ([left, left, flat], [right, right, flat]),  # a fall is a jump, too
        ([left, left, left], [left, left, left]),  # never: the first candidate
    ]
    post, pre = (
        LayerwiseLogits(
            logits([path[side][-1] for path in paths]), np.array([path[side][:-1] for path in paths])
        )
        for side in (0, 1)
    )
    assert divergence_layers(post, pre).tolist() == [3, 2, 3, 2]
    assert divergence_layers(post, pre, jump="distance").tolist() == [3, 2, 3, 2]
    assert dual_align(post, pre).divergence_layers == (0, 2, 2)


def test_a_gate_of_one_is_naive_alignment() -> None:
    pre = drawn(n=60)
    post = flipped(scaled(pre, 2.0), 0.3)
    wanted = naive_alignment(post.final, pre.final).temperature
    assert dual_align(post, pre, gate=1.0).temperature == pytest.approx(wanted, rel=DUAL_ALIGN)


# --- evidence


def test_evidence_is_plain_json_with_the_fitted_point_on_the_curve() -> None:
    pre = drawn(n=50)
    post = flipped(scaled(pre, 2.0), 0.2)
    for method in METHODS:
        fitted = fit(method, post, pre)
        found = json.loads(json.dumps(fitted.to_json(), allow_nan=False))
        assert (
            FittedTemperature(
                **{
                    **found,
                    "curve": tuple(map(tuple, found["curve"])),
                    "divergence_layers": tuple(found["divergence_layers"]),
                }
            )
            == fitted
        )
        assert found["digest"] == "these questions"
        if method != "vanilla":
            assert fitted.temperature in dict(fitted.curve)
            assert list(fitted.curve) == sorted(fitted.curve)
            least = min(loss for _, loss in fitted.curve)
            assert dict(fitted.curve)[fitted.temperature] == pytest.approx(least, abs=1e-12)
        assert (fitted.agreement == 40) == ("reference" in METHODS[method])
        assert sum(fitted.divergence_layers) == (50 if method == "dual-align" else 0)


def test_arrays_cannot_be_changed() -> None:
    layers = drawn(n=3)
    for array in (layers.earlier, layers.final.score, layers.final.options):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_a_selection_keeps_models_comparable() -> None:
    pre = drawn(n=20)
    post = scaled(pre, 2.0)
    mask = np.arange(20) < 6
    assert daca(post.select(mask).final, pre.final.select(list(range(6)))).questions == 6
    assert post.select([19, 0]).scores.shape == (2, 7, 5)
    assert len(post.select([])) == 0
    with pytest.raises(EvaluationError, match="different questions"):
        daca(post.final.select([0, 1, 2]), replace(pre.final.select([0, 1, 2]), digest="of others"))


def test_logits_of_an_evaluation_are_what_its_outcomes_are_made_of() -> None:
    tokenizer = pico_tokenizer()
    asked = tuple(
        Question(f"k{i}", i % 2, f"Question: {'ab' * i}\nAnswer:", (" a", " bcd", " cc")[: 2 + i % 2], i % 2)
        for i in range(6)
    )
    tasks = [TaskConfig(path="a.jsonl"), TaskConfig(path="b.jsonl", normalize="tokens")]
    evaluation = Evaluator(pico_model(), tokenizer, asked, tasks).evaluate()
    found = OptionLogits.from_evaluation(evaluation, tokenizer)
    assert found.digest == evaluation.digest
    assert found.vocabulary == vocabulary_digest(pico_tokenizer())
    same = vanilla(found).apply(found)
    assert np.array_equal(same.probability, evaluation.outcomes.probability)
    assert same.task.tolist() == [0, 1] * 3


# --- what is refused, in one line each


def refused(error: type[Exception], words: str, method: str, *sides: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        fit(method, *sides)
    assert "\n" not in str(caught.value)


def test_unusable_calibration_sets_are_refused() -> None:
    pre = drawn(n=4)
    post, unlabelled = scaled(pre, 2.0), replace(pre.final, gold=None)
    refused(EvaluationError, "needs labels, and the calibration set has none", "temperature", unlabelled)
    with pytest.raises(EvaluationError, match="have no labels"):
        vanilla(unlabelled).apply(unlabelled)
    assert fit("daca", unlabelled, pre).agreement == 4  # no labels needed
    for method in METHODS:
        refused(
            EvaluationError, "the calibration set has no questions", method, post.select([]), pre.select([])
        )
    for method, needs in METHODS.items():
        if "reference" in needs:
            refused(ConfigError, "needs the scores of the pre-trained model", method, post)
            other = replace(pre.final, digest="of others")
            sides = (post, LayerwiseLogits(other, pre.earlier))
            refused(EvaluationError, "answered different questions, or in another order", method, *sides)
            sides = (post.select([0, 1]), pre)
            refused(EvaluationError, r"post answered 2 questions with \d+ options but pre 4", method, *sides)
            mine, yours = (
                LayerwiseLogits(replace(side.final, vocabulary=v), side.earlier)
                for side, v in ((post, "a" * 64), (pre, "b" * 64))
            )
            refused(ConfigError, "different vocabularies", method, mine, yours)


def test_what_dual_align_cannot_read_is_refused() -> None:
    pre = drawn(n=4)
    post = scaled(pre, 2.0)
    refused(ConfigError, "needs the scores after every layer", "dual-align", post.final, pre.final)
    shallow = LayerwiseLogits(pre.final, pre.earlier[:, :2])
    refused(ConfigError, "post has 7 layers but pre has 3", "dual-align", post, shallow)
    one = LayerwiseLogits(pre.final, pre.earlier[:, :0])
    refused(ConfigError, "have one layer", "dual-align", one, one)
    with pytest.raises(ConfigError, match="gate is 2"):
        dual_align(post, pre, gate=2)


def test_a_misspelt_method_is_met_with_a_suggestion() -> None:
    refused(ConfigError, "Did you mean 'dual-align'", "dualalign", drawn(n=2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(EvaluationError, match=r"question 1: option scores are \[0.0, .*1 of 3 questions"):
        logits([[0.0, 1.0], [0.0, bad], [1.0, 1.0]])
    with pytest.raises(EvaluationError, match="question 0: layer 2: option scores"):
        LayerwiseLogits(logits([[0.0, 1.0]]), np.array([[[0.0, 1.0], [bad, 1.0]]]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EvaluationError, match="options is"):
        OptionLogits(np.zeros((2, 2)), np.array([2]), np.array([0, 0]))
    with pytest.raises(EvaluationError, match="-inf after the last option"):
        OptionLogits(np.zeros((1, 2)), np.array([1]), np.array([0]))
    final = OptionLogits(np.array([[0.0, -np.inf]]), np.array([1]), np.array([0]))
    with pytest.raises(EvaluationError, match=r"shape \(1, 2\)"):
        LayerwiseLogits(final, np.zeros((1, 2)))
    with pytest.raises(EvaluationError, match="padding"):
        LayerwiseLogits(final, np.zeros((1, 3, 2)))


# --- CAPE


def test_rotations_put_each_option_once_behind_each_letter(tmp_path: Path) -> None:
    asked = all_of(load(write(tmp_path / "q.jsonl", rows(9)), format="letter", shots=1))
    found = permuted_questions(asked)
    assert len(found.questions) == 3 * len(asked)
    assert found.questions[::3] == tuple(asked)
    assert len({question.key for question in found.questions}) == len(found.questions)
    i = next(i for i, question in enumerate(asked) if "What is 4?" in question.context)
    assert found.source[3 * i : 3 * i + 3].tolist() == [i, i, i]
    example = asked[i].context.split("Question: What is 4?")[0]
    wanted = "Question: What is 4?\nA. it is 5\nB. nothing\nC. it is 4\nAnswer:"
    assert found.questions[3 * i + 1].context == example + wanted
    gold_texts = {"it is 5"}
    for question in found.questions[3 * i : 3 * i + 3]:
        line = question.context.rsplit("\nAnswer:", 1)[0].splitlines()[question.gold - 3]
        assert {line[3:]} == gold_texts


def test_the_average_takes_the_preference_for_a_letter_away(tmp_path: Path) -> None:
    two = [{"question": f"Two of {i}?", "choices": [f"y{i}", f"n{i}"], "answer": 0} for i in range(9)]
    asked = all_of(load(write(tmp_path / "q.jsonl", [*rows(9), *two]), format="letter"))
    found = permuted_questions(asked)
    bias = np.array([2.0, 1.0, 0.0])

    def worth(text: str) -> float:
        return (len(text) * 7 % 5) / 2.0

    def answers(scored: tuple[Question, ...], preference: Floats) -> Outcomes:
        score = np.full((len(scored), 3), -np.inf)
        for i, question in enumerate(scored):
            lines = question.context.rsplit("\nAnswer:", 1)[0].splitlines()[1:]
            score[i, : len(lines)] = [worth(line[3:]) + preference[j] for j, line in enumerate(lines)]
        count = np.array([len(question.options) for question in scored])
        gold = np.array([question.gold for question in scored])
        return Outcomes.from_loglikelihoods(score, count, gold, np.zeros(len(scored), dtype=np.int64))

    unbiased = answers(tuple(asked), 0.0 * bias)
    same = found.average(answers(found.questions, 0.0 * bias))
    assert np.allclose(same.probability, unbiased.probability)
    assert same.gold.tolist() == [question.gold for question in asked]
    # By hand: each option's mean over the letters that it stands behind.
    averaged = found.average(answers(found.questions, bias))
    for i, question in enumerate(asked):
        k = len(question.options)
        values = [worth(line[3:]) for line in question.context.rsplit("\nAnswer:", 1)[0].splitlines()[1:]]
        wanted = np.zeros(k)
        for turn in range(k):
            order = [(j + turn) % k for j in range(k)]
            wanted[order] += softmax([values[o] + bias[j] for j, o in enumerate(order)]) / k
        assert averaged.probability[i, :k] == pytest.approx(wanted)
    with pytest.raises(EvaluationError, match=r"outcomes of \d+ questions \(wanted"):
        found.average(unbiased)


def test_rotations_keep_chat_templates_and_line_breaks(tmp_path: Path) -> None:
    mine = {"question": "Which?", "choices": ["one\ntwo", "A. really", "three"], "answer": 2}
    path = write(tmp_path / "q.jsonl", [mine, *rows(3)])
    tokenizer = pico_tokenizer(chat_template="{% for m in messages %}<{{ m['content'] }}>\n{% endfor %}")
    (asked,) = [
        question
        for question in all_of(load(path, tokenizer=tokenizer, chat_template=True, format="letter"))
        if "Which?" in question.context
    ]
    turned = permuted_questions([asked]).questions[1]
    assert turned.context == "<Question: Which?\nA. A. really\nB. three\nC. one\ntwo\nAnswer:>\n"
    assert (turned.gold, turned.options) == (1, asked.options)


def test_questions_without_listed_options_cannot_be_rotated(tmp_path: Path) -> None:
    asked = all_of(load(write(tmp_path / "q.jsonl", rows(4))))
    with pytest.raises(ConfigError, match="does not list its 3 options by letter"):
        permuted_questions(asked)
    letters = Question("k", 0, "Question: x\nA. one\nAnswer:", (" A", " B"), 0)
    with pytest.raises(ConfigError, match="does not list its 2 options"):
        permuted_questions([letters])
