"""Where a written answer ends: at a token that ends it by itself, or where its text comes to one of given strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from objectives.errors import ConfigError
from objectives.questions.chat import PROBE, rendered

BROKEN = "\ufffd"  # what a part of a character decodes to


class Stopping:
    """What ends the answers that are drawn with one tokenizer.

    Args:
        tokenizer: decodes answers, where `until` is given.
        stops: token ids that end an answer by themselves.
        until: texts that end an answer where it first contains one of them.

    Raises:
        ConfigError: an empty text in `until`.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int], until: Sequence[str] = ()) -> None:
        if "" in until:
            raise ConfigError("until: found an empty text, which every answer contains. Remove it.")
        self.stops = tuple(stops)
        self.until = tuple(until)
        self._tokenizer = tokenizer
        self._last = {text[-1] for text in until}
        self._completes: dict[int, bool] = {}

    def ends(self, drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """`(r,)` whether each of `(r,)` tokens ends its answer by itself (EOS, end of a turn); it is not kept then."""
        return np.isin(drawn, self.stops)

    def reached(self, answers: Sequence[Sequence[int]], drawn: Sequence[int]) -> list[bool]:
        """Whether the text of each answer now contains one of `until`.

        Args:
            answers: token ids of each answer, with the one just drawn.
            drawn: the token just drawn of each. Only answers are decoded whose last token can complete a text.
        """
        found = [False] * len(answers)
        if self.until:
            rows = [row for row, token in enumerate(drawn) if self._may_complete(int(token))]
            for row, text in zip(rows, decoded([answers[row] for row in rows], self._tokenizer), strict=True):
                found[row] = any(end in text for end in self.until)
        return found

    def cut(self, text: str) -> str:
        """The text before the first of `until`.

        >>> Stopping(None, (), ("\\n", "Q:")).cut(" 4 Q: 1 + 1?\\n2")
        ' 4 '
        """
        return text[: min((text.find(end) for end in self.until if end in text), default=len(text))]

    def _may_complete(self, token: int) -> bool:
        """Whether some text of `until` can end within this token."""
        known = self._completes.get(token)
        if known is None:
            # Twice, since many tokenizers drop the space before the first word of a text.
            (text,) = decoded([[token, token]], self._tokenizer)
            known = self._completes[token] = BROKEN in text or not self._last.isdisjoint(text)
        return known


def stopping(tokenizer: Any, *, chat_template: bool, until: Sequence[str] = ()) -> Stopping:
    """What ends an answer: the EOS, with a chat template the special token after an assistant's message, `until`.

    Raises:
        ConfigError: no chat template, one that fails, or an empty text in `until`.
    """
    stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if chat_template:
        turn = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": PROBE}]
        _, _, rest = rendered(turn, tokenizer, generate=False).rpartition(PROBE)
        following = tokenizer(rest.strip(), add_special_tokens=False)["input_ids"][:1]
        special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        stops |= special.intersection(int(token) for token in following)
    return Stopping(tokenizer, tuple(sorted(stops)), until)


def decoded(answers: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """Each answer as text, without special tokens and with its spaces as they were written."""
    if not answers:
        return []
    ids = [list(answer) for answer in answers]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [str(text) for text in texts]
