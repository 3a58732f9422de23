"""What the make targets install: every package at its pinned version, every file by its hash."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKED = sorted((ROOT / ".ci" / "locked").glob("*.txt"))


def entries(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Name -> version and hashes of a file's packages."""
    found = {}
    for entry in re.sub(r" *\\\n +", " ", path.read_text()).splitlines()[1:]:
        name, rest = entry.split("==", 1)
        assert name not in found, entry
        found[name] = (rest.split()[0], re.findall(r"--hash=sha256:([0-9a-f]{64})(?= |$)", entry))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_locked_package_has_the_pinned_version_and_hashes() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    pinned = {normal(name): version for name, version in pairs}
    for path in LOCKED:
        for name, (version, hashes) in entries(path).items():
            assert hashes, f"{path.name}: {name} has no hash"
            assert pinned.get(normal(name)) == version, f"{path.name}: {name}"


def test_files_leave_out_what_make_installed_before_them_and_no_more() -> None:
    """Oracle: the Makefile's rules, such as `$(VENV)/.test: $(VENV)/.product .ci/locked/test.txt`."""
    rule = r"^\$\(VENV\)/\.(\w+): (?:\$\(VENV\)/\.(\w+)|pyproject\.toml) \.ci/locked/\1\.txt$"
    before = {
        name: parent or None for name, parent in re.findall(rule, (ROOT / "Makefile").read_text(), re.M)
    }
    files = runpy.run_path(str(ROOT / ".ci" / "lock.py"))["FILES"]
    assert before == {name: parent for name, (parent, *_) in files.items()}
    assert set(before) == {path.stem for path in LOCKED}
    locked = {path.stem: set(entries(path)) for path in LOCKED}
    for name in locked:
        parent = before[name]
        while parent is not None:
            assert not locked[name] & locked[parent], f"{name}.txt: stands in {parent}.txt, too"
            parent = before[parent]


def test_all_that_the_project_names_is_locked() -> None:
    """But torch, whose builds differ by hardware. Oracle: pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {path.stem: set(map(normal, entries(path))) for path in LOCKED}
    below = locked["product"] | {"torch"}

    def missing(requirements: list[str]) -> set[str]:
        return {normal(re.match(r"[\w.-]+", one)[0]) for one in requirements} - below  # type: ignore[index]

    assert not missing(project["dependencies"])
    for extra in ("test", "prepare", "bench", "audit"):
        below |= locked[extra]
        assert not missing(project["optional-dependencies"][extra])
