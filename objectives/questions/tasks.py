"""Tasks of a study file -> questions, split once into those that search and those that report.

The rules, in order:

1. Rows are read and checked; the first bad one is a `ConfigError` with its file and line.
2. Few-shot examples are the first `shots` rows, in file order, of another split of the same source when it
   has one (MMLU `dev`, MMLU-Pro `validation`, else `train`), otherwise of the scored split itself. A question
   that is an example anywhere is scored nowhere.
3. Exact duplicates (same context, options and answer) are dropped.
4. `limit` keeps the first N in the order of a hash of (split seed, raw question, options): the same ones
   whatever the order of the file.
5. The first `round(search x n)` in that order search, the others report. A question keeps its side across
   tasks and formats, with another answer or with its options in another order: it never stands on both. If it is
   asked anywhere without options, for a written answer, its text alone says that it is the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from objectives.errors import ConfigError
from objectives.questions.chat import Chat
from objectives.questions.formats import closed_question, few_shot, sha256, shuffled, written_question
from objectives.questions.matching import get_rule
from objectives.questions.presets import LETTERS, PRESETS, Item, Preset, field, plain, text, texts
from objectives.questions.questions import AnyQuestion, Question, QuestionSet, WrittenQuestion
from objectives.questions.sources import Rows, Source, read_sources

if TYPE_CHECKING:
    from objectives.questions.config import SplitConfig, TaskConfig


__all__ = ["AnyQuestion", "Question", "QuestionSet", "WrittenQuestion", "load_questions", "task_names"]


@dataclass(frozen=True)
class _Group:
    """The items of one source that share a header and few-shot examples."""

    items: tuple[Item, ...]
    examples: tuple[Item, ...]


def task_names(tasks: Sequence[TaskConfig]) -> tuple[str, ...]:
    """The name of each task: `name`, else the preset (with its subset), else the file's stem. ConfigError on twins."""
    names = []
    for task in tasks:
        name = task.name or task.preset or Path(task.path or "task").stem
        if task.name is None and task.subset is not None:
            name += f"-{task.subset}"
        names.append(name)
    for i, name in enumerate(names):
        if name in names[:i]:
            twin = names.index(name)
            raise ConfigError(
                f"tasks[{i}].name: '{name}' is the name of tasks[{twin}] too. Name one of them."
            )
    return tuple(names)


def load_questions(tasks: Sequence[TaskConfig], split: SplitConfig, tokenizer: Any) -> QuestionSet:
    """Reads, formats and splits the questions of all tasks. Deterministic; needs no model.

    Args:
        tasks: as in the study file; relative paths are relative to the current folder.
        split: share of the search split, per task, and the seed of the hash order.
        tokenizer: the post-trained parent's; used for `chat_template: true` only, may be None otherwise.

    Raises:
        ConfigError: a source that cannot be read, a row that does not fit, a side without questions, an unknown
            preset, two tasks of one name, a missing chat template.
    """
    if not tasks:
        raise ConfigError("tasks: is empty. Name at least one source of questions.")
    names = task_names(tasks)
    notes: list[str] = []
    groups = [_read(task, f"tasks[{i}] ({names[i]})", notes) for i, task in enumerate(tasks)]
    items = [item for per_task in groups for group in per_task for item in (*group.items, *group.examples)]
    bare = {_asked(item) for item in items if not item.choices}
    shown = {_identity(item, bare) for per_task in groups for group in per_task for item in group.examples}

    sides: dict[str, bool] = {}
    search: list[AnyQuestion] = []
    report: list[AnyQuestion] = []
    for i, task in enumerate(tasks):
        where = f"tasks[{i}] ({names[i]})"
        found = _format(task, i, where, groups[i], bare, shown, split.seed, tokenizer, notes)
        ranked = sorted(found, key=lambda pair: (pair[0], pair[1].key))
        if task.limit is not None:
            if task.limit > len(ranked):
                notes.append(
                    f"{where}: limit is {task.limit}, only {len(ranked)} questions are left; all are used."
                )
            ranked = ranked[: task.limit]
        _assign(sides, [rank for rank, _ in ranked], split.search)
        for rank, question in ranked:
            (search if sides[rank] else report).append(question)
        counts = Counter(sides[rank] for rank, _ in ranked)
        for side, label in ((True, "search"), (False, "report")):
            if not counts[side]:
                raise ConfigError(
                    f"{where}: the {label} split has 0 of {len(ranked)} questions (split.search: {split.search}). "
                    "Give more questions or move split.search."
                )
    parts = [names, [task.normalize for task in tasks], [q.key for q in search], [q.key for q in report]]
    return QuestionSet(names, tuple(search), tuple(report), sha256(parts), tuple(notes))


def _read(task: TaskConfig, where: str, notes: list[str]) -> list[_Group]:
    """The groups of one task: one per source, and per header within it (MMLU's subjects)."""
    preset = _preset(task, where)
    if preset is not None and task.fields is not None:
        raise ConfigError(
            f"{where}.fields: preset '{task.preset}' knows its fields. Remove fields or preset."
        )
    sources = read_sources(
        task.path or (preset.hub if preset else ""),
        where=where,
        split=task.split,
        subset=task.subset,
        default_split=preset.split if preset else None,
        default_subset=("all" if preset and preset.all_subsets and task.path is None else None)
        or (preset.subset if preset else None),
        fewshot=(preset.fewshot if preset else ("train", "dev")) if task.shots else (),
        all_subsets=preset.all_subsets if preset else False,
    )
    if any(source.split == "test" for source in sources):
        notes.append(
            f"{where}: searches on a split called 'test'; do not report that test set's score elsewhere."
        )
    groups = []
    repeated = 0
    for source in sources:
        notes.extend(source.notes)
        items, twins = _items(source.rows, task, preset)
        repeated += twins
        shots = items if source.examples is None else _items(source.examples, task, preset)[0]
        for header in dict.fromkeys(item.header for item in items):
            examples = _examples([item for item in shots if item.header == header], task, source, where)
            groups.append(_Group(tuple(item for item in items if item.header == header), examples))
    if repeated:
        notes.append(f"{where}: {repeated} questions have two equal options; kept, as lm-eval keeps them.")
    return groups


def _preset(task: TaskConfig, where: str) -> Preset | None:
    if task.preset is None:
        return None
    if task.preset not in PRESETS:
        import difflib

        close = difflib.get_close_matches(task.preset, PRESETS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Choose one of: {', '.join(PRESETS)}."
        raise ConfigError(f"{where}.preset: no preset is called '{task.preset}'. {hint}")
    return PRESETS[task.preset]


def _items(rows: Rows, task: TaskConfig, preset: Preset | None) -> tuple[list[Item], int]:
    items = []
    repeated = 0
    for where, row in rows.rows:
        try:
            item = preset.read(row) if preset else _own(row, task.fields or {}, task.written)
            if len(set(item.choices)) < len(item.choices):
                if preset is None:
                    twin = next(c for c in item.choices if item.choices.count(c) > 1)
                    raise ConfigError(f"choices holds '{twin[:60]}' twice")
                repeated += 1
            if task.format == "letter" and len(item.choices) > len(LETTERS):
                raise ConfigError(f"{len(item.choices)} choices, but there are {len(LETTERS)} letters")
            if task.written:
                _require_keys(item.accepted, task.generation.match)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}. Correct or remove this question.") from None
        items.append(item)
    return items, repeated


def _own(row: Mapping[str, Any], names: Mapping[Any, str], written: bool) -> Item:
    """A question of one's own: the answer is an index from 0, the text of a choice, or a label or letter.

    Without choices, for a written answer, it is a text, a number, or a list of these.
    """
    question = text(row, names.get("question", "question"))
    key = names.get("choices", "choices")
    if written and "choices" not in names and key not in row:
        name = names.get("answer", "answer")
        return replace(plain(question, (), 0), answers=_accepted(field(row, name), name))
    labels: tuple[str, ...] = ()
    listed = field(row, key)
    if isinstance(listed, Mapping) and {"text", "label"} <= set(listed):  # ARC's way
        row = {**row, key: listed["text"]}
        labels = tuple(map(str, listed["label"]))
    choices = texts(row, key)
    name = names.get("answer", "answer")
    return plain(question, choices, _gold(field(row, name), name, choices, labels))


def _accepted(answer: Any, name: str) -> tuple[str, ...]:
    """Right written answers, each once, in the order of the row."""
    found = []
    for one in answer if isinstance(answer, list | tuple) else [answer]:
        if isinstance(one, int) and not isinstance(one, bool):
            found.append(str(one))
        elif isinstance(one, float) and math.isfinite(one):
            found.append(format(Decimal(str(one)), "f"))  # without an exponent
        elif isinstance(one, str):
            found.append(text({name: one}, name).strip())
        else:
            raise ConfigError(f"field '{name}' holds {one!r}, wanted a text, a number, or a list of them")
    if not found:
        raise ConfigError(f"field '{name}' is an empty list, wanted at least one right answer")
    return tuple(dict.fromkeys(found))


def _require_keys(accepted: Sequence[str], match: str) -> None:
    """A right answer without a key could never be given."""
    rule = get_rule(match)
    for one in accepted:
        if not rule.key(one):
            wanted = "a number" if match == "number" else "a word"
            raise ConfigError(
                f"the answer '{one[:60]}' holds nothing to match (match: {match} wants {wanted})"
            )


def _gold(answer: Any, name: str, choices: tuple[str, ...], labels: tuple[str, ...]) -> int:
    n = len(choices)
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < n:
            raise ConfigError(f"field '{name}' is {answer}, wanted an index from 0 to {n - 1}")
        return answer
    if not isinstance(answer, str):
        raise ConfigError(f"field '{name}' is {answer!r}, wanted an index, a choice's text or its letter")
    if answer in choices:  # the text wins over a letter
        return choices.index(answer)
    if answer in labels:
        return labels.index(answer)
    letter = answer.strip().upper()
    if len(letter) == 1 and letter in LETTERS[:n]:
        return LETTERS.index(letter)
    if letter.isdecimal() and int(letter) < n:
        return int(letter)
    raise ConfigError(
        f"field '{name}' is '{answer[:60]}', which is neither a choice, nor a letter from A to "
        f"{LETTERS[min(n, 26) - 1]}, nor an index from 0 to {n - 1}"
    )


def _examples(items: list[Item], task: TaskConfig, source: Source, where: str) -> tuple[Item, ...]:
    if len(items) < task.shots or (source.examples is None and task.shots and len(items) == task.shots):
        place = f"split '{source.examples_split}'" if source.examples_split else "the scored questions"
        raise ConfigError(
            f"{where}.shots: {task.shots} examples wanted, but {place} have {len(items)} rows. Lower shots."
        )
    return tuple(items[: task.shots])


def _format(
    task: TaskConfig,
    index: int,
    where: str,
    groups: list[_Group],
    bare: set[str],
    shown: set[str],
    seed: int,
    tokenizer: Any,
    notes: list[str],
) -> list[tuple[str, AnyQuestion]]:
    """(rank in the hash order, question) of each distinct question of one task that is no example."""
    chat = Chat(tokenizer, where) if task.chat_template else None
    shuffle = task.format == "letter" and task.preset is not None and PRESETS[task.preset].shuffle
    found: dict[str, tuple[str, AnyQuestion]] = {}
    duplicates = examples = 0
    for group in groups:
        prefix = few_shot(task, [shuffled(item) if shuffle else item for item in group.examples])
        for item in group.items:
            identity = _identity(item, bare)
            if identity in shown:
                examples += 1
                continue
            put = written_question if task.written else closed_question
            question = put(task, index, shuffled(item) if shuffle else item, prefix, chat)
            duplicates += question.key in found
            found[question.key] = (sha256([seed, identity]), question)
    if duplicates:
        notes.append(f"{where}: {duplicates} exact duplicates dropped.")
    if examples:
        notes.append(f"{where}: {examples} questions are few-shot examples and are not scored.")
    return list(found.values())


def _identity(item: Item, bare: set[str]) -> str:
    """Equal for the same question in any format, with its options in any order, whatever the answer.

    Args:
        bare: texts of questions that are asked without options somewhere: there the text alone counts.
    """
    asked = _asked(item)
    return sha256([asked, [] if asked in bare else sorted(item.choices)])


def _asked(item: Item) -> str:
    return " ".join(item.question.split())


def _assign(sides: dict[str, bool], ranks: Sequence[str], share: float) -> None:
    """Gives each rank without a side one: the first ones search until `round(share x n)` questions do."""
    size = Counter(ranks)
    room = round(share * len(ranks)) - sum(n for rank, n in size.items() if sides.get(rank))
    for rank in sorted(size):
        if rank not in sides:
            sides[rank] = room > 0
            room -= size[rank] if sides[rank] else 0
