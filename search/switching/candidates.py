"""A study's parents as candidates of a relay: models in memory, and each written task as a setting to take turns in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from objectives.generation.sampler import Decoding, encode_prompts
from objectives.generation.stopping import stopping
from objectives.questions.config import TaskConfig
from objectives.questions.matching import get_rule
from objectives.questions.questions import QuestionSet, Split, WrittenQuestion, written
from search.checkpoints.loading import load_model
from search.checkpoints.parents import Parents
from search.checkpoints.placement import SPREAD, place
from search.config.switching import Turns
from search.errors import CheckpointError, ConfigError
from search.running.problem import Problem
from search.switching.relay import Relay
from search.switching.rollouts import Asked


def load_candidates(parents: Parents, dtype: str, device: str) -> dict[str, Any]:
    """All parents as models in eval mode, by name, pre first.

    Raises:
        CheckpointError: one does not load. ConfigError: device `spread`, which holds one model.
    """
    if device == SPREAD:
        raise ConfigError("--device spread: candidates lie on one device. Give auto, cpu, cuda or cuda:N.")
    kind = getattr(torch, dtype)
    found = {}
    for label, one in zip(parents.labels, parents.everybody, strict=True):
        model = load_model(one.folder, parents.config, kind, error=CheckpointError)
        found[label] = place(model.requires_grad_(False), device)
    return found


@dataclass(frozen=True, eq=False)
class Setting:
    """One written task in which the candidates take turns.

    Attributes:
        number, name: of the task. relay: with the task's way to draw answers.
        questions: of both splits. asked: the same as a relay takes them.
    """

    number: int
    name: str
    task: TaskConfig
    relay: Relay
    questions: Mapping[Split, tuple[WrittenQuestion, ...]]
    asked: Mapping[Split, tuple[Asked, ...]]


def settings(
    questions: QuestionSet,
    tasks: Sequence[TaskConfig],
    models: Mapping[str, Any],
    tokenizer: Any,
    turns: Turns,
) -> list[Setting]:
    """A setting for each written task of a study.

    Raises:
        ConfigError: a prompt that cannot be encoded, or turns that do not fit a task.
    """
    found = []
    for number, task in enumerate(tasks):
        if not task.written:
            continue
        drawn = task.generation
        for key, text in (("closing", turns.closing), ("wait", turns.wait)):
            for end in task.until:
                if end in text:
                    raise ConfigError(
                        f"switching.{key}: contains {end!r}, at which answers of tasks.{number} end. Change one of "
                        "them."
                    )
        relay = Relay(
            models,
            tokenizer,
            turns,
            stopping(tokenizer, chat_template=task.chat_template, until=task.until),
            Decoding(drawn.samples, drawn.temperature, drawn.top_p, drawn.max_new_tokens, drawn.seed),
        )
        mine: dict[Split, tuple[WrittenQuestion, ...]] = {}
        asked: dict[Split, tuple[Asked, ...]] = {}
        for split in ("search", "report"):
            mine[split] = tuple(one for one in written(questions.of(split)) if one.task == number)
            texts = [one.context for one in mine[split]]
            prompts = encode_prompts(texts, tokenizer, chat_template=task.chat_template)
            _check_room(number, texts, prompts, relay)
            rule = get_rule(drawn.match)
            asked[split] = tuple(
                Asked(one.key, prompt, one.accepted, rule)
                for one, prompt in zip(mine[split], prompts, strict=True)
            )
        found.append(Setting(number, questions.task_names[number], task, relay, mine, asked))
    return found


def _check_room(number: int, texts: Sequence[str], prompts: Sequence[Sequence[int]], relay: Relay) -> None:
    room = relay.decoding.max_new_tokens
    for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if len(prompt) + room > relay.context:
            raise ConfigError(
                f"tasks.{number}: prompt {i} ({text[:40]!r}): {len(prompt)} tokens and {room} new ones (wanted "
                f"{relay.context} together: the candidates' context). Shorten it or lower max_new_tokens."
            )


def open_settings(problem: Problem, turns: Turns) -> list[Setting]:
    """The settings of an opened study, its candidates loaded."""
    config = problem.config
    models = load_candidates(problem.parents, config.merge.dtype, problem.device)
    return settings(problem.questions, config.tasks, models, problem.tokenizer, turns)
