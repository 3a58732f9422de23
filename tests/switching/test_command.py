"""`mergefront switch`: from a study file to a switcher's folder, and what is done with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from search.errors import ConfigError, ExportError, IncompatibleModelsError, MergefrontError
from search.switching.folder import open_switcher, read_switcher
from search.switching.writer import Piece, SwitchWriter
from tests.pico import save_experts
from tests.pico_switch import run, write_switch_study


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_switch_study(tmp_path_factory.mktemp("turns"))


def test_training_says_what_was_tried_and_is_stored(place: Path) -> None:
    again = run(place, "train", "study.yaml", "--out", "again")
    assert "30 traces of 30 questions; 0 questions now (0 tokens), 30 were stored" in again
    assert "nats" in again
    names = ("switcher.json", "classifier.safetensors", "README.md")
    for name in names:
        assert (place / "again" / name).read_bytes() == (place / "switcher" / name).read_bytes()
    card = (place / "switcher" / "README.md").read_text()
    assert "| sft |" in card
    assert "{{" not in card


@pytest.mark.slow
def test_a_killed_training_goes_on(place: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "-m", "search.cli.main", "switch", "train", str(place / "study.yaml")]
    command = [sys.executable, "-c", "from search.cli.main import main; main()", *command[3:]]
    options = [
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(work),
        "--set",
        "switching.rollouts.completions=64",
    ]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "rollouts of" in line:  # the first piece is stored
                os.kill(process.pid, signal.SIGKILL)
                break
    assert not (tmp_path / "out").exists()
    assert len(list(work.glob("rollouts-*"))) == 1
    resumed = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "14 questions now" in resumed.stdout
    assert "16 were stored" in resumed.stdout
    fresh = [*options[:3], str(tmp_path / "fresh"), *options[4:]]
    fresh[1] = str(tmp_path / "other")
    subprocess.run([*command, *fresh], capture_output=True, check=True)
    for name in ("classifier.safetensors", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_answers_and_who_wrote_them(place: Path) -> None:
    text = run(place, "generate", "switcher", "--prompt", "Letter 3?", "--prompt", "Letter 3?", "--seed", "4")
    one, two = text.split("\n")[:2]
    assert one == two
    lines = run(place, "generate", "switcher", "--prompt", "Letter 3?", "--seed", "4", "--json")
    found = json.loads(lines)
    assert "".join(segment["text"] for segment in found["segments"]) == found["text"]
    assert found["text"].split("\n")[0] == one
    assert {segment["author"] for segment in found["segments"]} <= {"pre", "sft", "dpo"}
    (place / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    assert run(place, "generate", "switcher", "--prompts", "prompts.jsonl", "--chat", "--max-new-tokens", "1")


def test_a_piece_never_takes_back_what_was_said(place: Path) -> None:
    """However an answer is cut into pieces: joined they are the whole, without the text that ends it."""
    opened = open_switcher(place / "switcher")
    writer = SwitchWriter(opened, "turns")
    drawn = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0}
    whole = "".join(p.text for p in writer.write(writer.encode("Letter 1?"), seed=3, **drawn))  # type: ignore[arg-type]
    assert len(whole) > 8
    for stop in (whole[5:8], whole[4], whole[6:7] + "~"):
        pieces: list[Piece] = list(
            writer.write(writer.encode("Letter 1?"), seed=3, stop=(stop,), **drawn)  # type: ignore[arg-type]
        )
        text = "".join(piece.text for piece in pieces)
        assert stop not in text
        assert text == whole[: whole.find(stop) if stop in whole else None]
        assert [piece.finish is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    chat = writer.encode([{"role": "user", "content": "Hi"}])
    assert "userHi" in opened.tokenizer.decode(chat).replace("<unk>", "")
    with pytest.raises(ConfigError, match="the candidates' context"):
        list(writer.write((5,) * 500, seed=0, **drawn))  # type: ignore[arg-type]


def test_the_table_of_all_arms(place: Path) -> None:
    found = json.loads(run(place, "compare", "study.yaml", "--switcher", "switcher", "--json"))
    labels = [arm["label"] for arm in found["arms"]]
    wanted = [
        "random switching",
        "switch",
        "untrained switcher",
        "router",
        "refine",
        "logit average",
        "contrastive",
    ]
    assert labels[:10] == ["pre", "sft", "dpo", *wanted]
    assert labels[-2:] == ["candidates in turn", "best candidate per question"]
    assert found["questions"] == 30
    single = next(arm for arm in found["arms"] if arm["label"] == "sft")
    assert single["tokens"] == 1.0
    average = next(arm for arm in found["arms"] if arm["label"] == "logit average")
    assert average["tokens"] == 3.0
    for arm in found["arms"]:
        assert 0.0 <= arm["accuracy"]["low"] <= arm["accuracy"]["value"] <= arm["accuracy"]["high"] <= 1.0
    text = run(place, "compare", "study.yaml", "--switcher", "switcher", "--arm", "router")
    assert "logit average" not in text
    assert "95 % bootstrap intervals" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("switching.segment=7", "at most max_new_tokens, 6"),
        ("switching.host=post", "switching.host: found 'post', wanted one of the parents: pre, sft, dpo"),
        ("switching.first=post", "switching.first: found 'post'"),
        ("switching.wait=So", None),
        ("switching.rollouts.cut=[0.9, 0.1]", "cut: found"),
        ("switching.closing=So", "say who writes it"),
        ("tasks.0.format=continuation", "needs written answers"),
        ("switching=", "has no section switching"),
        ("switching.margin=0.99", "nothing to learn"),
        ("switching.sgment=3", "Did you mean 'segment'"),
    ],
)
def test_study_files_that_do_not_fit(place: Path, tmp_path: Path, override: str, said: str | None) -> None:
    arguments = ["train", "study.yaml", "--out", str(tmp_path / "out"), "--set", override]
    if override.startswith("tasks"):
        arguments += ["--set", "tasks.0.generate="]
    if said is None:
        run(place, *arguments)
        return
    with pytest.raises(MergefrontError, match=said.replace("(", r"\(")):
        run(place, *arguments)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_what_they_were(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists"):
        run(place, "train", "study.yaml", "--out", "switcher")
    broken = shutil.copytree(place / "switcher", tmp_path / "broken")
    (broken / "switcher.json").write_text((broken / "switcher.json").read_text().replace('"dpo"', '"dpx"'))
    with pytest.raises(ExportError, match="was changed"):
        read_switcher(broken)
    with pytest.raises(ExportError, match=r"no manifest\.json"):
        run(place, "generate", str(place / "pre"), "--prompt", "x")
    with pytest.raises(ConfigError, match="no such candidate"):
        run(place, "generate", "switcher", "--prompt", "x", "--candidate", "post=pre")
    with pytest.raises(ConfigError, match="wanted NAME=DIR"):
        run(place, "generate", "switcher", "--prompt", "x", "--candidate", "post")
    with pytest.raises(ConfigError, match="there is none"):
        run(place, "generate", "switcher")
    other = save_experts(tmp_path / "others", ["one", "two", "sft"])
    with pytest.raises(IncompatibleModelsError, match=r"sft: is not the one that .* was trained with"):
        run(place, "generate", "switcher", "--prompt", "x", "--candidate", f"sft={other['sft']}")
    moved = shutil.copytree(place / "sft", tmp_path / "moved")
    assert run(place, "generate", "switcher", "--prompt", "x", "--candidate", f"sft={moved}")


def test_a_switcher_does_not_make_another_study(place: Path) -> None:
    """The section says nothing about merges: a study that was launched without it goes on with it."""
    from search.config.study_file import differences, load_study_file

    with_it = load_study_file(place / "study.yaml")
    without = load_study_file(place / "study.yaml", ["switching="])
    assert differences(without, with_it) == []
    assert np.array_equal(with_it.parents.places, without.parents.places)
