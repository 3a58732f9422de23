"""What a server needs of whoever writes the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Piece:
    """What one author added to an answer.

    Attributes:
        text: the increment; the texts of an answer's pieces joined are the answer. What may be the beginning of a
            stop text waits for the next piece, and what no candidate wrote goes with the one beside it.
        author: the candidate who wrote it.
        tokens: how many tokens it drew; one that ended the answer without a text is among them.
        finish: why the answer ends here, on its last piece only: "stop" by itself or before a stop text, "length" at
            the limit.
    """

    text: str
    author: str
    tokens: int
    finish: Literal["stop", "length"] | None


class Writer(Protocol):
    """Writes answers one at a time; `encode` may be called from another thread meanwhile.

    Attributes:
        name: model id.
        context: tokens the models take at most.
    """

    name: str
    context: int

    def encode(self, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a raw text, or of chat messages (role, content) through the chat template.

        Raises:
            ConfigError: the prompt has no tokens, or the chat template is missing or fails.
        """
        ...

    def room(self, prompt: tuple[int, ...]) -> int:
        """How many tokens an answer to this prompt may have, 0 if none fits."""
        ...

    def write(
        self,
        prompt: tuple[int, ...],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
        chat: bool,
    ) -> Iterator[Piece]:
        """One piece a segment. The answer ends before the first of the `stop` texts, which is never part of a piece.

        Args:
            chat: whether the prompt was chat messages; another kind of text may end an answer to them.

        Raises:
            ConfigError: it cannot be written as asked for, such as more tokens than `room`; before the first piece.
        """
        ...
