"""What a server needs of whoever writes the answers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from objectives.generation.sampler import Decoding, encode_prompts
from objectives.generation.stopping import BROKEN, Stopping, decoded, stopping
from objectives.questions.chat import rendered
from objectives.scoring.encoding import max_length
from search.config.switching import Turns
from search.errors import ConfigError
from search.switching.asked_switcher import Asking
from search.switching.folder import Opened
from search.switching.learned import AskedBrain
from search.switching.relay import Batch, Relay
from search.switching.response import Start


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


class SwitchWriter:
    """Writes with the candidates of an opened switcher; see `Writer`.

    What ends an answer besides `stop`: the tokenizer's EOS, the end of a turn if it has a chat template, and the texts
    of the study's task. An answer to chat messages ends at these texts only if the task was a chat, too: an empty line
    ends the answer to a bare question, and stands in the midst of many an assistant's.

    Attributes:
        name: model id. context: tokens that every candidate takes.
    """

    def __init__(self, opened: Opened, name: str) -> None:
        self.name, self._opened = name, opened
        tokenizer, brain = opened.tokenizer, opened.brain
        self.context = min(max_length(one.config, tokenizer) for one in opened.models.values())
        self._names = list(opened.models)
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        self._stops = stopping(tokenizer, chat_template=has_chat).stops
        self._asking: Asking | None = None
        if isinstance(brain, AskedBrain):
            self._asking = Asking.of(tokenizer, len(self._names), opened.about.switching.segment)
            self._asked_context = max_length(brain.model.config, tokenizer)

    def encode(self, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """See `Writer.encode`."""
        text = prompt
        if not isinstance(text, str):
            text = rendered([dict(turn) for turn in text], self._opened.tokenizer, generate=True)
        return encode_prompts([text], self._opened.tokenizer)[0]

    def room(self, prompt: tuple[int, ...]) -> int:
        """See `Writer.room`. A switcher that is asked in text reads the marks of all segments, too."""
        most = max(0, self.context - len(prompt))
        if self._asking is None:
            return most
        asking, start = self._asking, Start(prompt, 0)

        def read(new: int) -> int:
            return replace(asking, segment=max(1, min(asking.segment, new))).longest(start, new)

        return max(0, bisect_right(range(most + 1), self._asked_context, key=read) - 1)

    def write(
        self,
        prompt: tuple[int, ...],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str] = (),
        chat: bool = False,
    ) -> Iterator[Piece]:
        """See `Writer.write`. Turns are as `fitting` has them.

        Raises:
            ConfigError: more tokens than `room`, or a number out of its range.
        """
        about, tokenizer = self._opened.about, self._opened.tokenizer
        until = () if chat and not about.chat_template else about.until
        ends = Stopping(tokenizer, self._stops, (*until, *stop))
        decoding = Decoding(1, temperature, top_p, max_new_tokens, seed)
        room = self.room(prompt)
        if max_new_tokens > room:
            raise ConfigError(
                f"prompt: {len(prompt)} tokens leave room for {room} new ones (wanted {max_new_tokens}) in the "
                f"candidates' context, {self.context}, or the switcher's. Shorten it or lower max_new_tokens."
            )
        turns = self.fitting(max_new_tokens)
        relay = Relay(self._opened.models, tokenizer, turns, ends, decoding)
        batch = Batch(relay, [Start(prompt, 0)])
        (response,) = batch.responses
        told, drawn = 0, 0
        for _, (author,) in batch.rounds(self._opened.brain.policy(relay, about.switching, seed), seed):
            text = self._settled(response.tokens, ends, response.finish is not None)
            yield Piece(
                text=text[told:],
                author=self._names[author],
                tokens=response.drawn - drawn,
                finish=response.finish,
            )
            told, drawn = max(told, len(text)), response.drawn

    def fitting(self, max_new_tokens: int) -> Turns:
        """The switcher's turns, for answers that may be shorter than those of its study.

        A segment is as long as the whole answer at most. `closing` is left out where it and a segment do not fit, and
        the study's own answers had more room. `last` then still writes the last segment; where that is the only one,
        `first` gives way to it, as in any relay.
        """
        about = self._opened.about
        turns = about.switching.turns
        if turns.closing:
            size = len(self._opened.tokenizer(turns.closing, add_special_tokens=False)["input_ids"])
            if max_new_tokens < min(size + turns.segment, about.generate.max_new_tokens):
                turns = replace(turns, closing="")
        return replace(turns, segment=min(turns.segment, max_new_tokens))

    def _settled(self, tokens: Sequence[int], ends: Stopping, over: bool) -> str:
        """The text that later tokens cannot change: no half of a character, no beginning of a text that ends it."""
        (text,) = decoded([tokens], self._opened.tokenizer)
        cut = ends.cut(text)
        if over or cut != text:
            return cut
        while cut.endswith(BROKEN):
            cut = cut[:-1]
        held = max((n for end in ends.until for n in range(1, len(end)) if cut.endswith(end[:n])), default=0)
        return cut[: len(cut) - held]
