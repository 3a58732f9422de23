"""The shapes of what is sent back: whole answers and server-sent chunks of them, as OpenAI's API reference has them.

Every choice carries one field more than OpenAI's, `mergefront: {"authors": [[name, tokens], ...]}`: who wrote which
segment, in order. In a stream, each chunk has the authors of its own text. OpenAI's clients keep it as `model_extra`.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from search.switching.writer import Piece

Finish = Literal["stop", "length"] | None
DONE = b"data: [DONE]\n\n"


class Authors(BaseModel):
    authors: list[tuple[str, int]] = []


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Choice(BaseModel):
    index: int
    finish_reason: Finish = None
    logprobs: None = None
    mergefront: Authors


class TextChoice(_Choice):
    text: str


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Choice):
    message: ChatMessage


class ChunkChoice(_Choice):
    delta: dict[str, str]


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None


class TextAnswer(_Answer):
    """Whole or chunk: they are of one shape here."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ChatAnswer(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(_Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]


class Model(BaseModel):
    """An entry of /v1/models; `max_model_len` is vLLM's name for the context."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mergefront"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Of /health; `requests` are being answered or wait."""

    status: Literal["ok"] = "ok"
    requests: int


def to_bytes(answer: BaseModel, exclude: set[str] | None = None) -> bytes:
    """JSON in UTF-8; a lone surrogate, which no JSON text may hold, becomes a question mark."""
    return json.dumps(answer.model_dump(exclude=exclude), ensure_ascii=False).encode("utf-8", "replace")


def event(data: bytes) -> bytes:
    """One server-sent event.

    >>> event(b"{}")
    b'data: {}\\n\\n'
    """
    return b"data: " + data + b"\n\n"


class Form(ABC):
    """Turns the pieces of one request's answers into what is sent; both endpoints differ in nothing else.

    Attributes:
        pieces: what was written so far, by answer.
    """

    prefix = ""

    def __init__(self, model: str, prompt_tokens: int, answers: int, *, include_usage: bool) -> None:
        self.head: dict[str, Any] = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }
        self.prompt_tokens = prompt_tokens
        self.include_usage = include_usage
        self.pieces: list[list[Piece]] = [[] for _ in range(answers)]

    def add(self, index: int, piece: Piece) -> None:
        self.pieces[index].append(piece)

    @property
    def new_tokens(self) -> int:
        return sum(piece.tokens for pieces in self.pieces for piece in pieces)

    def usage(self) -> Usage:
        new = self.new_tokens
        return Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=new, total_tokens=self.prompt_tokens + new
        )

    @abstractmethod
    def whole(self) -> bytes:
        """The answers as one JSON object."""

    def opening(self) -> Iterable[bytes]:
        """Events before the first piece."""
        return ()

    def delta(self, index: int, piece: Piece) -> Iterable[bytes]:
        """Events of one piece; its end, if it is the last, is an event of its own."""
        yield self._chunk(index, piece.text, None, Authors(authors=[(piece.author, piece.tokens)]))
        if piece.finish is not None:
            yield self._chunk(index, None, piece.finish, Authors())

    def ending(self) -> Iterable[bytes]:
        """Events after the last piece."""
        if self.include_usage:
            yield self._event([], self.usage())
        yield DONE

    @abstractmethod
    def _chunk(self, index: int, text: str | None, finish: Finish, authors: Authors) -> bytes:
        """An event of one answer: more of its text, or its end."""

    @abstractmethod
    def _event(self, choices: Sequence[_Choice], usage: Usage | None = None) -> bytes:
        """An event as the endpoint shapes it."""

    def _sent(self, answer: _Answer) -> bytes:
        # Null in every chunk but the last where usage was asked for, and no such field where it was not.
        return event(to_bytes(answer, None if self.include_usage else {"usage"}))


def _joined(pieces: Sequence[Piece]) -> tuple[str, Finish, Authors]:
    text = "".join(piece.text for piece in pieces)
    return text, pieces[-1].finish, Authors(authors=[(piece.author, piece.tokens) for piece in pieces])


class TextForm(Form):
    """Of /v1/completions."""

    prefix = "cmpl-"

    def whole(self) -> bytes:
        choices = []
        for i, pieces in enumerate(self.pieces):
            text, finish, authors = _joined(pieces)
            choices.append(TextChoice(index=i, text=text, finish_reason=finish, mergefront=authors))
        return to_bytes(TextAnswer(**self.head, choices=choices, usage=self.usage()))

    def _chunk(self, index: int, text: str | None, finish: Finish, authors: Authors) -> bytes:
        return self._event(
            [TextChoice(index=index, text=text or "", finish_reason=finish, mergefront=authors)]
        )

    def _event(self, choices: Sequence[Any], usage: Usage | None = None) -> bytes:
        return self._sent(TextAnswer(**self.head, choices=list(choices), usage=usage))


class ChatForm(Form):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl-"

    def whole(self) -> bytes:
        choices = []
        for i, pieces in enumerate(self.pieces):
            text, finish, authors = _joined(pieces)
            message = ChatMessage(content=text)
            choices.append(ChatChoice(index=i, message=message, finish_reason=finish, mergefront=authors))
        return to_bytes(ChatAnswer(**self.head, choices=choices, usage=self.usage()))

    def opening(self) -> Iterable[bytes]:
        for i in range(len(self.pieces)):
            delta = {"role": "assistant", "content": ""}
            yield self._event([ChunkChoice(index=i, delta=delta, mergefront=Authors())])

    def _chunk(self, index: int, text: str | None, finish: Finish, authors: Authors) -> bytes:
        delta = {} if text is None else {"content": text}
        return self._event([ChunkChoice(index=index, delta=delta, finish_reason=finish, mergefront=authors)])

    def _event(self, choices: Sequence[Any], usage: Usage | None = None) -> bytes:
        return self._sent(ChatChunk(**self.head, choices=list(choices), usage=usage))
