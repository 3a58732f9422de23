"""What a request may say: OpenAI's fields, those that mean something and cannot be done refused, the rest ignored.

A field that is null counts as left out, as OpenAI has it. Values are strict: "2" is no number. A message's content is
a text, or text parts, which are joined by a newline (as vLLM and llama.cpp join them); `developer` is another name for
`system`. `temperature: 0` is greedy: the writer gets `COLDEST`, at which no draw differs from the most probable token.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from search.switching.serving.errors import ApiError, invalid, unsupported
from search.switching.serving.limits import Limits

COLDEST = 1e-6
NARROWEST = 1e-9  # the least top_p: the most probable token alone
STOPS = 4
STOP_CHARACTERS = 256

# Fields that change the answer and that nothing here does, with the values at which they ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("tools", "functions", "logit_bias", "suffix", "audio", "web_search_options"), ()),
    **dict.fromkeys(("logprobs", "echo", "ignore_eos", "use_beam_search", "prompt_logprobs"), ()),
    **dict.fromkeys(("stop_token_ids", "bad_words", "allowed_token_ids", "structured_outputs"), ()),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema"), ()
    ),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "min_p", "min_tokens"), (0,)),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "best_of": (1,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def _message_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise PydanticCustomError("content", "wanted a text or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "only parts of type text, with their text, are supported")
        texts.append(part["text"])
    return "\n".join(texts)


def _prompt_text(prompt: object) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise PydanticCustomError("prompt", "wanted one text, or a list with one text; no token ids")
    return prompt


def _stop_texts(stop: object) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, list | tuple) or len(found) > STOPS:
        raise PydanticCustomError("stop", "wanted a text or a list of at most {most} texts", {"most": STOPS})
    for text in found:
        if not isinstance(text, str) or not 0 < len(text) <= STOP_CHARACTERS:
            wanted = "wanted texts of 1 to {most} characters"
            raise PydanticCustomError("stop", wanted, {"most": STOP_CHARACTERS})
    return tuple(found)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class StreamOptions(_Strict):
    include_usage: bool = False


class Request(_Strict):
    """What both kinds of completions have in common."""

    model: str | None = None
    n: int = Field(1, ge=1, lt=2**31)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_texts)] = ()
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)

    @property
    def wanted_tokens(self) -> int | None:
        """The most an answer may have, where the request says so."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def seeds(self) -> tuple[int, ...]:
        """One for each of the n answers, 0 or more: the first has the request's own, which is drawn if there is none.

        >>> Request(seed=7, n=1).seeds(), len(set(Request(seed=7, n=3).seeds()))
        ((7,), 3)
        """
        first = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        rest = (hashlib.sha256(f"{first}/{j}".encode()).digest()[:8] for j in range(1, self.n))
        return (first, *(int.from_bytes(key, "big") >> 1 for key in rest))


class TextRequest(Request):
    """Body of POST /v1/completions."""

    default_tokens: ClassVar[int | None] = 16  # as OpenAI has it
    prompt: Annotated[str, BeforeValidator(_prompt_text)]

    @property
    def written(self) -> str:
        return self.prompt


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_message_text)]


class ChatRequest(Request):
    """Body of POST /v1/chat/completions. Without a number of tokens an answer may fill the context."""

    default_tokens: ClassVar[int | None] = None
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def written(self) -> list[dict[str, str]]:
        """Messages as chat templates take them."""
        return [
            {"role": "system" if m.role == "developer" else m.role, "content": m.content}
            for m in self.messages
        ]


Asked = TypeVar("Asked", bound=Request)


def read_request(kind: type[Asked], body: Mapping[str, Any], limits: Limits) -> Asked:
    """The typed request.

    Raises:
        ApiError: 400, naming the field.
    """
    given = {key: value for key, value in body.items() if value is not None}
    for name in sorted(_UNSUPPORTED.keys() & given.keys()):
        value = given[name]
        neutral = value in ((), [], {}, "") or value is False
        if not neutral and not (not isinstance(value, bool) and value in _UNSUPPORTED[name]):
            raise unsupported(name if name != "response_format" else "a format other than text", name)
    if kind is ChatRequest and isinstance(given.get("messages"), list):
        _refuse_tools(given["messages"])
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        raise _refused(error) from None
    if asked.n > limits.answers:
        raise invalid(f"n: at most {limits.answers} answers a request (found {asked.n}).", "n")
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options: only with stream: true.", "stream_options")
    return asked


def _refuse_tools(messages: list[Any]) -> None:
    for i, message in enumerate(messages):
        if isinstance(message, dict):
            for name in ("tool_calls", "function_call"):
                if message.get(name):
                    raise unsupported(name, f"messages[{i}].{name}")
            if message.get("role") in ("tool", "function"):
                raise unsupported(f"the role {message['role']}", f"messages[{i}].role")


def _refused(error: ValidationError) -> ApiError:
    """The first thing that is wrong, on one line."""
    first = error.errors(include_url=False)[0]
    path = ""
    for step in first["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    found = first["input"]
    seen = (
        f" (found {repr(found)[:40]})"
        if isinstance(found, bool | int | float) and first["type"] != "missing"
        else ""
    )
    missing = f"{path} is missing." if first["type"] == "missing" else f"{path}: {first['msg']}{seen}."
    return invalid(
        missing, path or None, "missing_required_parameter" if first["type"] == "missing" else None
    )
