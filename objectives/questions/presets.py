"""Benchmarks by name: how a row becomes a question, with the prompt texts of lm-eval 0.4.13.

The `continuation` texts are those of lm-eval's tasks of the same name (`mmlu` there is called
`mmlu_continuation`), so that `acc`, `acc_norm` and our accuracy agree. In the `letter` format
CommonsenseQA and MMLU are lm-eval's own tasks; the others follow CommonsenseQA's layout. lm-eval asks
CommonsenseQA by letter only and MMLU-Pro by generated text: for those two, the missing texts are ours
(the ones of ARC, and MMLU's with its own subject line).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from objectives.errors import ConfigError

LETTERS = string.ascii_uppercase
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question before it is put into a format.

    Attributes:
        question: the raw text that identifies the question, whatever the format.
        choices: option texts as in the source, no leading space.
        gold: index of the right option.
        prompt: `continuation`: the text before the answer.
        stem: `letter`: the text before the lettered options.
        prompts, target: WinoGrande's partial evaluation: one prompt per option, and the one text that is
            scored after each of them. Empty otherwise.
        header, letter_header: a first paragraph (MMLU's subject line), per format.
        answers: right written answers of a question without options; empty otherwise.
    """

    question: str
    choices: tuple[str, ...]
    gold: int
    prompt: str
    stem: str
    prompts: tuple[str, ...] = ()
    target: str = ""
    header: str = ""
    letter_header: str = ""
    answers: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """Right written answers: those given, else the right option's text."""
        return self.answers or (self.choices[self.gold],)


@dataclass(frozen=True)
class Preset:
    """Where a benchmark lives and how its rows are read.

    Attributes:
        read: row -> Item; raises ConfigError (without the place) for a row that does not fit.
        hub: hub id used when a task gives no path. subset: its config name, None for the only one.
        split: default split. fewshot: splits to take examples from, first found; else the scored split.
        all_subsets: without a subset, a folder of subsets is read whole (MMLU).
        shuffle: the gold option is always at one index, so the letter format permutes the options, each
            question by its own hash.
    """

    read: Callable[[Row], Item]
    hub: str
    subset: str | None = None
    split: str = "validation"
    fewshot: tuple[str, ...] = ("train",)
    all_subsets: bool = False
    shuffle: bool = False


def text(row: Row, key: str, empty: bool = False) -> str:
    """The text at `key` (dots descend: `choices.text`); ConfigError when absent, not text, or blank."""
    value = field(row, key)
    if not isinstance(value, str):
        raise ConfigError(f"field '{key}' is {type(value).__name__}, wanted text")
    if not empty and not value.strip():
        raise ConfigError(f"field '{key}' is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"field '{key}' holds half a surrogate pair, which is no text") from None
    return value


def field(row: Row, key: str) -> Any:
    """The value at `key`; a key with dots is tried as it is, then as a path."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(f"field '{key}' is missing (found: {', '.join(map(str, row)) or 'nothing'})")
        value = value[part]
    return value


def texts(row: Row, key: str) -> tuple[str, ...]:
    """The list of texts at `key`; ConfigError unless it is at least 2 texts, none blank."""
    value = field(row, key)
    if not isinstance(value, list | tuple):
        raise ConfigError(f"field '{key}' is {type(value).__name__}, wanted a list of texts")
    if len(value) < 2:
        raise ConfigError(f"field '{key}' has {len(value)} choices, wanted at least 2")
    return tuple(text({f"{key}[{i}]": one}, f"{key}[{i}]") for i, one in enumerate(value))


def number(row: Row, key: str, count: int, first: int = 0) -> int:
    """The option index at `key`, stored as an integer or as digits that start at `first`."""
    value = field(row, key)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"field '{key}' is {value!r}, wanted a number (a split without answers cannot be scored)"
        )
    if not first <= value < first + count:
        raise ConfigError(f"field '{key}' is {value}, wanted {first} to {first + count - 1}")
    return value - first


def plain(question: str, choices: tuple[str, ...], gold: int) -> Item:
    """ARC's layout, also used for questions of one's own."""
    return Item(question, choices, gold, f"Question: {question}\nAnswer:", f"Question: {question}")


def _arc(row: Row) -> Item:
    choices = texts(row, "choices.text")
    labels = texts(row, "choices.label")
    answer = text(row, "answerKey").strip()
    if answer not in labels:
        raise ConfigError(f"field 'answerKey' is '{answer}', wanted one of {', '.join(labels)}")
    return plain(text(row, "question"), choices, labels.index(answer))


def _commonsenseqa(row: Row) -> Item:
    item = _arc(row)
    return replace(item, stem=f"Question: {item.question.strip()}")


def _openbookqa(row: Row) -> Item:
    item = _arc({**row, "question": field(row, "question_stem")})
    return replace(item, prompt=item.question)


def _sciq(row: Row) -> Item:
    choices = tuple(text(row, k) for k in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    item = plain(text(row, "question"), choices, 3)
    support = text(row, "support", empty=True).lstrip()
    return replace(item, prompt=f"{support}\n{item.prompt}", stem=f"{support}\n{item.stem}")


def _hellaswag(row: Row) -> Item:
    if field(row, "label") == "":
        raise ConfigError("field 'label' is empty: this split has no answers")
    context = text(row, "ctx_a", empty=True) + " " + text(row, "ctx_b", empty=True).capitalize()
    query = _wikihow(text(row, "activity_label") + ": " + context)
    choices = tuple(map(_wikihow, texts(row, "endings")))
    return Item(query, choices, number(row, "label", len(choices)), query, query)


def _wikihow(passage: str) -> str:
    """Drops WikiHow's bracketed marks in the order lm-eval does; the order decides what is left."""
    passage = re.sub(r"\[.*?\]", "", passage.strip().replace(" [title]", ". "))
    return passage.replace("  ", " ")


def _piqa(row: Row) -> Item:
    choices = (text(row, "sol1"), text(row, "sol2"))
    return plain(text(row, "goal"), choices, number(row, "label", 2))


def _winogrande(row: Row) -> Item:
    sentence = text(row, "sentence")
    if "_" not in sentence:
        raise ConfigError("field 'sentence' has no blank '_'")
    head, tail = sentence.split("_", 1)
    choices = (text(row, "option1"), text(row, "option2"))
    item = plain(sentence, choices, number(row, "answer", 2, first=1))
    return replace(item, prompts=tuple(head + choice for choice in choices), target=tail.strip())


def _boolq(row: Row) -> Item:
    gold = field(row, "label" if "label" in row else "answer")
    if gold not in (0, 1):  # False and True too
        raise ConfigError(f"the answer is {gold!r}, wanted true or false")
    stem = f"{text(row, 'passage')}\nQuestion: {text(row, 'question')}?"
    return Item(stem, ("no", "yes"), int(gold), f"{stem}\nAnswer:", stem)


def _socialiqa(row: Row) -> Item:
    choices = tuple(text(row, k) for k in ("answerA", "answerB", "answerC"))
    question = f"{text(row, 'context')} {text(row, 'question')}"
    item = plain(question, choices, number(row, "label", 3, first=1))
    return replace(item, prompt=f"Q: {question}\nA:")


def _mmlu(row: Row) -> Item:
    question = text(row, "question")
    choices = texts(row, "choices")
    item = plain(question.strip(), choices, number(row, "answer", len(choices)))
    subject = row.get("subject")
    about = f" about {subject.replace('_', ' ')}" if isinstance(subject, str) and subject else ""
    return replace(
        item,
        stem=question.strip(),
        header=f"The following are questions (with answers){about}.\n\n",
        letter_header=f"The following are multiple choice questions (with answers){about}.\n\n",
    )


def _mmlu_pro(row: Row) -> Item:
    return _mmlu(
        {
            "question": field(row, "question"),
            "choices": field(row, "options"),
            "answer": field(row, "answer_index"),
            "subject": field(row, "category"),
        }
    )


PRESETS: dict[str, Preset] = {
    "arc_easy": Preset(_arc, "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": Preset(_arc, "allenai/ai2_arc", "ARC-Challenge"),
    "sciq": Preset(_sciq, "allenai/sciq", shuffle=True),
    "commonsenseqa": Preset(_commonsenseqa, "tau/commonsense_qa"),
    "openbookqa": Preset(_openbookqa, "allenai/openbookqa", "main"),
    "mmlu": Preset(_mmlu, "cais/mmlu", fewshot=("dev",), all_subsets=True),
    "mmlu_pro": Preset(_mmlu_pro, "TIGER-Lab/MMLU-Pro", split="test", fewshot=("validation",)),
    "hellaswag": Preset(_hellaswag, "Rowan/hellaswag"),
    "piqa": Preset(_piqa, "baber/piqa"),
    "winogrande": Preset(_winogrande, "allenai/winogrande", "winogrande_xl"),
    "boolq": Preset(_boolq, "aps/super_glue", "boolq"),
    "socialiqa": Preset(_socialiqa, "lighteval/siqa"),
}
