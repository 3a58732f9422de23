"""The server, on a real socket, asked by OpenAI's own client and by rougher ones."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import ConfigError
from search.switching.serving.limits import Limits
from search.switching.serving.server import listen, serve
from search.switching.writer import Piece
from tests.serving_writer import PicoWriter, ScriptedWriter, serving

LAW = settings(deadline=None, max_examples=150, derandomize=True)
PICO = "pico/switch"
HELLO = [{"role": "user", "content": "hello"}]
TIGHT = Limits(
    body_bytes=4000,
    prompt_tokens=300,
    new_tokens=200,
    answers=3,
    waiting=1,
    header_seconds=1.0,
    body_seconds=1.0,
    header_bytes=4000,
    grace_seconds=0.2,
)


@pytest.fixture(scope="module")
def pico() -> Iterator[openai.OpenAI]:
    with serving(PicoWriter()) as at:
        yield client(at)


@pytest.fixture(scope="module")
def tight() -> Iterator[str]:
    with serving(ScriptedWriter(), TIGHT) as at:
        yield at


def client(at: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=at, api_key=key, max_retries=0, timeout=20)


def ask(
    at: str,
    body: Any = None,
    path: str = "/v1/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, http.client.HTTPResponse]:
    """Status, parsed body and response; `body` is bytes, an iterator of bytes (chunked), or becomes JSON."""
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    where = urlsplit(at)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    try:
        connection.request(method, path, raw, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    return response.status, json.loads(text), response


def error(found: tuple[int, Any, http.client.HTTPResponse]) -> tuple[int, str | None, str | None]:
    """Status, param and code of an answer, which has OpenAI's error shape and no other."""
    status, body, response = found
    assert response.headers["content-type"] == "application/json"
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    assert "Traceback" not in body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    return status, body["error"]["param"], body["error"]["code"]


def raw(at: str, sent: bytes, seconds: float = 5.0) -> bytes:
    """What comes back on a connection of its own until the server hangs up."""
    where = urlsplit(at)
    with socket.create_connection((where.hostname, where.port or 0), timeout=seconds) as connection:
        connection.sendall(sent)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    return found


def works(at: str) -> bool:
    status, body, _ = ask(at, {"prompt": "abc", "max_tokens": 5})
    return status == 200 and body["choices"][0]["text"] == "abcab"


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def load(at: str) -> int:
    """Requests that are being answered or wait."""
    return int(ask(at, path="/health", method="GET")[1]["requests"])


def test_a_completion(pico: openai.OpenAI) -> None:
    found = pico.completions.create(model=PICO, prompt="hello", max_tokens=20, seed=3)
    assert found.object == "text_completion"
    assert found.id.startswith("cmpl-")
    assert found.model == PICO
    assert abs(found.created - time.time()) < 60
    (choice,) = found.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert found.usage is not None
    usage = found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens
    assert usage == (5, 20, 25)
    assert choice.model_extra == {"mergefront": {"authors": [["pre", 4], ["post", 4]] * 2 + [["pre", 4]]}}


def test_it_is_what_the_writer_writes(pico: openai.OpenAI) -> None:
    writer = PicoWriter()
    prompt = writer.encode(HELLO)
    pieces = writer.write(prompt, max_new_tokens=24, temperature=0.9, top_p=0.8, seed=5, stop=())
    told = pico.chat.completions.create(
        model=PICO, messages=HELLO, max_tokens=24, temperature=0.9, top_p=0.8, seed=5
    )
    assert told.object == "chat.completion"
    assert told.choices[0].message.role == "assistant"
    assert told.choices[0].message.content == "".join(piece.text for piece in pieces)
    assert told.usage is not None
    assert told.usage.prompt_tokens == len(prompt)


def test_streams_say_what_whole_answers_say(pico: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": PICO, "max_tokens": 30, "seed": 4, "n": 2}
    whole = pico.completions.create(prompt="Why", **options)
    texts, authors, ends = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
    for chunk in pico.completions.create(prompt="Why", stream=True, **options):
        assert (chunk.object, chunk.usage) == ("text_completion", None)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            authors[choice.index] += choice.model_extra["mergefront"]["authors"]  # type: ignore[index]
            ends[choice.index] += [choice.finish_reason]
    assert texts == [choice.text for choice in whole.choices]
    assert [{"authors": one} for one in authors] == [c.model_extra["mergefront"] for c in whole.choices]  # type: ignore[index]
    for found, choice in zip(ends, whole.choices, strict=True):
        assert found[-1] == choice.finish_reason
        assert set(found[:-1]) == {None}
    assert texts[0] != texts[1]


def test_a_chat_stream_event_by_event(pico: openai.OpenAI) -> None:
    body = {"messages": HELLO, "max_tokens": 10, "seed": 4, "stream": True}
    whole = pico.chat.completions.create(model=PICO, messages=HELLO, max_tokens=10, seed=4)
    for extra in ({}, {"stream_options": {"include_usage": True}}):
        sent = _events(str(pico.base_url), {**body, **extra})
        assert sent[-1] == "[DONE]"
        chunks = [json.loads(event) for event in sent[:-1]]
        last = chunks.pop() if extra else None
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert all(("usage" in chunk) == bool(extra) and not chunk.get("usage") for chunk in chunks)
        deltas = [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks]
        assert deltas[0] == ({"role": "assistant", "content": ""}, None)
        assert deltas[-1] == ({}, "length")
        assert all(set(delta) == {"content"} and end is None for delta, end in deltas[1:-1])
        assert "".join(d["content"] for d, _ in deltas[:-1]) == whole.choices[0].message.content
        if last is not None:
            assert last["choices"] == []
            assert last["usage"] == {"prompt_tokens": 12, "completion_tokens": 10, "total_tokens": 22}


def _events(base: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[str]:
    where = urlsplit(base)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = response.read().decode().split("\n\n")
    connection.close()
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def test_seeds(pico: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        found = pico.completions.create(model=PICO, prompt="hello", max_tokens=12, **options)
        return [choice.text for choice in found.choices]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert texts(seed=1, n=3)[0] == texts(seed=1)[0]
    assert texts(seed=1, n=3) == texts(seed=1, n=3)
    assert len(set(texts(seed=1, n=3))) == 3
    assert texts() != texts()
    assert texts(seed=-5) == texts(seed=-5)
    assert texts(temperature=0) == texts(temperature=0, seed=9) == texts(top_p=0)


def test_stop_texts(pico: openai.OpenAI) -> None:
    def one(**options: Any) -> Any:
        return pico.completions.create(model=PICO, prompt="hello", max_tokens=24, seed=3, **options).choices[
            0
        ]

    full = one().text
    for stop in (full[3:6], [full[9:11], "never"]):  # across a border of segments, too
        found = one(stop=stop)
        first = stop if isinstance(stop, str) else stop[0]
        assert found.text == full[: full.index(first)]
        assert found.finish_reason == "stop"
        streamed = pico.completions.create(
            model=PICO, prompt="hello", max_tokens=24, seed=3, stop=stop, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in streamed) == found.text


def test_models_and_health(pico: openai.OpenAI) -> None:
    (listed,) = pico.models.list().data
    found = pico.models.retrieve(PICO)  # a name with a slash
    assert listed == found
    assert found.id == PICO
    assert (found.object, found.model_extra) == ("model", {"max_model_len": 512})
    with pytest.raises(openai.NotFoundError, match="gpt-4") as caught:
        pico.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"
    assert ask(str(pico.base_url), path="/health", method="GET")[:2] == (200, {"status": "ok", "requests": 0})


def test_what_reaches_the_writer() -> None:
    writer = ScriptedWriter()
    with serving(writer) as at:
        ask(at, {"prompt": ["abc"], "temperature": 0, "top_p": None, "stop": None, "seed": 7, "user": "me"})
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts, "name": "n"}]
        body = {"messages": messages, "max_tokens": 3, "max_completion_tokens": 5, "stop": "z", "store": True}
        ask(at, body, "/v1/chat/completions")
        ask(at, {"messages": [{"role": "user", "content": "x"}], "tools": []}, "/v1/chat/completions")
    text, chat, open_end = writer.seen
    assert text["prompt"] == tuple(map(ord, "abc"))
    assert (text["temperature"], text["top_p"], text["seed"], text["stop"]) == (1e-6, 1.0, 7, ())
    assert text["max_new_tokens"] == 16
    assert "".join(map(chr, chat["prompt"])) == "<system>x<user>a\nb"
    assert (chat["max_new_tokens"], chat["stop"], chat["temperature"]) == (5, ("z",), 1.0)
    assert open_end["max_new_tokens"] == 512 - len("<user>x")
    assert writer.begun == writer.ended == 3


WRONG: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": 5}, "prompt", None),
    ({"prompt": [1, 2]}, "prompt", None),
    ({"prompt": ["a", "b"]}, "prompt", None),
    ({"prompt": ""}, "prompt", None),
    ({"n": 0}, "n", None),
    ({"n": 4}, "n", None),
    ({"n": "2"}, "n", None),
    ({"n": True}, "n", None),
    ({"n": 1.5}, "n", None),
    ({"stream": "yes"}, "stream", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"temperature": 2.1}, "temperature", None),
    ({"temperature": -1}, "temperature", None),
    ({"temperature": True}, "temperature", None),
    ({"top_p": 1.5}, "top_p", None),
    ({"seed": 2**63}, "seed", None),
    ({"seed": 0.5}, "seed", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": 201}, "max_tokens", None),
    ({"max_tokens": 200, "prompt": "p" * 299, "model": "scripted"}, None, "ok"),
    ({"prompt": "p" * 301}, "prompt", "context_length_exceeded"),
    ({"stop": list("abcde")}, "stop", None),
    ({"stop": ""}, "stop", None),
    ({"stop": [1]}, "stop", None),
    ({"stop": {"a": 1}}, "stop", None),
    ({"model": 5}, "model", None),
    ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_parameter"),
    ({"top_k": 5}, "top_k", "unsupported_parameter"),
    ({"frequency_penalty": 0, "best_of": 1, "echo": False, "top_k": -1, "logit_bias": {}, "zzz": 1}, None, "ok"),
]  # fmt: skip
WRONG_CHAT: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"messages": []}, "messages", None),
    ({"messages": "hello"}, "messages", None),
    ({"messages": ["hello"]}, "messages[0]", None),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", None),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "p" * 300}]}, "messages", "context_length_exceeded"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"top_logprobs": 3}, "top_logprobs", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto"}, None, "ok"),
]  # fmt: skip


def test_wrong_fields(tight: str) -> None:
    for changed, param, code in WRONG:
        body = changed if "prompt" in changed or not changed else {"prompt": "abc", **changed}
        found = ask(tight, body)
        assert (found[0] == 200) if code == "ok" else (error(found) == (400, param, code)), (
            changed,
            found[1],
        )
    for changed, param, code in WRONG_CHAT:
        found = ask(tight, {"messages": HELLO, "max_tokens": 3, **changed}, "/v1/chat/completions")
        assert (found[0] == 200) if code == "ok" else (error(found) == (400, param, code)), (
            changed,
            found[1],
        )
    assert works(tight)


def test_openais_client_raises_its_own_errors(tight: str) -> None:
    asked = client(tight)
    with pytest.raises(
        openai.BadRequestError, match=r"At most 300 tokens are read here \(found 400\)"
    ) as caught:
        asked.completions.create(model="scripted", prompt="p" * 400)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as missing:
        asked.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.APIStatusError) as large:
        asked.completions.create(model="scripted", prompt="p" * 50_000)
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    with pytest.raises(openai.NotFoundError) as nowhere:
        asked.embeddings.create(model="scripted", input="x")
    assert nowhere.value.code == "unknown_url"


def test_context_left_for_the_answer() -> None:
    with serving(ScriptedWriter(context=20)) as at:
        found = ask(at, {"prompt": "p" * 12, "max_tokens": 9})
        assert error(found) == (400, "prompt", "context_length_exceeded")
        assert "21 tokens (12 in the prompt, 9 to write; 8 fit)" in found[1]["error"]["message"]
        assert error(ask(at, {"prompt": "p" * 20}))[2] == "context_length_exceeded"
        assert ask(at, {"prompt": "p" * 12, "max_tokens": 8})[1]["usage"]["total_tokens"] == 20
        assert ask(at, {"prompt": "p" * 19})[1]["usage"]["total_tokens"] == 20  # the default of 16 gives way


def test_bodies_that_are_no_request(tight: str) -> None:
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b"[" * 3000,
        b'{"a":"\\ud800"}',
    ):
        assert error(ask(tight, body)) == (400, None, "invalid_json"), body
    assert error(ask(tight, b'{"prompt":"a","seed":' + b"9" * 3900 + b"}"))[:2] == (400, "seed")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert error(ask(tight, {"prompt": "abc"}, headers={"content-type": kind}))[0] == 415
    assert error(ask(tight, b"zip", headers={"content-encoding": "gzip"}))[0] == 415
    assert ask(tight, {"prompt": "a"}, headers={"content-type": "Application/JSON; charset=utf-8"})[0] == 200
    assert works(tight)


def test_routes_that_are_not_there(tight: str) -> None:
    for path in ("/", "/docs", "/openapi.json", "/redoc", "/v1", "/v1/chat/completions/", "/../etc/passwd"):
        assert error(ask(tight, path=path, method="GET")) == (404, None, "unknown_url"), path
    for method, path in (
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("OPTIONS", "/v1/completions"),
    ):
        found = ask(tight, path=path, method=method)
        assert error(found) == (405, None, "method_not_supported")
        assert found[2].headers["allow"]
        assert not any(name.lower().startswith("access-control") for name in found[2].headers)
    assert works(tight)


def test_bodies_beyond_the_limit(tight: str) -> None:
    big = json.dumps({"prompt": "p" * 5000}).encode()
    assert error(ask(tight, big)) == (413, None, "request_too_large")
    assert error(ask(tight, iter([big[:3000], big[3000:]]))) == (413, None, "request_too_large")  # chunked

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 1000

    with pytest.raises((OSError, http.client.HTTPException)):
        ask(tight, endless())
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    # One that asks first sends nothing, and is told at once.
    told = raw(tight, head + b"Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 413")
    slow = raw(tight, head + b"Content-Length: 100\r\n\r\n{")
    assert slow.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in slow.lower()
    # What follows an unread body is never taken for the next request.
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    length = f"Content-Length: {len(smuggled) + 9}\r\n\r\n".encode()
    found = raw(tight, b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n" + length + smuggled)
    assert found.count(b"HTTP/1.1 ") == 1
    assert works(tight)


def test_connections_that_are_no_request(tight: str) -> None:
    def refused(sent: bytes) -> tuple[int, str]:
        head, _, body = raw(tight, sent).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)["error"]["code"]

    assert refused(b"hello\r\n\r\n") == (400, "invalid_http")
    endless = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 9000
    assert refused(endless) == (400, "invalid_http")
    began = time.monotonic()
    assert refused(b"") == (408, "request_timeout")  # silence
    assert refused(b"GET /health HTTP/1.1\r\nHost: loc") == (408, "request_timeout")  # and half a header
    assert time.monotonic() - began < 5
    assert works(tight)


def test_too_many_connections() -> None:
    with serving(ScriptedWriter(), Limits(connections=2, grace_seconds=0.2)) as at:
        where = urlsplit(at)
        held = [socket.create_connection((where.hostname, where.port or 0)) for _ in range(2)]
        found = raw(at, b"")
        assert found.startswith(b"HTTP/1.1 503")
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        for one in held:
            one.close()
        assert eventually(
            lambda: b"200" in raw(at, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[:12]
        )


def test_names_and_keys() -> None:
    with serving(ScriptedWriter(), hosts={"localhost", "127.0.0.1", "[::1]"}, api_key="sésame") as at:
        key = {"authorization": "Bearer s\u00e9same".encode().decode("latin-1")}
        for host in ("localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8000"):
            assert ask(at, path="/health", method="GET", headers={"host": host})[0] == 200
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io", ""):
            found = ask(at, {"prompt": "abc"}, headers={"host": host, **key})
            assert error(found) == (400, None, "invalid_host")
        for wrong in (
            {},
            {"authorization": "Bearer x"},
            {"authorization": "Basic x"},
            {"authorization": "s"},
        ):
            found = ask(at, {"prompt": "abc"}, headers=wrong)
            assert error(found) == (401, None, "invalid_api_key")
        assert ask(at, {"prompt": "abc"}, headers=key)[0] == 200
        with pytest.raises(openai.AuthenticationError):
            client(at, "wrong").models.list()


def test_a_client_that_does_not_read() -> None:
    class Wordy(ScriptedWriter):
        def write(self, prompt: tuple[int, ...], **options: Any) -> Iterator[Piece]:
            for piece in super().write(prompt, **options):
                yield Piece(piece.text * 500_000, piece.author, piece.tokens, piece.finish)

    writer = Wordy(steps=threading.Semaphore(20))
    with serving(writer, Limits(send_seconds=0.3, grace_seconds=0.2)) as at:
        body = b'{"prompt":"abc","max_tokens":200,"stream":true}'
        with _sent(at, body) as idle:
            assert eventually(lambda: writer.begun == 1)
            assert writer.steps is not None
            while writer.ended == 0:
                writer.steps.release(1)  # slowly: it is the connection that ends it, not the last segment
                time.sleep(0.1)
                assert len(writer.seen) == 1
            idle.settimeout(5)
            found = b""
            while chunk := idle.recv(1 << 20):
                found = found[-10:] + chunk
            assert not found.endswith(b"0\r\n\r\n")  # hung up on, not ended
        writer.steps.release(1)
        assert ask(at, {"prompt": "abc", "max_tokens": 1})[0] == 200


def _sent(at: str, body: bytes) -> socket.socket:
    where = urlsplit(at)
    connection = socket.create_connection((where.hostname, where.port or 0))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_a_full_line() -> None:
    writer = ScriptedWriter(steps=threading.Semaphore(0))
    with serving(writer, Limits(waiting=1, grace_seconds=0.2)) as at:
        found: list[int] = []

        def one() -> None:
            found.append(ask(at, {"prompt": "abc", "max_tokens": 4})[0])

        threads = [threading.Thread(target=one) for _ in range(2)]
        threads[0].start()
        assert eventually(lambda: writer.begun == 1)
        threads[1].start()
        assert eventually(lambda: load(at) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            client(at).completions.create(model="scripted", prompt="abc")
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert writer.begun == 1  # one at a time
        writer.steps.release(2)  # type: ignore[union-attr]
        for thread in threads:
            thread.join(20)
        assert found == [200, 200]
        writer.steps = None
        assert works(at)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mergefront")
    writer = ScriptedWriter(steps=threading.Semaphore(1))
    with serving(writer, Limits(waiting=0, grace_seconds=0.2)) as at:
        body = json.dumps({"prompt": "abc", "max_tokens": 100, "stream": stream}).encode()
        with _sent(at, body) as leaving:
            if stream:
                assert b"HTTP/1.1 200" in leaving.recv(100)
            assert eventually(lambda: writer.begun == 1)
            assert error(ask(at, {"prompt": "abc"}))[0] == 429
        assert eventually(
            lambda: "client left" in caplog.text
        )  # 24 segments are left, and one is being written
        assert load(at) == 1
        assert writer.steps is not None
        writer.steps.release(1)
        assert eventually(lambda: writer.ended == 1)
        writer.steps = None
        assert works(at)
        assert writer.begun == 2


def test_a_client_that_leaves_the_line_frees_its_place() -> None:
    writer = ScriptedWriter(steps=threading.Semaphore(0))
    with serving(writer, Limits(waiting=1, grace_seconds=0.2)) as at:
        first = threading.Thread(target=ask, args=(at, {"prompt": "abc", "max_tokens": 4}))
        first.start()
        assert eventually(lambda: writer.begun == 1)
        with pytest.raises(openai.APITimeoutError):
            client(at).with_options(timeout=1.0).completions.create(model="scripted", prompt="b")
        assert eventually(lambda: load(at) == 1)
        second = threading.Thread(target=ask, args=(at, {"prompt": "abc", "max_tokens": 4}))
        second.start()
        assert eventually(lambda: load(at) == 2)
        assert error(ask(at, {"prompt": "abc"}))[0] == 429  # the second has the place
        assert writer.steps is not None
        writer.steps.release(5)
        first.join(20)
        second.join(20)
        assert writer.begun == 2


def test_time_limit() -> None:
    writer = ScriptedWriter(steps=threading.Semaphore(0))
    with serving(writer, Limits(seconds=1.0, grace_seconds=0.2)) as at:
        found = ask(at, {"prompt": "abc"})
        assert error(found) == (504, None, "timeout")
        assert found[2].headers["x-should-retry"] == "false"
        writer.steps.release(1)  # type: ignore[union-attr]
        assert eventually(lambda: writer.ended == 1)
        writer.steps.release(1)  # type: ignore[union-attr]
        *events, last, done = _events(at, {"prompt": "abc"} | {"stream": True}, "/v1/completions")
        assert json.loads(events[0])["choices"][0]["text"] == "abca"
        assert (json.loads(last)["error"]["code"], done) == ("timeout", "[DONE]")
        writer.steps.release(1)  # type: ignore[union-attr]
        assert eventually(lambda: writer.ended == 2)


def test_a_writer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    writer = ScriptedWriter(fail=RuntimeError("/secret/path is broken"))
    with serving(writer) as at, caplog.at_level("INFO", "mergefront"):
        found = ask(at, {"prompt": "abc"})
        assert error(found) == (500, None, None)
        assert "secret" not in json.dumps(found[1])
        with pytest.raises(openai.APIError, match="failed") as caught:
            for _ in client(at).completions.create(model="scripted", prompt="abc", stream=True):
                pass
        assert "secret" not in str(caught.value)
        assert "RuntimeError: /secret/path is broken" in caplog.text
        writer.fail = None
        assert works(at)
        assert writer.begun == writer.ended


def test_a_writer_that_breaks_its_promises() -> None:
    class Endless(ScriptedWriter):
        def write(self, prompt: tuple[int, ...], **options: Any) -> Iterator[Piece]:
            yield Piece("x\ud800", "pre", 1, None if prompt == (97,) else "stop")

    with serving(Endless()) as at:
        assert error(ask(at, {"prompt": "a"}))[0] == 500  # no end
        assert ask(at, {"prompt": "b"})[1]["choices"][0]["text"] == "x?"


def test_the_log_has_a_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    with serving(ScriptedWriter()) as at, caplog.at_level("INFO", "mergefront"):
        works(at)
        ask(at, path="/a%0Ab", method="GET")
        ask(at, path="/health", method="GET")
        assert eventually(lambda: len(_lines(caplog)) == 2)
    first, second = _lines(caplog)
    assert re.fullmatch(r"POST /v1/completions 200, 3\+5 tokens, \d+\.\d\d s", first)
    assert re.fullmatch(r"GET /a%0Ab 404, \d+\.\d\d s", second)


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mergefront" and r.levelname == "INFO"]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 600),
    st.floats(),
    st.text(max_size=8),
    st.integers(),
    st.just("user"),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner),
    ),
    max_leaves=6,
)
FIELDS = [
    *("model", "prompt", "messages", "n", "stream", "stream_options", "stop", "temperature", "top_p", "seed"),
    *(
        "max_tokens",
        "max_completion_tokens",
        "tools",
        "logprobs",
        "logit_bias",
        "response_format",
        "best_of",
        "user",
    ),
]
GOOD = {
    "prompt": st.text(max_size=20),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "tool"]), "content": st.text(max_size=9)}
        ),
        max_size=3,
    ),
    "max_tokens": st.integers(0, 12),
    "stream": st.booleans(),
}


@LAW
@given(st.data())
def test_any_json_is_answered_or_refused(tight: str, data: st.DataObject) -> None:
    body: Any = data.draw(st.fixed_dictionaries({}, optional=GOOD)) | data.draw(
        st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3)
    )
    path = data.draw(st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
    where = urlsplit(tight)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    try:
        sent = json.dumps(body)
        connection.request("POST", path, sent, {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    assert response.status in (200, 400, 404, 413), (sent, text)
    if response.status != 200:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    elif body.get("stream"):
        assert text.endswith("data: [DONE]\n\n")
        assert '"error"' not in text
    else:
        assert json.loads(text)["choices"]


def test_alive_after_the_fuzz(tight: str) -> None:
    assert works(tight)


@contextmanager
def process(*arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[2]
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.serving_writer", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it(number: int, code: int) -> None:
    with process("127.0.0.1", "0", "8") as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.fullmatch(r"serving scripted at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found is not None, line
        at = found[1]
        assert works(at)
        assert error(ask(at, {"prompt": "a"}, headers={"host": "evil.example"}))[2] == "invalid_host"
        told: list[Any] = []
        threads = []
        body = {"prompt": "abc", "max_tokens": 40}
        for waiting in (1, 2):  # the first ends within the grace; the second waits, and is refused
            threads.append(threading.Thread(target=lambda: told.append(ask(at, body)[:2])))
            threads[-1].start()
            assert eventually(lambda waiting=waiting: load(at) == waiting)  # type: ignore[misc]
        server.send_signal(number)
        for thread in threads:
            thread.join(10)
        assert server.wait(10) == code
        assert sorted(status for status, _ in told) == [200, 503]
        assert server.stderr.read() == ""
        with pytest.raises(OSError, match="refused"):
            ask(at, {"prompt": "abc"})


def test_a_long_answer_does_not_hold_the_end_up() -> None:
    with process("127.0.0.1", "0", "0.3") as server:
        assert server.stderr is not None
        at = server.stderr.readline().split()[-1]
        stream = client(at).completions.create(model="scripted", prompt="abc", max_tokens=400, stream=True)
        assert next(iter(stream)).choices[0].text == "abca"
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.wait(10) == 143
        assert time.monotonic() - began < 5


def test_a_long_segment_does_not_either() -> None:
    with process("127.0.0.1", "0", "0.1", "60") as server:
        assert server.stderr is not None
        at = server.stderr.readline().split()[-1]
        stream = client(at).completions.create(model="scripted", prompt="abc", max_tokens=400, stream=True)
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 143
        assert server.stderr.read() == ""


def test_a_taken_port_is_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with process("127.0.0.1", str(port), "1") as server:
            out, err = server.communicate(timeout=20)
        assert server.returncode == 2
        assert out == ""
        assert re.fullmatch(
            rf"error: --host 127\.0\.0\.1 --port {port}: .*[Aa]ddress already in use.*\n", err
        )
        with pytest.raises(ConfigError, match="already in use"):
            serve(ScriptedWriter(), "127.0.0.1", port)
    for host, wrong in (("127.0.0.1", 70000), ("127.0.0.1", -1), ("not a host", 0), ("x" * 70 + ".", 0)):
        with pytest.raises(ConfigError, match=f"--port {wrong}"):
            listen(host, wrong)


@pytest.mark.parametrize(("key", "warned"), [(None, True), ("secret", False)])
def test_beyond_loopback(
    key: str | None, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from search.switching.serving import server

    begun: list[tuple[Any, Any]] = []

    class Nothing(server.Server):
        def run(self, sockets: Any = None) -> None:
            middleware = self._app.user_middleware[0].kwargs
            begun.append((middleware["hosts"], middleware["api_key"]))

    monkeypatch.setattr(server, "Server", Nothing)
    monkeypatch.delenv("MERGEFRONT_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("MERGEFRONT_API_KEY", key)
    with caplog.at_level("WARNING", "mergefront"):
        serve(ScriptedWriter(), "0.0.0.0", 0)
        assert ("no authentication" in caplog.text) == warned
        caplog.clear()
        serve(ScriptedWriter(), "127.0.0.1", 0)
        assert caplog.text == ""
    assert begun[0] == (None, key)
    assert begun[1] == ({"localhost", "127.0.0.1", "[::1]"}, key)


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="body_bytes is 0"):
        Limits(body_bytes=0)
    with pytest.raises(ConfigError, match="waiting is -1"):
        Limits(waiting=-1)
    assert Limits(waiting=0).waiting == 0
