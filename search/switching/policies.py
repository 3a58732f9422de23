"""Who writes next: one candidate always, one for each prompt, or chance. Switchers are in `switcher`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from objectives.generation.sampler import uniforms
from search.switching.reader import Integers, Tokens
from search.switching.response import Border, Response


@dataclass(frozen=True)
class Always:
    """One candidate writes everything: what it writes alone."""

    author: int
    fed: int = 0

    @property
    def key(self) -> object:
        return ["always", self.author]

    def begin(self, responses: Sequence[Response]) -> Always:
        return self

    def choose(self, border: Border) -> Integers:
        return np.full(len(border.rows), self.author, dtype=np.int64)


@dataclass(frozen=True)
class ByPrompt:
    """A candidate for each prompt, as a router chose it."""

    authors: Mapping[Tokens, int]
    fed: int = 0

    @property
    def key(self) -> object:
        return ["by prompt", sorted((list(prompt), author) for prompt, author in self.authors.items())]

    def begin(self, responses: Sequence[Response]) -> ByPrompt:
        return self

    def choose(self, border: Border) -> Integers:
        chosen = [self.authors[border.responses[row].start.prompt] for row in border.rows]
        return np.array(chosen, dtype=np.int64)


@dataclass(frozen=True)
class AtRandom:
    """Every candidate with the same probability at every border: random switching.

    The numbers belong to the prompt, the sample and the segment, as those of the tokens do.
    """

    candidates: int
    seed: int

    @property
    def key(self) -> object:
        return ["random", self.seed]

    def begin(self, responses: Sequence[Response]) -> _Lots:
        return _Lots(self.candidates, self.seed, [{} for _ in responses])


@dataclass
class _Lots:
    candidates: int
    seed: int
    drawn: list[dict[int, Integers]]
    fed: int = 0

    def choose(self, border: Border) -> Integers:
        return np.array([self._author(row, border.responses[row]) for row in border.rows], dtype=np.int64)

    def _author(self, row: int, response: Response) -> int:
        known = self.drawn[row]
        at = len(response.borders)
        length = 64 * (at // 64 + 1)  # more of them begin with the same ones
        if length not in known:
            numbers = uniforms(response.start.prompt, self.seed, response.start.sample, length)
            known[length] = np.minimum((numbers * self.candidates).astype(np.int64), self.candidates - 1)
        return int(known[length][at])
