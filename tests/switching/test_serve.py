"""`mergefront switch serve`, the real thing: a process over a trained folder, asked by OpenAI's own client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from search.errors import ConfigError
from search.switching.command import serve_folder
from search.switching.folder import open_switcher
from search.switching.serving import server
from search.switching.writer import Piece, SwitchWriter
from tests.pico_switch import run, write_switch_study
from tests.serving_writer import ScriptedWriter, serving
from tests.switching.test_serving import ask, client, error

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_switch_study(tmp_path_factory.mktemp("turns"))


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-c",
        "from search.cli.main import main; main()",
        "switch",
        "serve",
        str(folder),
    ]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    """Where it serves, as it says once it does."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.fullmatch(r"serving turns at (http://127\.0\.0\.1:\d+/v1)\n", line):
            return found[1]
    raise AssertionError(said)


def test_a_trained_switcher_is_served(place: Path) -> None:
    with started(place / "switcher") as process:
        at = address(process)
        asked = client(at)
        (model,) = asked.models.list().data
        assert (model.id, model.model_extra) == ("turns", {"max_model_len": 512})
        _text(asked, place)
        _chat(asked)
        _refused(at)
        assert ask(at, {"prompt": "abc", "max_tokens": 3})[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        assert process.stderr is not None
        assert "resume" not in process.stderr.read()


def _text(asked: openai.OpenAI, place: Path) -> None:
    """What a writer in this process writes, whole and streamed."""
    options: dict[str, Any] = {"model": "turns", "prompt": "Letter 3?", "max_tokens": 20, "seed": 3}
    whole = asked.completions.create(**options)
    writer = SwitchWriter(open_switcher(place / "switcher"), "turns")
    drawn: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    pieces = list(writer.write(writer.encode("Letter 3?"), **drawn))
    assert whole.choices[0].text == "".join(piece.text for piece in pieces)
    assert whole.choices[0].finish_reason == pieces[-1].finish
    authors = [[piece.author, piece.tokens] for piece in pieces]
    assert whole.choices[0].model_extra == {"mergefront": {"authors": authors}}
    assert {name for name, _ in authors} <= {"pre", "sft", "dpo"}
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(tokens for _, tokens in authors)
    chunks = list(asked.completions.create(**options, stream=True))
    assert len(chunks) == len(pieces) + 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == pieces[-1].finish


def _chat(asked: openai.OpenAI) -> None:
    whole = asked.chat.completions.create(model="turns", messages=HELLO, seed=5)
    content = whole.choices[0].message.content
    assert content
    assert whole.usage is not None
    assert whole.usage.prompt_tokens + whole.usage.completion_tokens <= 512 + 1
    stream = asked.chat.completions.create(model="turns", messages=HELLO, seed=5, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == content
    assert chunks[-1].finish_reason == whole.choices[0].finish_reason
    authors = [one for chunk in chunks for one in chunk.model_extra["mergefront"]["authors"]]  # type: ignore[index]
    assert whole.choices[0].model_extra == {"mergefront": {"authors": authors}}


def _refused(at: str) -> None:
    long = {"messages": [{"role": "user", "content": "p" * 600}]}
    for path, body, param, code in (
        ("chat/", long, "messages", "context_length_exceeded"),
        ("chat/", {"messages": HELLO, "max_tokens": 501}, "messages", "context_length_exceeded"),
        ("", {"prompt": "p" * 500, "max_tokens": 13}, "prompt", "context_length_exceeded"),
        ("", {"prompt": 5}, "prompt", None),
        ("", {"prompt": "a", "temperature": "hot"}, "temperature", None),
        ("", b"{", None, "invalid_json"),
    ):
        assert error(ask(at, body, f"/v1/{path}completions")) == (400, param, code), body


@pytest.mark.slow
def test_a_switcher_that_is_asked_in_text_answers_default_chats(place: Path) -> None:
    """It reads marks beside the text, so that less than the context can be written."""
    options = ["--set", "switching.switcher=lora", "--set", "switching.lora.epochs=1"]
    run(place, "train", "study.yaml", "--out", "asked", *options)
    with started(place / "asked") as process:
        at = address(process)
        asked = client(at)
        for seed in range(3):
            found = asked.chat.completions.create(model="turns", messages=HELLO, seed=seed)
            assert found.choices[0].finish_reason in ("stop", "length")
        assert asked.completions.create(model="turns", prompt="abc").choices[0].text is not None
        room = SwitchWriter(open_switcher(place / "asked"), "turns").room((5,) * 100)
        assert 0 < room < 100
        options_: dict[str, Any] = {"model": "turns", "prompt": "p" * 100}
        assert asked.completions.create(**options_, max_tokens=room).choices[0].finish_reason
        with pytest.raises(openai.BadRequestError, match=f"{room} fit") as caught:
            asked.completions.create(**options_, max_tokens=room + 1)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(openai.BadRequestError, match="no room for an answer"):
            asked.completions.create(model="turns", prompt="p" * 490)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert "resume" not in process.stderr.read()


def test_a_signal_while_models_load(place: Path) -> None:
    program = (
        "import time, sys; import search.switching.command as c; "
        "c.open_switcher = lambda *a: (print('loading', file=sys.stderr, flush=True), time.sleep(60)); "
        "from search.cli.main import main; main()"
    )
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = [sys.executable, "-c", program, "switch", "serve", str(place / "switcher"), "--port", "0"]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "loading\n"
            process.send_signal(number)
            assert process.wait(20) == code
            assert process.stderr.read() == ""


def test_a_taken_port_shows_before_models_are_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("models were loaded")

    monkeypatch.setattr("search.switching.command.open_switcher", loaded)
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on"):
            serve_folder(place / "switcher", "127.0.0.1", port, None, (), "cpu")


def test_what_the_writer_refuses_is_the_clients_to_mend() -> None:
    """Before its first piece; later it is a failure, whatever it is called."""

    class Picky(ScriptedWriter):
        def write(self, prompt: tuple[int, ...], **options: Any) -> Iterator[Piece]:
            if options["max_new_tokens"] == 7:
                raise ConfigError("closing: 13 tokens (wanted fewer).")
            yield from super().write(prompt, **options)

    writer = Picky()
    with serving(writer) as at:
        for stream in (False, True):
            found = ask(at, {"prompt": "abc", "max_tokens": 7, "stream": stream})
            assert error(found) == (400, None, None)
            assert "wanted fewer" in found[1]["error"]["message"]
        writer.fail = ConfigError("too late")
        assert error(ask(at, {"prompt": "abc"}))[0] == 500
        writer.fail = None
        assert ask(at, {"prompt": "abc", "max_tokens": 5})[1]["choices"][0]["text"] == "abcab"
