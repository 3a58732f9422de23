"""Texts -> tokens, exactly as lm-eval 0.4.13's `hf` model does it for causal models.

* Trailing white space of the context moves to the continuation. The context and the whole (context +
  continuation) are encoded separately; what the whole has beyond the context's length is scored.
* An empty context becomes one token, the tokenizer's BOS (EOS when it has none); a continuation that starts
  with that very token gives it up as context.
* Special tokens are the tokenizer's own default (so a tokenizer that adds BOS adds it), except that nothing is
  added to a text that already starts with the BOS (or EOS) text, as chat templates write it.
* A sequence longer than the model's maximum plus one loses tokens on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from objectives.errors import ConfigError
from objectives.questions.questions import Question

DEFAULT_MAX_LENGTH = 2048
TOKENIZER_INFINITY = 1000000000000000019884624838656  # what a tokenizer says when nobody set a length


@dataclass(frozen=True)
class EncodedQuestion:
    """The token sequences of one question.

    Attributes:
        sequences: context + continuation tokens of each option, left-truncated where too long.
        starts: index of the first scored token of each sequence, at least 1.
        truncated: whether any option lost context.
    """

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    truncated: bool = False


def max_length(config: Any, tokenizer: Any) -> int:
    """Most tokens the model is fed at once: its config's limit, else the tokenizer's, else 2048."""
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    limit = getattr(tokenizer, "model_max_length", None)
    return DEFAULT_MAX_LENGTH if limit is None or limit == TOKENIZER_INFINITY else int(limit)


def encode_questions(questions: Sequence[Question], tokenizer: Any, limit: int) -> list[EncodedQuestion]:
    """Tokens of every option of every question.

    Args:
        limit: most tokens the model is fed, as from `max_length`; the last token of a sequence is never fed.

    Raises:
        ConfigError: an option without a token of its own, or longer than the model's maximum; a tokenizer without
            BOS and EOS where a context is empty.
    """
    pairs = [_move_space(*pair) for question in questions for pair in question.pairs()]
    # Each text is encoded once: options share their context, and the tokenizer encodes lists in parallel.
    wanted = {context for context, _ in pairs if context}
    wanted |= {context + continuation for context, continuation in pairs if context}
    encoded = _encode_all(sorted(wanted), tokenizer)
    bare = {c: [int(t) for t in tokenizer.encode(c, add_special_tokens=False)] for ctx, c in pairs if not ctx}
    result = []
    at = 0
    for number, question in enumerate(questions):
        sequences, starts = [], []
        truncated = False
        for option, text in enumerate(question.options):
            context, continuation = pairs[at]
            at += 1
            if context:
                head = encoded[context]
                tail = encoded[context + continuation][len(head) :]
            else:
                head, tail = _after_nothing(bare[continuation], tokenizer)
            if not tail or not head or len(tail) > limit:
                raise ConfigError(
                    f"question {number} (task {question.task}), option {option} ('{text[:40]}'): {len(tail)} tokens "
                    f"after {len(head)} of context; wanted 1 to {limit} after at least 1. Correct the question."
                )
            kept = (*head, *tail)[-(limit + 1) :]
            truncated |= len(kept) < len(head) + len(tail)
            sequences.append(kept)
            starts.append(len(kept) - len(tail))
        result.append(EncodedQuestion(tuple(sequences), tuple(starts), truncated))
    return result


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    # lm-eval asks for an empty context before it moves the space: a context of nothing but space stays whole here.
    return (kept, context[len(kept) :] + continuation) if kept else (context, continuation)


def _encode_all(texts: list[str], tokenizer: Any) -> dict[str, list[int]]:
    first = getattr(tokenizer, "bos_token_id", None)
    first = getattr(tokenizer, "eos_token_id", None) if first is None else first
    mark = tokenizer.decode(first) if first is not None else None
    done: dict[str, list[int]] = {}
    for bare in (False, True):
        chosen = [text for text in texts if bool(mark and text.startswith(mark)) is bare]
        if chosen:
            options = {"add_special_tokens": False} if bare else {}
            ids = tokenizer(chosen, return_attention_mask=False, verbose=False, **options)["input_ids"]
            done.update((text, [int(t) for t in row]) for text, row in zip(chosen, ids, strict=True))
    return done


def _after_nothing(tokens: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ConfigError(
            "tasks: a question has an empty context, but the tokenizer has neither BOS nor EOS token."
        )
    return (tokens[:1], tokens[1:]) if tokens[:1] == [first] else ([int(first)], tokens)
