"""Where parents came from, as exports, manifests and model cards say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from search.checkpoints.parents import Parents


def origins(places: Mapping[str, str], parents: Parents) -> dict[str, dict[str, str | None]]:
    """Where each parent came from, what exactly it is, and under which licence its own card puts it.

    Args:
        places: what was given for each parent, by its label.
    """
    found: dict[str, dict[str, str | None]] = {}
    for label, one, revision in zip(parents.labels, parents.everybody, parents.revisions, strict=True):
        licence = _licence(one.folder / "README.md")
        found[label] = {
            "where": places[label],
            "revision": revision,
            "sha256": parents.sha256_of(label),
            "licence": licence,
        }
    return found


def _licence(card: Path) -> str | None:
    """The `license:` of a model card's front matter."""
    try:
        head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return None
    match = re.match(r"---\n(?:.*\n)*?license:\s*['\"]?([\w.+-]+)", head)
    return match[1] if match else None
