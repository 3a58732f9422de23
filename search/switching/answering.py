"""A trained switcher as a `Writer`: one response at a time, a piece a segment, as commands and servers need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from objectives.chat import rendered
from objectives.encoding import max_length
from objectives.generation import Decoding, encode_prompts
from objectives.stopping import Stopping, decoded, stopping
from search.errors import ConfigError
from search.switching.batch import INSERTED, Batch, Start
from search.switching.folder import Opened
from search.switching.relay import Relay
from search.switching.writer import Piece

_BROKEN = "\ufffd"  # what a part of a character decodes to


class SwitchWriter:
    """Writes with the candidates of an opened switcher; see `Writer`.

    What ends an answer besides `stop`: the tokenizer's EOS, the end of a turn if it has a chat template, and the texts
    of the study's task.

    Attributes:
        name: model id. context: tokens that every candidate takes.
    """

    def __init__(self, opened: Opened, name: str) -> None:
        self.name, self._opened = name, opened
        self.context = min(max_length(one.config, opened.tokenizer) for one in opened.models.values())
        self._names = list(opened.models)
        tokenizer = opened.tokenizer
        chat = bool(getattr(tokenizer, "chat_template", None))
        self._ends = stopping(tokenizer, chat_template=chat, until=opened.about.until)

    def encode(self, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """See `Writer.encode`."""
        text = prompt
        if not isinstance(text, str):
            text = rendered([dict(turn) for turn in text], self._opened.tokenizer, generate=True)
        return encode_prompts([text], self._opened.tokenizer)[0]

    def write(
        self,
        prompt: tuple[int, ...],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """See `Writer.write`."""
        about, tokenizer = self._opened.about, self._opened.tokenizer
        ends = Stopping(tokenizer, self._ends.stops, (*self._ends.until, *stop))
        turns = about.switching.turns
        relay = Relay(
            self._opened.models,
            tokenizer,
            replace(turns, segment=min(turns.segment, max_new_tokens)),
            ends,
            Decoding(1, temperature, top_p, max_new_tokens, seed),
        )
        if len(prompt) + max_new_tokens > self.context:
            raise ConfigError(
                f"prompt: {len(prompt)} tokens and {max_new_tokens} new ones (wanted {self.context} together, the "
                "candidates' context). Shorten it or lower max_new_tokens."
            )
        batch = Batch(relay, [Start(prompt, 0)])
        (response,) = batch.responses
        told, drawn = 0, 0
        for _ in batch.rounds(self._opened.brain.policy(relay, about.switching, seed), seed):
            over = response.finish is not None
            text = self._settled(response.tokens, ends, over)
            author = next((one for one in reversed(response.authors) if one != INSERTED), None)
            yield Piece(
                text=text[told:],
                author=self._names[author] if author is not None else "",
                tokens=response.drawn - drawn,
                finish=response.finish,
            )
            told, drawn = max(told, len(text)), response.drawn

    def _settled(self, tokens: Sequence[int], ends: Stopping, over: bool) -> str:
        """The text that later tokens cannot change: no half of a character, no beginning of a text that ends it."""
        (text,) = decoded([tokens], self._opened.tokenizer)
        cut = ends.cut(text)
        if over or cut != text:
            return cut
        while cut.endswith(_BROKEN):
            cut = cut[:-1]
        held = max((n for end in ends.until for n in range(1, len(end)) if cut.endswith(end[:n])), default=0)
        return cut[: len(cut) - held]


def write_all(writer: SwitchWriter, prompt: tuple[int, ...], **drawn: Any) -> tuple[str, list[Piece]]:
    """A whole answer, and its pieces."""
    pieces = list(writer.write(prompt, **drawn))
    return "".join(piece.text for piece in pieces), pieces
