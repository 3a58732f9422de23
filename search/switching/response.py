"""Response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from search.switching.reader import Integers, Tokens

INSERTED = -1  # author of text that no candidate wrote

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Start:
    """What a response begins with.

    Attributes:
        prompt: token ids, at least one. sample: its index; with prompt and seed it says which numbers are drawn.
        tokens, authors: of a response that is there already; an author is the candidate's index.
        called: as it stood in `Response`.
    """

    prompt: Tokens
    sample: int
    tokens: Tokens = ()
    authors: tuple[int, ...] = ()
    called: bool = False


@dataclass
class Response:
    """A response as it grows.

    Attributes:
        tokens, authors: one author a token. A token that ended it by itself is not kept.
        borders: tokens before each segment that was written since the start.
        free: before those whose author the policy chose.
        finish: why nothing follows: `stop` if an author or a text ended it, `length` if there is no room, or none for a
            segment before the last; None while it is open.
        by_text: it came to a text that ends responses, which is kept in its tokens.
        called: the last author is next. cut: since there is no room for others, not since one of them ended early.
    """

    start: Start
    tokens: list[int]
    authors: list[int]
    borders: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    by_text: bool = False
    called: bool = False
    cut: bool = False
    drawn: int = 0

    @property
    def text(self) -> Tokens:
        """Prompt and response."""
        return (*self.start.prompt, *self.tokens)


@dataclass(frozen=True)
class Border:
    """Where a policy chooses.

    Attributes:
        rows: `(r,)` indices into `responses`, of those to choose for.
        responses: all of the batch.
        read: makes a candidate read all of the rows, and gives `(r, width)` float32 of its last hidden states there.
    """

    rows: Integers
    responses: Sequence[Response]
    read: Callable[[int], torch.Tensor]


class Chooser(Protocol):
    """A policy at work on one batch."""

    @property
    def fed(self) -> int:
        """Tokens that models of its own read so far."""

    def choose(self, border: Border) -> Integers:
        """`(r,)` indices of the candidates that write next."""


class Policy(Protocol):
    """Who writes next. `key`: what it is, for digests."""

    @property
    def key(self) -> object: ...

    def begin(self, responses: Sequence[Response]) -> Chooser:
        """A chooser for one batch."""


@dataclass(frozen=True)
class Cost:
    """Tokens of some responses.

    Attributes:
        prompts: of all prompts, each once. written: drawn, those that ended a response included.
        read: that candidates read of prompts and of each other's text, in order to write.
        switcher: that were read only in order to choose.
    """

    prompts: int = 0
    written: int = 0
    read: int = 0
    switcher: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(mine + its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )

    @property
    def total(self) -> int:
        return self.read + self.written + self.switcher

    @property
    def single(self) -> int:
        """What one model takes that writes the same responses alone."""
        return self.prompts + self.written

    def __str__(self) -> str:
        """For people: how often the tokens of a single model."""
        relay, switcher = (self.read + self.written) / self.single, self.switcher / self.single
        return (
            f"{relay:.2f} times a single model's {self.single:,} tokens, and {switcher:.2f} for the switcher"
        )
