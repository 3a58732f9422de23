"""Multi-agent refine: candidates read each other's answers and write theirs anew (Du et al. 2023, arXiv 2305.14325).

The text level of the baselines. Every candidate drafts an answer by itself; in each round each candidate gets the
question again with its own draft and the others' before it; the answer is what one of them writes in the last round.
With s samples a question there are s separate conversations: sample j only ever reads drafts of sample j.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from objectives.generation.sampler import BATCH_ROWS, AnswerSampler, Decoding, encode_prompts
from objectives.scoring.encoding import max_length
from search.errors import ConfigError

# {prompt} stands last, so that an answer follows it as it does without drafts, also from a model that only continues
# text. {own} and {others} are the drafts, the others' in the order of the candidates, each after a dash.
TEMPLATE = """My draft of an answer:
{own}

Drafts of others:
{others}

A better answer than these drafts, where they are wrong or differ:

{prompt}"""

Texts = list[list[str]]  # n questions, s samples each
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Refined:
    """What came of it.

    Attributes:
        texts: n tuples of s answers: the last ones of the candidate that answers.
        drafts: candidate -> its first answers, n tuples of s.
        prompt_tokens: fed as prompts, of all candidates and rounds; the first prompt of s samples went through once.
        generated_tokens: drawn by all candidates in all rounds, as in `Generations`.
        kept: how many times a draft stayed as it was because the prompt with all drafts was too long.
    """

    texts: tuple[tuple[str, ...], ...]
    drafts: Mapping[str, tuple[tuple[str, ...], ...]]
    prompt_tokens: int
    generated_tokens: int
    kept: int


def refine(
    candidates: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    rounds: int = 2,
    final: str | None = None,
    template: str = TEMPLATE,
    chat_template: bool = False,
    until: Sequence[str] = (),
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
) -> Refined:
    """Drafts, `rounds` rounds of rewriting, and the last answers of one candidate.

    In the last round only that candidate writes: nobody would read the others. Where a prompt with all drafts does not
    leave room for `max_new_tokens` in the candidate's context, the candidate keeps its draft of the round before and
    reads nothing: no draft is ever shown in part.

    Random numbers are those of `AnswerSampler`, from a seed for each candidate and round, and from the second round on
    each sample; they are keyed by names, so neither the order of the candidates nor of the prompts matters to them.

    Args:
        candidates: name -> causal language model; at least two, of one tokenizer.
        prompts: as of `AnswerSampler`. decoding: of every answer; its `samples` are the conversations.
        rounds: of rewriting, 0 or more; 0 leaves the drafts of the final candidate.
        final: name of the candidate whose answers count; None is the last one.
        template: of a prompt with drafts: {prompt} is the question's own prompt, and {own} and {others} are drafts.
        chat_template, until, batch_rows: as of `AnswerSampler`; the whole prompt is then a user's message, and answers
            are read up to the first of `until`.
        progress: called with (steps done, steps): a step is one candidate's answers of one round.

    Raises:
        ConfigError: fewer than two candidates, no candidate called `final`, a negative number of rounds, a template
            with other fields than these or without {prompt} and {others}, or as for `AnswerSampler`.
        EvaluationError: as for `AnswerSampler.generate`.
    """
    names = list(candidates)
    last = final if final is not None else "".join(names[-1:])
    if len(names) < 2 or last not in candidates:
        raise ConfigError(
            f"refine: {final or 'the last'} of candidates {', '.join(names) or 'none'} answers (wanted one of two or "
            "more)."
        )
    if rounds < 0:
        raise ConfigError(f"refine: rounds is {rounds} (wanted 0 or more).")
    _check_template(template)
    options: dict[str, Any] = {"chat_template": chat_template, "until": until, "batch_rows": batch_rows}
    steps, done = len(names) * max(rounds, 1) + (rounds > 0), 0
    read = drawn = kept = 0
    drafts: dict[str, Texts] = {}

    def answers(name: str, texts: Sequence[str], how: Decoding) -> tuple[tuple[str, ...], ...]:
        nonlocal read, drawn
        sampler = AnswerSampler(candidates[name], tokenizer, texts, how, **options)
        found = sampler.generate()
        read, drawn = read + found.prompt_tokens, drawn + found.generated_tokens
        return sampler.texts(found)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    for name in names:
        how = replace(decoding, seed=_seed(decoding.seed, 0, name, None))
        drafts[name] = [list(row) for row in answers(name, prompts, how)]
        advance()
    first = {name: tuple(map(tuple, texts)) for name, texts in drafts.items()}

    for turn in range(1, rounds + 1):
        writers = names if turn < rounds else [last]
        rewritten = {}
        for name in writers:
            mine = rewritten[name] = [list(row) for row in drafts[name]]
            for j in range(decoding.samples):
                texts = [_filled(template, prompt, drafts, name, i, j) for i, prompt in enumerate(prompts)]
                fits = _fitting(candidates[name], tokenizer, texts, decoding.max_new_tokens, chat_template)
                kept += len(texts) - len(fits)
                if not fits:
                    continue
                how = replace(decoding, samples=1, seed=_seed(decoding.seed, turn, name, j))
                new = answers(name, [texts[i] for i in fits], how)
                for i, (text,) in zip(fits, new, strict=True):
                    mine[i][j] = text
            advance()
        drafts.update(rewritten)
    return Refined(tuple(map(tuple, drafts[last])), first, read, drawn, kept)


def _filled(
    template: str, prompt: str, drafts: Mapping[str, Texts], name: str, question: int, sample: int
) -> str:
    others = [texts[question][sample] for other, texts in drafts.items() if other != name]
    return template.format(
        prompt=prompt,
        own=drafts[name][question][sample].strip(),
        others="\n".join(f"- {draft.strip()}" for draft in others),
    )


def _fitting(model: Any, tokenizer: Any, texts: Sequence[str], new: int, chat_template: bool) -> list[int]:
    """Which prompts leave room for so many new tokens."""
    limit = max_length(model.config, tokenizer)
    encoded = encode_prompts(texts, tokenizer, chat_template=chat_template)
    return [i for i, prompt in enumerate(encoded) if len(prompt) + new <= limit]


def _seed(seed: int, turn: int, name: str, sample: int | None) -> int:
    """Another seed for each step: with one for all, copies of a model would draft the same."""
    content = json.dumps([seed, turn, name, sample]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def _check_template(template: str) -> None:
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        fields = [name for _, name, form, conversion in parts if not form and not conversion]
    except ValueError as error:
        raise ConfigError(f"refine.template: {error}. Write a brace as two.") from error
    if len(fields) < len(parts) or not {"prompt", "others"} <= set(fields) <= {"prompt", "own", "others"}:
        found = ", ".join(f"{{{name}}}" for _, name, *_ in parts) or "none"
        raise ConfigError(
            f"refine.template: fields are {found} (wanted {{prompt}}, {{others}} and maybe {{own}})."
        )
