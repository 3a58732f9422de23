"""Who writes next, asked in text: a language model reads the response with its authors marked, and names one of them.

(Feng et al. 2025, arXiv 2510.09913.) What it reads, as tokens:

    prompt  <model 0 begins> segment <model 0 ends>  <model 2 begins> segment <model 2 ends>  question

Each piece is encoded on its own, so the response keeps its tokens and what was marked once stays as it is. The answer
is no free text, where a 10 holds a 1 and a 0: of all logits only those of the candidates' numbers count.

Other than the released code, which puts the whole text into a user's message again, the question follows the response
in the assistant's turn: that leaves the prompt's tokens as the candidates have them, and lets keys and values be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from objectives.scoring.encoding import max_length
from search.errors import ConfigError, EvaluationError
from search.switching.classifier_switcher import Choice, chosen
from search.switching.reader import Integers, Tokens, make_reader
from search.switching.response import INSERTED, Border, Response, Start

BEGINS, ENDS = "<model {} begins>", "<model {} ends>"
QUESTION = "\nWhich model writes next, 0 to {}? Answer:"


@dataclass(frozen=True, eq=False)
class Asking:
    """How a response is put to a switcher.

    Attributes:
        tokenizer: the candidates'.
        segment: tokens of one, as `Turns` has it.
        begins, ends: token ids of each candidate's marks.
        question: token ids that follow the marked response.
        digits: the token that names each candidate behind the question; all are different.
    """

    tokenizer: Any
    segment: int
    begins: tuple[Tokens, ...]
    ends: tuple[Tokens, ...]
    question: Tokens
    digits: Tokens

    @classmethod
    def of(cls, tokenizer: Any, candidates: int, segment: int) -> Asking:
        """Raises ConfigError: fewer than two candidates, or the tokenizer has no token of its own for each number."""
        if candidates < 2:
            raise ConfigError(f"switching: found {candidates} candidates (wanted 2 or more).")

        def encoded(text: str) -> Tokens:
            return tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])

        # As the numbers stand in a text: some tokenizers put the space into their token, others before it.
        answers = [encoded(f"{QUESTION.format(candidates - 1)} {number}") for number in range(candidates)]
        question = answers[0][: min(common(answers[0], other) for other in answers[1:])]
        for number, answer in enumerate(answers):
            if len(answer) != len(question) + 1:
                raise ConfigError(
                    f"switching: the tokenizer has no token of its own for model number {number} (wanted one for each "
                    f"of 0 to {candidates - 1}). Take fewer candidates or another kind of switcher."
                )
        begins, ends = (
            tuple(encoded(mark.format(number)) for number in range(candidates)) for mark in (BEGINS, ENDS)
        )
        return cls(tokenizer, segment, begins, ends, question, tuple(answer[-1] for answer in answers))

    def marked(self, prompt: Tokens, tokens: Sequence[int], authors: Sequence[int]) -> Tokens:
        """Token ids of prompt and response with the author of every segment; inserted text has no marks.

        Where segments begin is told by the authors alone, since a `Start` knows no more: a run of one author's tokens
        is cut after every `segment` of them. These are the segments as they were written: one that ended early is
        followed by inserted text or by nothing. Where a response is taken up in the middle of a segment and its author
        goes on, the segment is filled up.
        """
        found = list(prompt)
        for first, last in self._pieces(authors):
            author = authors[first]
            if author == INSERTED:
                found += tokens[first:last]
            else:
                found += [*self.begins[author], *tokens[first:last], *self.ends[author]]
        return tuple(found)

    def asked(self, one: Start | Response) -> Tokens:
        """Token ids of a response as it stands, marked, and the question."""
        prompt = one.prompt if isinstance(one, Start) else one.start.prompt
        return (*self.marked(prompt, one.tokens, one.authors), *self.question)

    def longest(self, start: Start, room: int) -> int:
        """Tokens that `asked` has at most as long as the response is shorter than `room` tokens."""
        pieces = len(self._pieces(start.authors)) + max(0, room - len(start.tokens)) // self.segment + 1
        marks = max(len(begin) + len(end) for begin, end in zip(self.begins, self.ends, strict=True))
        return len(start.prompt) + max(room, len(start.tokens)) + pieces * marks + len(self.question)

    def check_room(self, model: Any, start: Start, room: int) -> None:
        """Raises ConfigError where the longest text about a response does not fit into the model's context."""
        longest, context = self.longest(start, room), max_length(model.config, self.tokenizer)
        if longest > context:
            raise ConfigError(
                f"switching: a prompt of {len(start.prompt)} tokens: with {room} new ones and the marks of segments of "
                f"{self.segment} the switcher reads up to {longest} (wanted {context}, its context). Shorten the "
                "prompt or max_new_tokens, or take longer segments."
            )

    def _pieces(self, authors: Sequence[int]) -> list[tuple[int, int]]:
        """First place of each segment or inserted text, and the one after its last."""
        found: list[tuple[int, int]] = []
        first = 0
        for place in range(1, len(authors) + 1):
            run = place < len(authors) and authors[place] == authors[first]
            if not run or (authors[first] != INSERTED and place - first == self.segment):
                found.append((first, place))
                first = place
        return found


def common(one: Tokens, other: Tokens) -> int:
    """How many tokens two texts begin with alike.

    >>> common((1, 2, 3), (1, 2, 4, 5))
    2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, its) in pairs if mine != its), min(len(one), len(other)))


def digit_logits(model: Any, asking: Asking, texts: Sequence[Tokens]) -> Tensor:
    """`(r, n)` float32 logits of the candidates' numbers behind r texts of `asked`, with gradients where they are on.

    Rows are padded on the right, where no token before looks. Only last tokens go through the output head.
    """
    head, sizes = model.get_output_embeddings(), [len(text) for text in texts]
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*text, *[text[0]] * (max(sizes) - len(text))] for text in texts], device=device)
    mask = torch.arange(max(sizes), device=device)[None] < torch.tensor(sizes, device=device)[:, None]

    def last(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, at = torch.arange(len(texts)), torch.tensor(sizes) - 1
        return (given[0][rows, at][:, None], *given[1:])

    handle = head.register_forward_pre_hook(last)
    try:
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    finally:
        handle.remove()
    found: Tensor = logits[:, -1, list(asking.digits)].float()
    return found


@torch.no_grad()  # not inference_mode: what a model keeps for itself may be trained with later
def asked_logits(
    model: Any, asking: Asking, texts: Sequence[Tokens], batch_rows: int = 64
) -> npt.NDArray[np.float64]:
    """`(m, n)` logits of the candidates' numbers behind m texts of `asked`, by a model in eval mode.

    Raises:
        EvaluationError: one is not a number.
    """
    found = np.empty((len(texts), len(asking.digits)))
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # neighbours pad little
    for first in range(0, len(order), batch_rows):
        rows = order[first : first + batch_rows]
        found[rows] = digit_logits(model, asking, [texts[i] for i in rows]).double().cpu().numpy()
    _check_finite(found)
    return found


@dataclass(frozen=True, eq=False)
class AskedSwitcher:
    """Chooses as a language model answers the question who writes next. Untrained, it is the paper's baseline.

    Attributes:
        model: in eval mode, of the candidates' tokenizer: one of them, or one with an adapter as from `train_lora`.
        asking: how it is asked, as it was in training.
        room: `max_new_tokens`.
        digest: of the model's weights, for the digests of what it chose.
        choice: `best` takes the most probable candidate, `draw` draws one from the nucleus of `top_p` (the paper does).
        seed: of what is drawn.
    """

    model: Any
    asking: Asking
    room: int
    digest: str
    choice: Choice = "best"
    top_p: float = 1.0
    seed: int = 0

    @property
    def key(self) -> object:
        asking = self.asking
        marks = [asking.segment, asking.begins, asking.ends, asking.question, asking.digits]
        return ["asked", self.digest, self.choice, self.top_p, self.seed, marks]

    def begin(self, responses: Sequence[Response]) -> _Asker:
        """Raises ConfigError where a response may become too long for the model; then none of the batch is written.

        A relay writes the longest prompts first.
        """
        for response in responses:
            self.asking.check_room(self.model, response.start, self.room)
        return _Asker(self, responses)


class _Asker:
    """The switcher at one batch: marked text is read once, the question again at every border."""

    def __init__(self, switcher: AskedSwitcher, responses: Sequence[Response]) -> None:
        self._switcher = switcher
        self._texts = [response.start.prompt for response in responses]
        width = max((switcher.asking.longest(one.start, switcher.room) for one in responses), default=0)
        self._reader = make_reader(switcher.model, self._texts, width)

    @property
    def fed(self) -> int:
        return self._reader.fed

    def choose(self, border: Border) -> Integers:
        switcher, responses = self._switcher, [border.responses[row] for row in border.rows]
        texts = [switcher.asking.asked(response) for response in responses]
        known = [common(self._texts[row], text) for row, text in zip(border.rows, texts, strict=True)]
        self._reader.rewind(border.rows, np.array(known, dtype=np.int64))
        self._reader.read(border.rows, texts)
        for row, text in zip(border.rows, texts, strict=True):
            self._texts[row] = text
        logits = self._reader.logits[torch.from_numpy(border.rows)][:, list(switcher.asking.digits)]
        found = logits.double().cpu().numpy()
        _check_finite(found)
        return chosen(found, responses, switcher.choice, switcher.top_p, switcher.seed)


def _check_finite(logits: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(logits).all():
        raise EvaluationError("switcher: its probabilities are not numbers. Use dtype float32 for it.")
