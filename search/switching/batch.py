"""Responses that are written together, segment by segment: who is next, what they write, what everybody read for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from objectives.drawing import draw_tokens
from objectives.generation import uniforms
from objectives.stopping import decoded
from search.errors import EvaluationError
from search.switching.reader import Integers, Reader, Tokens, make_reader

if TYPE_CHECKING:
    from search.switching.relay import Relay

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


class Batch:
    """Responses that are written together.

    Attributes:
        responses: as they stand.
    """

    def __init__(self, relay: Relay, starts: Sequence[Start]) -> None:
        self._relay, self._room = relay, relay.decoding.max_new_tokens
        self.responses = [
            Response(one, list(one.tokens), list(one.authors), called=one.called) for one in starts
        ]
        self._prefixes = [response.text for response in self.responses]
        self._readers: dict[int, Reader] = {}
        # Up to where a candidate had to read a row in order to write there; 0 if it never wrote.
        self._needed = np.zeros((len(relay.models), len(starts)), dtype=np.int64)
        self._heard = np.zeros_like(self._needed)
        self._own = 0  # tokens that models of the policy's own read

    def rounds(self, policy: Policy, seed: int) -> Iterator[tuple[Integers, Integers]]:
        """Writes a segment of every open response at a time; gives the rows that were written, and who wrote each.

        Where the text before the last segment ends a response, its last author is given, and wrote nothing.
        """
        starts = [response.start for response in self.responses]
        uniform = np.array([uniforms(one.prompt, seed, one.sample, self._room) for one in starts])
        chooser = policy.begin(self.responses)
        for response in self.responses:
            if len(response.tokens) >= self._room:
                response.finish = "length"
        while (rows := self._open()).size:
            authors = self._authors(rows, chooser)
            self._own = chooser.fed
            due = np.array([self.responses[row].finish is None for row in rows])
            for author in np.unique(authors[due]):
                self._write(int(author), rows[due & (authors == author)], uniform)
            yield rows, authors

    def read(self, author: int, rows: Integers) -> torch.Tensor:
        """`(r, width)` float32: a candidate's last hidden states, after it has read these rows."""
        return self._hear(author, rows).hidden[torch.from_numpy(rows)]

    @property
    def cost(self) -> Cost:
        """Tokens so far."""
        prompts = {response.start.prompt: len(response.start.prompt) for response in self.responses}
        read = switcher = 0
        for author, reader in self._readers.items():
            if not reader.keeps:  # it reads everything again, also what it wrote
                read += reader.fed
                continue
            # A prefix is read once for all rows that start with it.
            used: dict[Tokens, bool] = {}
            for row, response in enumerate(self.responses):
                heard, needed = self._heard[author, row], self._needed[author, row]
                prefix = self._prefixes[row]
                if heard == 0:
                    continue
                used[prefix] = used.get(prefix, False) or needed > 0
                begun = len(prefix) - len(response.start.prompt)
                others = np.array(response.authors[begun : heard - len(response.start.prompt)]) != author
                mine = max(0, needed - len(prefix))
                read += int(others[:mine].sum())
                switcher += int(others[mine:].sum())
            read += sum(len(prefix) for prefix, wrote in used.items() if wrote)
            switcher += sum(len(prefix) for prefix, wrote in used.items() if not wrote)
        written = sum(response.drawn for response in self.responses)
        return Cost(sum(prompts.values()), written, read, switcher + self._own)

    def _open(self) -> Integers:
        return np.array([i for i, one in enumerate(self.responses) if one.finish is None], dtype=np.int64)

    def _reader(self, author: int) -> Reader:
        if author not in self._readers:
            width = max(len(one.start.prompt) for one in self.responses) + self._room
            self._readers[author] = make_reader(self._relay.models[author], self._prefixes, width)
        return self._readers[author]

    def _hear(self, author: int, rows: Integers) -> Reader:
        reader = self._reader(author)
        reader.read(rows, [self.responses[row].text for row in rows])
        self._heard[author, rows] = [len(self.responses[row].text) for row in rows]
        return reader

    def _authors(self, rows: Integers, chooser: Chooser) -> Integers:
        """Who writes next: as `turns` demands it, else as the policy says."""
        relay, turns = self._relay, self._relay.turns
        authors = np.full(len(rows), INSERTED)
        for at, row in enumerate(rows):
            response = self.responses[row]
            left = self._room - len(response.tokens)
            # With one more segment before it the last one would not be whole.
            if turns.last is not None and (response.called or left < 2 * turns.segment + len(relay.closing)):
                if left > len(relay.closing):
                    self._insert(response, relay.closing)
                response.called, response.cut = True, not response.called
                authors[at] = relay.names.index(turns.last)
            elif turns.first is not None and not response.tokens:
                authors[at] = relay.names.index(turns.first)
        free = np.flatnonzero(authors == INSERTED)
        if free.size:
            for row in rows[free]:
                self.responses[row].free.append(len(self.responses[row].tokens))
            border = Border(rows[free], self.responses, lambda author: self.read(author, rows[free]))
            authors[free] = chooser.choose(border)
        return authors

    def _write(self, author: int, rows: Integers, uniform: Floats) -> None:
        """One segment by one candidate."""
        relay, stopping = self._relay, self._relay.stopping
        decoding = relay.decoding
        for row in rows:
            self.responses[row].borders.append(len(self.responses[row].tokens))
        last = relay.turns.last is not None and relay.names[author] == relay.turns.last
        for _ in range(relay.turns.segment):
            reader = self._hear(author, rows)
            self._needed[author, rows] = self._heard[author, rows]
            logits = reader.logits[torch.from_numpy(rows)]
            if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
                raise EvaluationError(
                    f"{relay.names[author]}: its probabilities are not numbers. Use dtype float32 for it."
                )
            place = [len(self.responses[row].tokens) for row in rows]
            drawn = draw_tokens(logits, uniform[rows, place], decoding.temperature, decoding.top_p)
            ended = stopping.ends(drawn)
            for row, token, end in zip(rows, drawn, ended, strict=True):
                response = self.responses[row]
                response.drawn += 1
                if not end:
                    response.tokens.append(int(token))
                    response.authors.append(author)
            kept = np.flatnonzero(~ended)
            written = [self.responses[row].tokens for row in rows[kept]]
            by_text = np.zeros(len(rows), dtype=np.bool_)
            by_text[kept] = stopping.reached(written, drawn[kept].tolist())
            for row in rows[by_text]:
                self.responses[row].finish, self.responses[row].by_text = "stop", True
            for row in rows[ended]:
                self._ended(self.responses[row], last)
            ended |= by_text
            full = np.array([len(self.responses[row].tokens) >= self._room for row in rows])
            for row in rows[full & ~ended]:
                self.responses[row].finish = "length"
            rows = rows[~ended & ~full]
            if not rows.size:
                break
        for row in rows:
            if self.responses[row].called and last:
                self.responses[row].finish = "length" if self.responses[row].cut else "stop"

    def _ended(self, response: Response, last: bool) -> None:
        """What follows when an author's token ends a response: the last author, a text to go on with, or nothing."""
        left = self._room - len(response.tokens)
        if self._relay.turns.last is not None and not last and left > 0:
            response.called = True
        elif self._relay.wait and INSERTED not in response.authors and left > len(self._relay.wait):
            self._insert(response, self._relay.wait)  # once
        else:
            response.finish = "stop"

    def _insert(self, response: Response, tokens: Tokens) -> None:
        response.tokens += tokens
        response.authors += [INSERTED] * len(tokens)
        stopping = self._relay.stopping
        if tokens and stopping.until:
            (text,) = decoded([response.tokens], self._relay.tokenizer)
            if stopping.cut(text) != text:
                response.finish, response.by_text = "stop", True
