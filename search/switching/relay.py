"""The relay: candidates take turns at writing one response, segment by segment; a policy says who is next.

Text is handed over as tokens: the candidates share one tokenizer, so a border inside a word is no drift. All of them
read the response as the assistant's own words so far. Who writes alone draws exactly what `AnswerSampler` draws from
it: the random numbers belong to the prompt, the sample and the place in the response, whoever writes there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from objectives.generation.drawing import draw_tokens
from objectives.generation.sampler import PADDING, Decoding, Generations, uniforms
from objectives.generation.stopping import Stopping, decoded
from objectives.scoring.encoding import max_length
from search.config.switching import Turns
from search.errors import ConfigError, EvaluationError
from search.switching.reader import Integers, Reader, Tokens, make_reader, row_bytes
from search.switching.response import INSERTED, Border, Chooser, Cost, Floats, Policy, Response, Start

ROWS = 512  # responses at work at once, at most
MEMORY = 2**28  # bytes of keys and values of a candidate, at most if a few rows fit

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Relayed:
    """What a relay wrote.

    Attributes:
        answers: as one model's. authors: `(n, s, t)` int8: candidate of every token; -1 for inserted text and padding.
        cost: in tokens.
    """

    answers: Generations
    authors: npt.NDArray[np.int8]
    cost: Cost


class Relay:
    """Candidates that take turns.

    Args:
        candidates: causal language models of one tokenizer by name, in the order of their indices. Put into eval mode.
        tokenizer: encodes what `turns` inserts.
        turns: how long a segment is, and who must write the first and the last.
        stopping: what ends a response.
        decoding: `temperature`, `top_p` and `max_new_tokens`: tokens of a response, inserted ones included.
        batch_rows: responses at work at once; None takes what `MEMORY` holds. Another number changes last bits.

    Raises:
        ConfigError: fewer than two candidates, or turns that name none of them or leave no room.
    """

    def __init__(
        self,
        candidates: Mapping[str, Any],
        tokenizer: Any,
        turns: Turns,
        stopping: Stopping,
        decoding: Decoding,
        *,
        batch_rows: int | None = None,
    ) -> None:
        self.names, self.models = tuple(candidates), [model.eval() for model in candidates.values()]
        self.tokenizer, self.turns, self.stopping, self.decoding = tokenizer, turns, stopping, decoding
        self._rows = batch_rows
        turns.check(self.names, decoding.max_new_tokens)
        self.closing, self.wait = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
            for text in (turns.closing, turns.wait)
        )
        if len(self.closing) + 1 > decoding.max_new_tokens:
            raise ConfigError(
                f"switching.closing: {len(self.closing)} tokens (wanted fewer than max_new_tokens, "
                f"{decoding.max_new_tokens}). Shorten it."
            )
        self.context = min(max_length(model.config, tokenizer) for model in self.models)

    def generate(
        self, prompts: Sequence[Tokens], policy: Policy, progress: Progress | None = None
    ) -> Relayed:
        """`decoding.samples` responses to every prompt, from `decoding.seed`.

        Args:
            prompts: distinct. progress: called with (prompts done, prompts).

        Raises:
            ConfigError: a prompt does not fit into a candidate's context; nothing was generated.
            EvaluationError: probabilities that are not numbers.
        """
        began = time.perf_counter()
        n, s, t = len(prompts), self.decoding.samples, self.decoding.max_new_tokens
        tokens = np.full((n, s, t), PADDING, dtype=np.int32)
        authors = np.full((n, s, t), INSERTED, dtype=np.int8)
        order = sorted(range(n), key=lambda i: -len(prompts[i]))  # neighbours pad little
        starts = [Start(prompts[i], j) for i in order for j in range(s)]
        completed = 0

        def tell(done: int, of: int) -> None:
            if progress is not None:
                progress(done // s, n)

        found, cost = self.run(starts, policy, self.decoding.seed, progress=tell, whole=s)
        for at, response in enumerate(found):
            i, j, length = order[at // s], at % s, len(response.tokens)
            tokens[i, j, :length], authors[i, j, :length] = response.tokens, response.authors
            completed += response.by_text and length < t
        about = [prompts, self.stopping.stops, self.stopping.until, asdict(self.decoding), asdict(self.turns)]
        digest = hashlib.sha256(json.dumps([*about, self.names, policy.key]).encode()).hexdigest()
        seconds = time.perf_counter() - began
        answers = Generations(tokens, cost.prompts, digest, seconds, completed)
        return Relayed(answers, authors, cost)

    def texts(self, found: Generations) -> tuple[tuple[str, ...], ...]:
        """n tuples of s responses, each up to the first text that ends one."""
        return tuple(tuple(map(self.stopping.cut, one)) for one in found.texts(self.tokenizer))

    def run(
        self,
        starts: Sequence[Start],
        policy: Policy,
        seed: int,
        *,
        segments: int | None = None,
        progress: Progress | None = None,
        whole: int = 1,
    ) -> tuple[list[Response], Cost]:
        """Responses to some starts, in order, and what they took.

        Args:
            seed: of the tokens that are drawn. segments: to write at most; None for whole responses.
            progress: called with (responses done, responses).
            whole: so many neighbours are kept in one batch.
        """
        self._check_room(starts)
        rows = self.batch_rows(starts)
        size = max(1, rows // whole) * whole if whole <= rows else rows
        found: list[Response] = []
        cost = Cost()
        for first in range(0, len(starts), size):
            batch = Batch(self, starts[first : first + size])
            for written, _ in enumerate(batch.rounds(policy, seed), start=1):
                if segments is not None and written >= segments:
                    break
            found += batch.responses
            cost += batch.cost
            if progress is not None:
                progress(len(found), len(starts))
        return found, cost

    def batch_rows(self, starts: Sequence[Start]) -> int:
        """How many of these to take at once."""
        if self._rows is not None:
            return self._rows
        width = max((len(start.prompt) for start in starts), default=1) + self.decoding.max_new_tokens
        most = max(row_bytes(model, width) for model in self.models)
        return max(8, min(ROWS, MEMORY // most))

    def _check_room(self, starts: Sequence[Start]) -> None:
        for start in starts:
            longest = len(start.prompt) + self.decoding.max_new_tokens
            if longest > self.context:
                raise ConfigError(
                    f"prompt of {len(start.prompt)} tokens: with {self.decoding.max_new_tokens} new ones it does not "
                    f"fit (wanted {self.context} together, the candidates' context). Shorten it or max_new_tokens."
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
