"""A question put into a task's format: the exact texts that a model reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from objectives.questions.chat import Chat
from objectives.questions.presets import LETTERS, Item
from objectives.questions.questions import Question, WrittenQuestion

if TYPE_CHECKING:
    from objectives.questions.config import TaskConfig


def few_shot(task: TaskConfig, examples: Sequence[Item]) -> str:
    """The examples with their right answers, as they stand before every question of a task."""
    shots = []
    for item in examples:
        if task.format == "letter":
            shots.append(f"{_letter_prompt(item)} {LETTERS[item.gold]}\n\n")
        elif task.written:
            shots.append(f"{item.prompt} {item.accepted[0]}\n\n")
        elif item.prompts:
            shots.append(f"{item.prompts[item.gold]} {item.target}\n\n")
        else:
            shots.append(f"{item.prompt} {item.choices[item.gold]}\n\n")
    return "".join(shots)


def _letter_prompt(item: Item) -> str:
    lines = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices)]
    return "\n".join([item.stem, *lines, "Answer:"])


def closed_question(task: TaskConfig, index: int, item: Item, prefix: str, chat: Chat | None) -> Question:
    """Puts one item into the task's format.

    The scored text starts with a space after a plain prompt ("Answer:" + " B"), as in lm-eval, and as tokenizers
    write words. After a chat template it starts with what the template itself puts before an assistant's answer,
    mostly nothing: then the letter is "B", since nothing but the template's own line break precedes it.
    """
    letter = task.format == "letter"
    header = item.letter_header if letter else item.header
    answers = tuple(LETTERS[: len(item.choices)]) if letter else item.choices
    bodies = (_letter_prompt(item),) if letter else item.prompts or (item.prompt,)
    if item.prompts and not letter:
        answers = (item.target,) * len(item.choices)
    contexts = [header + prefix + body for body in bodies]
    space = " "
    if chat is not None:
        contexts = [chat.wrap(context) for context in contexts]
        space = chat.space
    options = tuple(space + answer for answer in answers)
    normalizer = _lengths(answers, task.normalize)
    several = tuple(contexts) if len(contexts) > 1 else None
    question = Question(
        "", index, contexts[0] if several is None else "", options, item.gold, normalizer, several
    )
    return replace(question, key=sha256([question.context, several, options, item.gold]))


def written_question(
    task: TaskConfig, index: int, item: Item, prefix: str, chat: Chat | None
) -> WrittenQuestion:
    """Puts one item into the format `generation`: the prompt of `continuation`, after which the model writes."""
    context = item.header + prefix + item.prompt
    read = context if chat is None else chat.wrap(context)
    drawn = {**task.generation.model_dump(), "until": task.until}
    return WrittenQuestion(sha256([read, item.accepted, drawn]), index, context, item.accepted)


def _lengths(answers: Sequence[str], normalize: str) -> tuple[float, ...] | None:
    """What lm-eval's `acc_norm` (characters) and `acc_bytes` divide by; None for the other normalisations."""
    if normalize == "characters":
        return tuple(float(len(answer)) for answer in answers)
    if normalize == "bytes":
        return tuple(float(len(answer.encode("utf-8"))) for answer in answers)
    return None


def shuffled(item: Item) -> Item:
    """The options in an order that depends on the question alone."""
    order = sorted(range(len(item.choices)), key=lambda i: sha256([item.question, item.choices[i], i]))
    return replace(item, choices=tuple(item.choices[i] for i in order), gold=order.index(item.gold))


def sha256(value: Any) -> str:
    """SHA-256 of plain JSON, in hex."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()
