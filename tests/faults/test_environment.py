"""Interpreters that drop assertions or know no UTF-8: the same errors and the same exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.pico import save_pico
from tests.pico_study import write_study

pytestmark = pytest.mark.fault(30)

ENVIRONMENTS = {
    "optimized": {"PYTHONOPTIMIZE": "1"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict", "PYTHONUTF8": "0"},
}
ENVIRONMENT = pytest.mark.parametrize("name", ENVIRONMENTS)


def mergefront(folder: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "search.cli.main", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "COLUMNS": "100", **ENVIRONMENTS.get(name, {})}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose file and questions have names beyond ASCII, beside damaged copies of it."""
    folder = tmp_path_factory.mktemp("größe")
    study = write_study(folder, trials=1, tasks=[{"path": "./fragen-\u6f22.jsonl"}])
    (folder / "questions.jsonl").rename(folder / "fragen-\u6f22.jsonl")
    text = study.read_text(encoding="utf-8")
    (folder / "wrong.yaml").write_text(text.replace("trials: 1", "trails: 1"), encoding="utf-8")
    (folder / "name.yaml").write_text(text.replace("name: pico", "name: größe"), encoding="utf-8")
    (folder / "latin.yaml").write_bytes(text.replace("pico", "größe").encode("latin-1", "replace"))
    save_pico(folder / "weit-\u00e4", intermediate_size=96)
    (folder / "pickled").mkdir()
    (folder / "pickled/config.json").write_text('{"model_type": "llama"}')
    (folder / "pickled/pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return folder


LIGHT = [
    ("launch", "none-ö.yaml"),
    ("launch", "wrong.yaml"),
    ("launch", "name.yaml"),
    ("launch", "latin.yaml"),
    ("status", "none"),
]
HEAVY = [
    ("launch", "study.yaml", "--set", "parents.post=./weit-ä"),
    ("launch", "study.yaml", "--set", "parents.post=./pickled"),
]


def _seen(folder: Path, name: str, arguments: tuple[str, ...]) -> tuple[int, bytes]:
    result = mergefront(folder, name, *arguments)
    assert b"Traceback" not in result.stderr
    assert result.stdout == b""
    return result.returncode, result.stderr


@cache
def _usual(folder: Path, arguments: tuple[str, ...]) -> tuple[int, str]:
    code, said = _seen(folder, "", arguments)
    return code, said.decode()


def _same_error(folder: Path, name: str, arguments: tuple[str, ...]) -> None:
    """Exit code and line are those of a usual interpreter, but for letters that the stream cannot show.

    In an ASCII locale a name of the command line is bytes, which Python keeps as halves of surrogate pairs.
    """
    code, said = _usual(folder, arguments)
    if name == "ascii" and "ö" in arguments[1]:
        said = said.replace("ö", r"\udcc3\udcb6")
    encoding = {"ascii": "ascii", "latin-1": "latin-1"}.get(name, "utf-8")
    assert _seen(folder, name, arguments) == (code, said.encode(encoding, "backslashreplace"))
    assert code in (2, 3, 4)


def test_an_error_is_the_same_in_an_ascii_locale(folder: Path) -> None:
    _same_error(folder, "ascii", LIGHT[1])


@pytest.mark.slow
@ENVIRONMENT
def test_errors_are_the_same(name: str, folder: Path) -> None:
    for arguments in [*LIGHT, *(HEAVY if name == "optimized" else ())]:
        _same_error(folder, name, arguments)


@pytest.mark.slow
def test_names_that_a_locale_cannot_write_are_an_error_of_one_line(folder: Path, tmp_path: Path) -> None:
    """The folder's name on the command line, and the name of a file within the study file."""
    result = mergefront(tmp_path, "ascii", "launch", folder / "study.yaml")
    assert result.returncode == 2
    assert b"is no text in this locale. Run under a UTF-8 one" in result.stderr
    study = write_study(tmp_path / "plain", trials=1, tasks=[{"path": "./fragen-\u6f22.jsonl"}])
    (tmp_path / "plain/questions.jsonl").rename(tmp_path / "plain/fragen-\u6f22.jsonl")
    result = mergefront(tmp_path, "ascii", "launch", study)
    assert (result.returncode, result.stderr.count(b"\n")) == (2, 1)
    assert b"defect" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimized", "latin-1"])
def test_a_study_runs_and_is_shown(name: str, folder: Path, tmp_path: Path) -> None:
    """A task named beyond ASCII reaches stdout whatever that can show; the front is the same, byte for byte."""
    for arguments in (("launch", folder / "study.yaml"), ("check", folder / "study.yaml")):
        result = mergefront(tmp_path, name, *arguments)
        assert result.returncode == 0, result.stderr
    front = mergefront(tmp_path, name, "front", "pico", "--format", "json")
    assert front.returncode == 0
    _usual_front(folder, tmp_path, front.stdout)


_FRONTS: list[bytes] = []


def _usual_front(folder: Path, tmp_path: Path, found: bytes) -> None:
    if not _FRONTS:
        (tmp_path / "usual").mkdir()
        assert mergefront(tmp_path / "usual", "", "launch", folder / "study.yaml").returncode == 0
        _FRONTS.append(mergefront(tmp_path / "usual", "", "front", "pico", "--format", "json").stdout)
    assert found == _FRONTS[0]
