"""What the make targets install: every package at its pinned version, every file by its hash."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
    seen: set[str] = set()
    for path in LOCKED:
        for name, (version, hashes) in entries(path).items():
            assert hashes, f"{path.name}: {name} has no hash"
            assert pinned.get(normal(name)) == version, f"{path.name}: {name}"
            assert name not in seen, f"{path.name}: {name} stands in an earlier file, too"
            seen.add(name)


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
