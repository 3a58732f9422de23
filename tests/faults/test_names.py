"""Names that are not ours (folders, files, tasks) reach terminals, pages, cards and pictures as text, nothing else."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from objectives.printable import printable
from search.results.plots.reliability import Panel, reliability_figure
from search.results.plots.style import Picture, label, render_svg
from tests.conftest import Cli
from tests.pico import save_pair
from tests.pico_study import write_questions, write_study
from tests.results.test_report import answers

pytestmark = pytest.mark.fault(23)

ODD = "<b>\x1b[31m$x_{1$ \u202e|`\x07 \u6f22"  # markup, a colour, mathematics, direction, table and code marks, a bell


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def harmless(text: str) -> bool:
    """Whether a terminal that prints it does nothing but print."""
    return all(char.isprintable() or char in "\n\t" for char in text)


def test_a_mistyped_file_name_is_escaped(cli: Cli) -> None:
    code, _, err = cli("launch", "x\x1b[31m\ry.yaml")
    assert code == 2
    assert "\x1b" not in err
    assert "\\x1b[31m\\r" in err


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without the time that drawing takes."""
    monkeypatch.setattr("search.results.page.render", lambda figure: Picture(b"png", b"svg", 3.0))
    monkeypatch.setattr("search.results.page.render_svg", lambda figure: b"svg")


@pytest.mark.usefixtures("undrawn")
def test_a_study_of_odd_names_from_launch_to_export(cli: Cli, tmp_path: Path) -> None:
    """Oracle: no character of stdout, stderr, page or card is a control, and no tag of the page is the name's."""
    folder = tmp_path / ODD
    folder.mkdir()
    save_pair(folder)
    write_questions(folder / "questions.jsonl")
    write_questions(folder / f"{ODD}.jsonl", seed=1)
    study = write_study(
        folder, trials=2, tasks=[{"path": "./questions.jsonl", "name": "made-up"}, {"path": f"./{ODD}.jsonl"}]
    )
    outputs = {}
    for command in (
        ("check", study),
        ("launch", study, "--show-config"),
        ("launch", study),
        ("front", "pico"),
        ("front", "pico", "--format", "csv"),
        ("front", "pico", "--format", "json"),
        ("report", "pico", "--out", "page"),
        ("export", "pico", "--select", "knee", "--out", "out"),
    ):
        code, out, err = cli(*command)
        assert code == 0, err
        outputs[" ".join(map(str, command[:1] + command[3:]))] = out
        assert harmless(err), (command, err)
        assert harmless(out), (command, out)
    assert json.loads(outputs["front json"])["study"] == "pico"
    assert len(list(csv.reader(io.StringIO(outputs["front csv"])))) > 13
    page = Page(Path("page/report.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert harmless(page.text)
    assert "<b>\\x1b[31m$x_{1$ \\u202e|`\\x07" in page.text
    for card in Path("out").rglob("README.md"):
        text = card.read_text(encoding="utf-8")
        assert harmless(text)
        assert ODD[:3] in text
        assert ODD[:3] not in re.sub(r"`[^`\n]*`", "", text), "outside of a code span it is markup"


ODD_TEXT = "$\\frac{$ \x1b[31m \u202e \u6f22 \ud800 <b>&amp; " + "long " * 20


def test_any_text_can_be_drawn() -> None:
    figure = reliability_figure([Panel(ODD_TEXT, answers(np.array([0.5]), 30, 1))], where=ODD_TEXT)
    ET.fromstring(render_svg(figure))
    assert "\x1b" not in printable(ODD_TEXT)
    assert label("a$b") == r"a\$b"
