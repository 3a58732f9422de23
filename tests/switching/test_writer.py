"""Answers of a trained switcher, a piece at a time: how long, by whom, and where they end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.errors import ConfigError
from search.switching.asked_switcher import Asking
from search.switching.folder import Opened, open_switcher
from search.switching.learned import AskedBrain
from search.switching.writer import Piece, SwitchWriter
from tests.pico import pico_model
from tests.pico_switch import run, write_switch_study

DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_switch_study(tmp_path_factory.mktemp("turns"))


@pytest.fixture(scope="module")
def opened(place: Path) -> Opened:
    return open_switcher(place / "switcher")


def changed(opened: Opened, *, asked: bool = False, **values: Any) -> SwitchWriter:
    """A writer of the same models: other turns, or other values of switcher.json."""
    about = opened.about
    known = set(type(about.switching).model_fields)
    turns = {key: value for key, value in values.items() if key in known}
    rest = {key: value for key, value in values.items() if key not in known}
    about = about.model_copy(update={"switching": about.switching.model_copy(update=turns), **rest})
    brain = AskedBrain(opened.models["dpo"], "dpo") if asked else opened.brain
    return SwitchWriter(replace(opened, about=about, brain=brain), "turns")


def said(writer: SwitchWriter, prompt: Any, n: int, seed: int = 0, **options: Any) -> list[Piece]:
    chat = not isinstance(prompt, str)
    tokens = writer.encode(prompt)
    return list(writer.write(tokens, max_new_tokens=n, seed=seed, chat=chat, **DRAWN, **options))


@pytest.mark.parametrize("segment", [1, 7, 25, 200])
@pytest.mark.parametrize("size", [1, 60, 300, 470])
def test_the_room_of_a_switcher_that_reads_marks(opened: Opened, segment: int, size: int) -> None:
    """As many tokens as `room` says can be written, and not one more."""
    writer = changed(opened, asked=True, segment=segment)
    prompt = (5,) * size
    room = writer.room(prompt)
    assert room < writer.context - size
    asking = Asking.of(opened.tokenizer, 3, segment)
    most = [n for n in range(1, 512 - size + 1) if _read(asking, size, n) <= 512]
    assert room == max(most, default=0)
    if room:
        next(writer.write(prompt, max_new_tokens=room, seed=0, **DRAWN))
    with pytest.raises(ConfigError, match=f"{size} tokens leave room for {room} new ones"):
        next(writer.write(prompt, max_new_tokens=room + 1, seed=0, **DRAWN))


def _read(asking: Asking, size: int, new: int) -> int:
    """Tokens of prompt, answer in whole segments and one begun, marks and question."""
    marks = max(len(one) + len(other) for one, other in zip(asking.begins, asking.ends, strict=True))
    pieces = new // min(asking.segment, new) + 1
    return size + new + pieces * marks + len(asking.question)


def test_the_room_of_a_classifier_is_the_context(opened: Opened) -> None:
    writer = SwitchWriter(opened, "turns")
    assert [writer.room((5,) * n) for n in (1, 511, 512, 600)] == [511, 1, 0, 0]
    assert len(list(writer.write((5,) * 500, max_new_tokens=12, seed=0, **DRAWN))) >= 1


def test_short_answers_leave_the_closing_text_out(opened: Opened) -> None:
    closing = "So it is now:"
    generate = opened.about.generate.model_copy(update={"max_new_tokens": 40})
    rules: dict[str, Any] = {"first": "sft", "last": "dpo", "closing": closing, "segment": 8}
    writer = changed(opened, generate=generate, **rules)
    for n in range(1, 45):
        turns = writer.fitting(n)
        assert turns.closing == (closing if n >= 13 + 8 else "")
        assert (turns.first, turns.last, turns.segment) == ("sft", "dpo", min(8, n))
        pieces = said(writer, "Letter 1?", n)
        assert pieces[-1].finish is not None
        assert (closing in "".join(piece.text for piece in pieces)) == (n >= 21)
    assert {piece.author for piece in said(writer, "Letter 1?", 5)} == {"dpo"}
    # What the study itself did is done, however little it left.
    tight = generate.model_copy(update={"max_new_tokens": 15})
    assert changed(opened, generate=tight, **rules).fitting(15).closing == closing
    assert changed(opened, generate=tight, **rules).fitting(14).closing == ""


def test_who_writes_nothing_is_named(opened: Opened) -> None:
    writer = changed(opened, first="pre", segment=3)
    silent = 0
    for seed in range(60):
        pieces = said(writer, "Letter 1?", 9, seed)
        assert pieces[0].author == "pre"
        silent += pieces[0].text == ""
    assert silent > 0, "somebody must end an answer at once"


def test_an_answer_ends_in_the_text_that_is_put_in(opened: Opened) -> None:
    writer = changed(opened, last="dpo", closing="So: no", segment=4)
    whole = "".join(piece.text for piece in said(writer, "Letter 1?", 30, seed=2))
    assert "So: no" in whole
    pieces = said(writer, "Letter 1?", 30, seed=2, stop=("o: n",))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index("o: n")]
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert (pieces[-1].author, pieces[-1].tokens) == ("dpo", 0)


def test_what_ends_answers_to_questions_does_not_end_chats(opened: Opened) -> None:
    letters = list("abcdefghijklmnopqrstuvwxyz")

    def shorter(*, chat_study: bool, prompt: Any) -> bool:
        free = changed(opened, chat_template=chat_study, until=[])
        ending = changed(opened, chat_template=chat_study, until=letters)
        return any(said(free, prompt, 20, seed) != said(ending, prompt, 20, seed) for seed in range(3))

    assert not shorter(chat_study=False, prompt=HELLO)
    assert shorter(chat_study=True, prompt=HELLO)
    assert shorter(chat_study=False, prompt="Letter 1?")


def test_prompts_are_messages_if_the_studys_were(place: Path, tmp_path: Path) -> None:
    asked = ("generate", "--prompt", "Letter 3?", "--seed", "4", "--max-new-tokens", "30", "--json")

    def text(folder: str, *options: str) -> str:
        return str(json.loads(run(place, asked[0], folder, *asked[1:], *options))["text"])

    plain, chat = text("switcher", "--no-chat"), text("switcher", "--chat")
    assert text("switcher") == plain != chat
    options = ("--set", "tasks.0.chat_template=true", "--set", "switching.rollouts.completions=12")
    run(place, "train", "study.yaml", *options, "--out", str(tmp_path / "chat"))
    assert text(str(tmp_path / "chat")) == text(str(tmp_path / "chat"), "--chat")
    assert text(str(tmp_path / "chat")) != text(str(tmp_path / "chat"), "--no-chat")


def test_a_model_with_less_context_bounds_the_room(opened: Opened) -> None:
    small = pico_model("llama", 0, max_position_embeddings=128)
    writer = SwitchWriter(replace(opened, brain=AskedBrain(small, "small")), "turns")
    room = writer.room((5,) * 10)
    assert 0 < room < 118
    next(writer.write((5,) * 10, max_new_tokens=room, seed=0, **DRAWN))
