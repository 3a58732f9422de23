"""The rules of taking turns: how long a segment is, and what happens at the first, at the last, and at an early end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.errors import ConfigError


@dataclass(frozen=True)
class Turns:
    """Rules of a relay. The two published variants (Feng et al., arXiv 2510.09913, and its successor library MoCo):

    `Turns(50, first="post", last="post", closing="The final answer is")` forces the aligned model at both ends;
    `Turns(25, wait=" Wait,")` forces nobody, and may go on once where an author ends early.

    Attributes:
        segment: tokens that an author writes before the next is chosen, 1 or more.
        first: who writes the first segment; None lets the policy choose.
        last: who writes the last one: the last whole segment within `max_new_tokens`, or the one after another author
            ended early.
        closing: text before the last segment; needs `last`.
        wait: text that is put once where an author ends a response early, which then goes on; does not go with `last`.

    Raises:
        ConfigError: a value out of its range, or two that do not go together.
    """

    segment: int
    first: str | None = None
    last: str | None = None
    closing: str = ""
    wait: str = ""

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ConfigError(f"switching.segment: found {self.segment} (wanted 1 token or more).")
        if self.closing and self.last is None:
            raise ConfigError("switching.closing: stands before the last segment; say who writes it (last).")
        if self.wait and self.last is not None:
            raise ConfigError(
                "switching.wait: does not go with last, which follows an early end. Remove one of them."
            )

    def leave_choice(self, room: int) -> bool:
        """Whether some segment of a response of `room` tokens has an author to choose, the closing text left aside."""
        free = self.segment if self.first is not None else 0
        return room - free >= 2 * self.segment if self.last is not None else room > free

    def check(self, names: Sequence[str], room: int) -> None:
        """Raises ConfigError where a name is no candidate's, or a segment does not fit into `room` tokens."""
        if len(names) < 2:
            raise ConfigError(f"switching: found {len(names)} candidates (wanted 2 or more).")
        for key, name in (("first", self.first), ("last", self.last)):
            if name is not None and name not in names:
                raise ConfigError(
                    f"switching.{key}: found {name!r} (wanted one of the candidates: {', '.join(names)})."
                )
        if self.segment > room:
            raise ConfigError(
                f"switching.segment: found {self.segment} tokens (wanted at most max_new_tokens, {room})."
            )
