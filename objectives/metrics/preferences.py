"""How much an answer is to somebody's liking: what `preferences` of a study file measure on the sampled answers.

A preference gives every answer one number, higher is better; a prompt's value is the mean over its answers, and the
metric the mean over the prompts. All depend on how the answers were drawn: compare models under one `Decoding` only.

Words are runs of letters and digits, with apostrophes and hyphens inside, in lower case; punctuation is none:

>>> words_of("Well-kept, isn't it?")
['well-kept', "isn't", 'it']
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Texts = Sequence[Sequence[str]]
Floats = npt.NDArray[np.float64]

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text in order, in lower case; see above."""
    return _WORD.findall(text.lower())


def count_words(texts: Texts) -> Floats:
    """Number of words of each answer.

    Args:
        texts: s answers for each of n prompts.

    Returns:
        `(n, s)` float64; an empty answer has 0.

    >>> count_words([["Yes.", "Well, no."], ["", "..."]]).tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    return np.array([[len(words_of(answer)) for answer in answers] for answers in texts], dtype=np.float64)


def share_of_words(texts: Texts, among: Sequence[str]) -> Floats:
    """Share of each answer's words that are among the given ones, repeats counted.

    Args:
        texts: s answers for each of n prompts. among: single words; case does not matter.

    Returns:
        `(n, s)` float64 in [0, 1]; an empty answer has 0.

    >>> share_of_words([["Thus it is so.", ""]], ["thus", "so"]).tolist()
    [[0.5, 0.0]]
    """
    wanted = {word.lower() for word in among}

    def share(answer: str) -> float:
        words = words_of(answer)
        return sum(word in wanted for word in words) / max(1, len(words))

    return np.array([[share(answer) for answer in answers] for answers in texts], dtype=np.float64)


class Preference(Protocol):
    """Scores answers.

    Attributes:
        title: what is measured, in words; a model by its content.
    """

    @property
    def title(self) -> str: ...

    def __call__(self, prompts: Sequence[str], texts: Texts) -> Floats:
        """`(n, s)` finite float64 for s answers to each of n prompts; higher is better."""


@dataclass(frozen=True)
class Length:
    """Short or long answers: the number of words, its negative where fewer are better. Empty answers have 0."""

    fewer: bool

    @property
    def title(self) -> str:
        return f"{'fewer' if self.fewer else 'more'} words"

    def __call__(self, prompts: Sequence[str], texts: Texts) -> Floats:
        counts = count_words(texts)
        return 0.0 - counts if self.fewer else counts  # 0.0 -: no negative zero


@dataclass(frozen=True)
class Vocabulary:
    """Certain words: their share of an answer's, its negative where they are avoided. Empty answers have 0."""

    among: tuple[str, ...]
    avoided: bool = False

    @property
    def title(self) -> str:
        listed = ", ".join(self.among[:4]) + (f" and {len(self.among) - 4} more" if self.among[4:] else "")
        return f"{'avoids' if self.avoided else 'mentions'} {listed}"

    def __call__(self, prompts: Sequence[str], texts: Texts) -> Floats:
        shares = share_of_words(texts, self.among)
        return 0.0 - shares if self.avoided else shares
