"""The relay: candidates take turns at writing one response, segment by segment; a policy says who is next.

Text is handed over as tokens: the candidates share one tokenizer, so a border inside a word is no drift. All of them
read the response as the assistant's own words so far. Who writes alone draws exactly what `AnswerSampler` draws from
it: the random numbers belong to the prompt, the sample and the place in the response, whoever writes there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from objectives.encoding import max_length
from objectives.generation import PADDING, Decoding, Generations
from objectives.stopping import Stopping
from search.errors import ConfigError
from search.switching.batch import INSERTED, Batch, Cost, Policy, Response, Start
from search.switching.reader import Tokens, row_bytes
from search.switching.turns import Turns

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
