"""Written answers as questions of a study: how they are read, drawn, judged and calibrated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from objectives.calibrators.logits import OptionLogits
from objectives.calibrators.methods import fit
from objectives.evaluation import Evaluation, questions_digest
from objectives.evaluator import Evaluator
from objectives.generation.sampler import AnswerSampler, Decoding
from objectives.generation.written import evaluate_texts
from objectives.metrics.names import get_metric
from objectives.questions.config import SplitConfig, TaskConfig
from objectives.questions.matching import get_rule
from objectives.questions.questions import Question, QuestionSet, WrittenQuestion
from objectives.questions.tasks import load_questions
from objectives.scoring.scorer import Scorer
from search.config.study_file import parse_study
from search.errors import ConfigError, EvaluationError
from tests.pico import CHAT_TEMPLATE, pico_model, pico_tokenizer
from tests.pico_study import write_open_questions, write_questions

SPLIT = SplitConfig()
UNTIL = ["\n", "P"]  # a letter, too, since a line break alone changes no key
DRAWN = {"samples": 5, "max_new_tokens": 3, "temperature": 0.1, "until": UNTIL}
ALL = "bcdefghijklmnopqrstuvwxyz0123456789"


def task(path: Path | str = "a.jsonl", *, generate: Any = None, **keys: Any) -> TaskConfig:
    value = {"path": str(path), "format": "generation", "generate": generate, **keys}
    return TaskConfig.model_validate(value)


def rows(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def loaded(*tasks: TaskConfig, split: SplitConfig = SPLIT, tokenizer: Any = None) -> QuestionSet:
    return load_questions(tasks, split, tokenizer)


def every(found: QuestionSet) -> list[Any]:
    return [*found.search, *found.report]


# ---- reading


def test_rows_become_prompts_with_accepted_answers(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "q.jsonl",
        {"question": "Capital?", "answer": "Paris "},
        {"question": "Which?", "answer": ["red", "crimson", "red"]},
        {"question": "2 + 2?", "answer": 4},
        {"question": "1e-7?", "answer": [1e-7, 0.5]},
        {"question": "10^400?", "answer": 10**400},
    )
    found = {q.context: q.accepted for q in every(loaded(task(path)))}
    assert found == {
        "Question: Capital?\nAnswer:": ("Paris",),
        "Question: Which?\nAnswer:": ("red", "crimson"),
        "Question: 2 + 2?\nAnswer:": ("4",),
        "Question: 1e-7?\nAnswer:": ("0.0000001", "0.5"),
        "Question: 10^400?\nAnswer:": (str(10**400),),
    }
    renamed = rows(tmp_path / "r.jsonl", *({"q": f"{i}?", "a": i} for i in range(4)))
    found = loaded(task(renamed, fields={"question": "q", "answer": "a"}))
    assert {q.accepted for q in every(found)} == {("0",), ("1",), ("2",), ("3",)}


def test_questions_with_choices_accept_the_right_ones_text(tmp_path: Path) -> None:
    arc = [
        {
            "question": f"{i}?",
            "choices": {"text": ["red", f"blue {i}"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for i in range(6)
    ]
    path = rows(tmp_path / "arc.jsonl", *arc)
    preset = loaded(task(path, preset="arc_easy"))
    own = loaded(task(path, fields={"answer": "answerKey"}))
    for found in (preset, own):
        assert {q.accepted[0] for q in every(found)} == {f"blue {i}" for i in range(6)}
    shot, *_ = every(loaded(task(path, preset="arc_easy", shots=2)))
    assert shot.context.startswith(
        "Question: 0?\nAnswer: blue 0\n\nQuestion: 1?\nAnswer: blue 1\n\nQuestion: "
    )
    assert shot.context.endswith("\nAnswer:")


@pytest.mark.parametrize(
    ("answer", "match", "message"),
    [
        (None, "exact", "field 'answer' holds None, wanted a text, a number, or a list of them"),
        (True, "exact", "field 'answer' holds True"),
        (float("nan"), "number", "field 'answer' holds nan"),
        ([], "exact", "field 'answer' is an empty list"),
        ("  ", "exact", "field 'answer' is empty"),
        ([["a"]], "exact", r"field 'answer' holds \['a'\]"),
        ("?!", "f1", "the answer '\\?!' holds nothing to match \\(match: f1 wants a word\\)"),
        (
            ["4", "four"],
            "number",
            "the answer 'four' holds nothing to match \\(match: number wants a number\\)",
        ),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, answer: Any, match: str, message: str) -> None:
    path = rows(tmp_path / "q.jsonl", {"question": "a?", "answer": "1"}, {"question": "b?", "answer": answer})
    with pytest.raises(ConfigError, match=rf"q\.jsonl:2: {message}.*Correct or remove this question\.$"):
        loaded(task(path, generate={"match": match}))


def test_a_question_keeps_its_side_whether_it_has_options_or_not(tmp_path: Path) -> None:
    closed = write_questions(tmp_path / "closed.jsonl")
    lines = [json.loads(line) for line in closed.read_text().splitlines()]
    same = [{"question": f" {line['question']}  ", "answer": "red"} for line in lines]
    again = rows(tmp_path / "open.jsonl", *same)
    choices = rows(tmp_path / "with.jsonl", *lines)
    tasks = [
        TaskConfig(path=str(closed), shots=2),
        task(again, shots=1),
        task(choices, name="third"),
        TaskConfig(path=str(closed), name="letters", format="letter"),
    ]
    found = loaded(*tasks)

    def asked(questions: Any) -> set[str]:
        return {" ".join(q.context.rpartition("Question: ")[2].split("\n")[0].split()) for q in questions}

    assert not asked(found.search) & asked(found.report)
    assert (
        len(asked(found.search) | asked(found.report)) == len(lines) - 2
    )  # examples of one task are asked in none
    assert {type(q) for q in found.search} == {Question, WrittenQuestion}


def test_the_digests_of_studies_without_written_answers_are_those_they_had(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "questions.jsonl")
    for form, digest in (
        ("continuation", "a3aaf95d95976f3183f3936d95ce8c0e416b28327bec0db9a5f0f3c37549f2ce"),
        ("letter", "fd2ba3e521e17fae8f80c02e973370d7eff85622e6a7665305482b19deb90633"),
    ):
        one = TaskConfig(path=str(path), name="made-up", format=form, shots=2, normalize="bytes")
        assert loaded(one).digest == digest


def test_what_is_asked_and_how_it_is_drawn_is_in_the_digest(tmp_path: Path) -> None:
    path = write_open_questions(tmp_path / "q.jsonl")
    one = task(path, generate=DRAWN)
    digest = loaded(one).digest
    assert loaded(one).digest == digest
    for changed in ({"seed": 1}, {"samples": 6}, {"match": "f1"}, {"until": []}, {"top_p": 0.5}):
        assert loaded(task(path, generate={**DRAWN, **changed})).digest != digest
    tokenizer = pico_tokenizer(chat_template=CHAT_TEMPLATE)
    chat = loaded(task(path, generate=DRAWN, chat_template=True), tokenizer=tokenizer)
    assert chat.digest != digest
    assert chat.search[0].context.startswith("Question: ")  # the sampler wraps it
    other = pico_tokenizer(chat_template=CHAT_TEMPLATE + "!")
    assert loaded(task(path, generate=DRAWN, chat_template=True), tokenizer=other).digest != chat.digest


# ---- config


def study(**keys: Any) -> dict[str, Any]:
    tasks = [{"path": "a.jsonl"}, {"path": "b.jsonl", "format": "generation"}]
    return {"schema": 1, "name": "s", "parents": {"pre": "p", "post": "q"}, "tasks": tasks, **keys}


def test_defaults() -> None:
    plain, chat = task(), task(chat_template=True)
    assert plain.written
    assert plain.until == ("\n\n",)
    assert chat.until == ()
    assert task(generate={"until": []}).until == ()
    assert (plain.generation.match, plain.generation.samples) == ("exact", 8)
    assert not TaskConfig(path="a").written
    parse_study(study(), "s.yaml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"tasks": [{"path": "a", "generate": {}}]},
            "tasks.0: generate: does not go with format continuation",
        ),
        (
            {"tasks": [{"path": "a", "format": "generation", "normalize": "bytes"}]},
            "tasks.0: normalize: is for",
        ),
        (
            {"tasks": [{"path": "a", "format": "generation", "generate": {"match": "numbr"}}]},
            "tasks.0.generate.match: no rule called 'numbr'. Did you mean 'number'",
        ),
        (
            {"tasks": [{"path": "a", "format": "generation", "generate": {"until": ["a", ""]}}]},
            "tasks.0.generate.until: found an empty text",
        ),
        (
            {"tasks": [{"path": "a", "format": "generation", "generate": {"sample": 3}}]},
            "tasks.0.generate.sample: unknown key. Did you mean 'samples'",
        ),
        (
            {"sampler": {"engine": "composite"}},
            "sampler: engine composite predicts likelihoods of options, but tasks.1: answers are written",
        ),
        (
            {"sampler": {"engine": "gradient"}},
            "sampler: gradient follows gradients of likelihoods, but tasks.1: answers are written",
        ),
        (
            {"fidelity": {"estimator": "answers", "questions": 5}},
            "fidelity: estimator answers predicts likelihoods of options, but tasks.1: answers are written",
        ),
    ],
)
def test_what_does_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(study(**keys), "s.yaml")
    assert str(caught.value).startswith(f"s.yaml: {message}")
    assert "\n" not in str(caught.value)


# ---- evaluating


def made(samples: int = 5) -> tuple[list[TaskConfig], list[Any]]:
    """A task with options, one judged exactly and one by its numbers, their questions interleaved."""
    tasks = [
        TaskConfig(path="a.jsonl"),
        task("b.jsonl", generate={**DRAWN, "samples": samples}),
        task("c.jsonl", generate={**DRAWN, "samples": 3, "match": "number", "seed": 4}),
    ]
    questions: list[Any] = []
    for i in range(9):
        context = f"Question: {i}\nAnswer:"
        if i % 3 == 0:
            questions.append(Question(f"k{i}", 0, context, (" a", " bb", " c"), i % 2))
        else:
            accepted = tuple(ALL[i::2]) if i % 3 == 1 else ("1", "7", "12")
            questions.append(WrittenQuestion(f"k{i}", i % 3, context, accepted))
    return tasks, questions


def peaked(seed: int = 0) -> Any:
    """Its answers hold letters, digits and line breaks."""
    model = pico_model("llama", seed, tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return peaked()


def test_both_kinds_are_answered_in_the_order_of_the_list(model: Any) -> None:
    tasks, questions = made()
    evaluator = Evaluator(model, pico_tokenizer(), questions, tasks)
    calls: list[tuple[int, int]] = []
    found = evaluator.evaluate(lambda done, total: calls.append((done, total)))
    assert calls[-1] == (9, 9)
    assert [total for _, total in calls] == [9] * len(calls)
    assert found.digest == questions_digest(questions, tasks) == evaluator.digest
    assert found.outcomes.task.tolist() == [0, 1, 2] * 3
    assert found.seconds > 0

    options = [q for q in questions if isinstance(q, Question)]
    alone = Evaluator(model, pico_tokenizer(), options, tasks).evaluate()
    np.testing.assert_array_equal(found.loglikelihood[::3, :3], alone.loglikelihood)

    tokens = alone.scored_tokens
    for number in (1, 2):
        asked = [q for q in questions if q.task == number]
        drawn = tasks[number].generation
        decoding = Decoding(drawn.samples, drawn.temperature, drawn.top_p, drawn.max_new_tokens, drawn.seed)
        sampler = AnswerSampler(model, pico_tokenizer(), [q.context for q in asked], decoding, until=UNTIL)
        written = sampler.generate()
        tokens += written.prompt_tokens + written.generated_tokens
        assert number == 2 or sampler.texts(written) != written.texts(pico_tokenizer())  # something is cut
        rule = get_rule(drawn.match)
        for i, (question, answers) in enumerate(zip(asked, sampler.texts(written), strict=True)):
            place = number + 3 * i
            keys = [rule.key(text) for text in answers]
            shares = {key: keys.count(key) / len(keys) for key in keys}
            best = max(shares, key=lambda key: shares[key])  # the first of the largest
            assert found.outcomes.confidence[place] == pytest.approx(shares[best], rel=1e-6)
            assert found.outcomes.correct[place] == rule.right(best, question.accepted)
            assert found.outcomes.options[place] == len(shares) + 1
            right = [share for key, share in shares.items() if rule.right(key, question.accepted)]
            gold = found.outcomes.probability[place, found.outcomes.gold[place]]
            assert gold == pytest.approx(max(right, default=0.0), rel=1e-6)
    assert found.scored_tokens == tokens <= evaluator.tokens
    assert (
        0 < found.outcomes.correct[found.outcomes.task > 0].sum() < 6
    )  # both happen: the test sees a difference
    assert len(set(found.outcomes.confidence.round(6).tolist())) > 3


def test_equal_weights_give_equal_evidence_and_others_do_not(model: Any, tmp_path: Path) -> None:
    tasks, questions = made()
    evaluator = Evaluator(peaked(), pico_tokenizer(), questions, tasks)
    first = evaluator.evaluate().save(tmp_path / "1")
    with torch.no_grad():
        for mine, other in zip(evaluator.scorer.model.parameters(), peaked(1).parameters(), strict=True):
            mine.copy_(other)
    assert evaluator.evaluate().save(tmp_path / "2") != first
    with torch.no_grad():
        for mine, other in zip(evaluator.scorer.model.parameters(), model.parameters(), strict=True):
            mine.copy_(other)
    assert evaluator.evaluate().save(tmp_path / "3") == first
    shared = Evaluator(Scorer(model, pico_tokenizer()), None, questions, tasks)
    assert shared.evaluate().save(tmp_path / "4") == first
    again = Evaluation.load(tmp_path / "1", sha256=first, digest=evaluator.digest)
    assert again.outcomes.probability.tolist() == shared.evaluate().outcomes.probability.tolist()


def test_parts_join_to_the_whole(model: Any) -> None:
    tasks, questions = made()
    whole = Evaluator(model, pico_tokenizer(), questions, tasks)
    places = [np.array([1, 2, 8]), np.array([0, 3, 4]), np.array([5, 6, 7])]
    parts = [whole.part(place) for place in places]
    joined = Evaluation.join([part.evaluate() for part in parts], places, whole.digest)
    found = whole.evaluate()
    np.testing.assert_allclose(joined.outcomes.probability, found.outcomes.probability, atol=1e-6)
    assert joined.outcomes.gold.tolist() == found.outcomes.gold.tolist()
    only = whole.part(np.array([1, 2]))
    assert only.tokens >= only.evaluate().scored_tokens > 0


def test_any_source_of_answers_is_judged_the_same_way() -> None:
    tasks, questions = made()
    asked = [q for q in questions if isinstance(q, WrittenQuestion)]
    texts = [["7"] * 4 if q.task == 1 else ["so 7", "12 + 3 is 12.0", "no"] for q in asked]
    found = evaluate_texts(asked, texts, tasks, tokens=17, digest="these")
    assert (found.scored_tokens, found.digest) == (17, "these")
    accepted = [("7" in q.accepted) for q in asked if q.task == 1]
    assert found.outcomes.correct.tolist() == [accepted[0], True, accepted[1], True, accepted[2], True]
    np.testing.assert_allclose(found.outcomes.confidence, [1, 1 / 3] * 3)
    for broken in (texts[:-1], [["a"], *texts[1:]], [[], *texts[1:]]):
        with pytest.raises(EvaluationError):
            evaluate_texts(asked, broken, tasks, tokens=0, digest="")


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_drawn(model: Any) -> None:
    tasks, questions = made()
    long = replace(questions[2], context="b\n" * 256)
    with pytest.raises(ConfigError, match=r"^tasks\.2: prompt 0 \('b.*3 new ones \(wanted 512 together"):
        Evaluator(model, pico_tokenizer(), [*questions[:2], long], tasks)


def test_a_chat_template_is_put_around_the_prompt(model: Any) -> None:
    tokenizer = pico_tokenizer(chat_template=CHAT_TEMPLATE)
    contexts = [f"Question: {i}\nAnswer:" for i in range(4)]
    one = [WrittenQuestion(str(i), 0, context, tuple(ALL[::2])) for i, context in enumerate(contexts)]
    chat = Evaluator(model, tokenizer, one, [task(generate=DRAWN, chat_template=True)]).evaluate()
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": context}], tokenize=False)
        for context in contexts
    ]
    by_hand = [replace(q, context=text) for q, text in zip(one, rendered, strict=True)]
    plain = Evaluator(model, tokenizer, by_hand, [task(generate=DRAWN)]).evaluate()
    np.testing.assert_array_equal(chat.loglikelihood, plain.loglikelihood)
    assert chat.scored_tokens == plain.scored_tokens
    bare = Evaluator(model, tokenizer, one, [task(generate=DRAWN)]).evaluate()
    assert not np.array_equal(chat.loglikelihood, bare.loglikelihood)


def test_exact_match_is_that_of_lm_eval() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    truths = ["Eiffel Tower", "42", "U.S.A.", "don't know"]
    answers = ["eiffel tower!", "42.", "USA", "dont know", "forty two", "Eiffel", "DON'T KNOW", "4.2"]
    rule = get_rule("exact")
    for truth in truths:
        for answer in answers:
            theirs = metrics.exact_match_hf_evaluate(
                [answer], [truth], ignore_case=True, ignore_punctuation=True
            )
            assert rule.right(rule.key(answer), [truth]) == bool(theirs["exact_match"])


# ---- calibrators


def logits(model: Any = None, samples: int = 5) -> OptionLogits:
    tasks, questions = made(samples)
    found = Evaluator(model or peaked(), pico_tokenizer(), questions, tasks).evaluate()
    return OptionLogits.from_evaluation(found, samples=[0, samples, 3])


def test_temperature_scaling_fits_shares_and_options_apart() -> None:
    both = logits()
    assert both.written.tolist() == [False, True, True] * 3
    found = fit("temperature", both)
    options = fit("temperature", both.select(np.flatnonzero(~both.written)))
    assert found.temperature == options.temperature
    assert found.written is not None
    assert found.questions == 9

    # By hand: the negative log-likelihood of shares with half a sample for any other answer, over temperatures.
    rows = np.flatnonzero(both.written)
    assert both.samples is not None
    assert both.gold is not None

    def nll(temperature: float) -> float:
        total = 0.0
        for i in rows:
            score = both.score[i, : both.options[i]].copy()
            score[-1] = np.log(0.5 / both.samples[i])
            total -= float((score / temperature - np.logaddexp.reduce(score / temperature))[both.gold[i]])
        return total / len(rows)

    grid = np.geomspace(1 / 1024, 1024, 4001)
    assert nll(found.written) <= min(map(nll, grid)) + 1e-6
    applied = found.apply(both)
    assert applied.predicted.tolist() == both.predicted.tolist()
    assert get_metric("nll").value(applied) <= get_metric("nll").value(fit("vanilla", both).apply(both))


def test_unanimous_answers_become_as_sure_as_they_are_right() -> None:
    """All 8 samples agree, 7 of 10 times on the right answer: 1 / (1 + (1 / 16) ^ (1 / T)) = 0.7 for some T."""
    tasks = [task(generate={"samples": 8})]
    asked = [WrittenQuestion(str(i), 0, "?", ("a thing",) if i < 7 else ("other",)) for i in range(10)]
    found = evaluate_texts(asked, [["thing"] * 8] * 10, tasks, tokens=0, digest="")
    scores = OptionLogits.from_evaluation(found, samples=[8])
    fitted = fit("temperature", scores)
    assert fitted.written == pytest.approx(np.log(16) / np.log(7 / 3), rel=1e-6)
    np.testing.assert_allclose(fitted.apply(scores).confidence, 0.7, rtol=1e-6)
    assert get_metric("ece").value(fitted.apply(scores)) == pytest.approx(0.0, abs=1e-6)
    assert get_metric("ece").value(found.outcomes) == pytest.approx(0.3)


def test_no_temperature_leaves_shares_as_they_are_and_no_option_tells_who_is_right() -> None:
    both = logits()
    plain = fit("vanilla", both).apply(both)
    np.testing.assert_allclose(
        plain.probability,
        np.where(np.isfinite(both.score), np.exp(both.score), 0.0)
        / np.exp(both.score).sum(axis=1, keepdims=True),
        atol=1e-9,
    )
    rows = np.flatnonzero(both.written)
    assert both.gold is not None
    other = replace(both, gold=np.where(both.written, both.options - 1, both.gold))
    found = fit("temperature", both)
    np.testing.assert_array_equal(  # whoever is right, the same confidences
        found.apply(both).probability[rows], found.apply(other).probability[rows]
    )


def test_methods_that_compare_options_leave_written_answers_alone() -> None:
    post, pre = logits(), logits(peaked(1))
    options = np.flatnonzero(~post.written)
    for method in ("daca", "naive"):
        found = fit(method, post, pre)
        assert found.written is None
        assert found.temperature == fit(method, post.select(options), pre.select(options)).temperature
        rows = np.flatnonzero(post.written)
        np.testing.assert_array_equal(
            found.apply(post).probability[rows], fit("vanilla", post).apply(post).probability[rows]
        )
        none = fit(method, post.select(rows), pre.select(rows))
        assert (none.temperature, none.used) == (1.0, 0)
        assert none.reason is not None
        assert "has options" in none.reason
    with pytest.raises(ConfigError, match="dual-align: "):
        fit("dual-align", post, pre)
    assert "written" not in fit("daca", post, pre).to_json()
    assert fit("temperature", post).to_json()["written"] > 0
    alone = fit("temperature", post.select(rows))
    assert alone.written == alone.temperature
