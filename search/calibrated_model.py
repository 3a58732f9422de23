"""A fitted temperature written into a checkpoint folder: `generation_config.json` and the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from objectives.calibrators.fitted import FittedTemperature
from search.errors import ExportError
from search.manifest import MANIFEST, write_manifest
from search.merging.checkpoint import read_json
from search.staging import disk_errors, locked_folder, staged_folder

CARD, GENERATION = "README.md", "generation_config.json"
_BEGIN, _END = "<!-- mergefront:calibration -->", "<!-- /mergefront:calibration -->"


def write_temperature(folder: Path, model: str, fitted: FittedTemperature, facts: Mapping[str, Any]) -> None:
    """Replaces a folder by one that carries the temperature; it is the old one or the new one, whatever happens.

    Weights are linked, not copied. A manifest, where there is one, is written anew.

    Args:
        folder: an export, or a checkpoint.
        model: the checkpoint's folder inside it; "." for the folder itself.
        facts: of the manifest, for an export; empty otherwise.

    Raises:
        ExportError: an unreadable `generation_config.json`. DiskError: no space or no permission.
    """
    folder = folder.resolve()
    generation = folder / model / GENERATION
    settings = read_json(generation) if generation.exists() else {}
    if not isinstance(settings, dict):
        raise ExportError(f"{generation}: is no JSON object. Restore it, or remove it.")
    settings |= {"do_sample": True, "temperature": fitted.temperature}
    with locked_folder(folder.parent), staged_folder(folder, overwrite=True) as staging:
        _link_tree(folder, staging)
        _replace(staging / model / GENERATION, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        cards = {staging / CARD, staging / model / CARD}
        for card in (path for path in cards if path.exists() or path.parent == staging / model):
            _replace(card, with_section(card.read_text(encoding="utf-8") if card.exists() else "", fitted))
        if facts:
            (staging / MANIFEST).unlink()
            kept = {key: value for key, value in facts.items() if key not in ("format", "files")}
            write_manifest(staging, {**kept, "calibration": fitted.to_json()})


def with_section(card: str, fitted: FittedTemperature) -> str:
    """A model card with the section on its temperature, in place of an earlier one.

    >>> text = with_section("# A model", FittedTemperature("daca", 2.0, 100, 90, 90))
    >>> with_section(text, FittedTemperature("daca", 2.0, 100, 90, 90)) == text
    True
    """
    lines = [
        "## Confidence temperature",
        "",
        f"`{GENERATION}` sets `temperature` to {fitted.temperature:.6g}, fitted by `{fitted.method}` on "
        f"{fitted.questions} questions"
        + (f", on {fitted.agreement} of which both models agree" if fitted.agreement is not None else "")
        + ".",
    ]
    if fitted.reason:
        lines += ["", f"Caution: {fitted.reason}."]
    lines += [
        "",
        "Inference engines divide next-token logits by this number when they sample. It is one knob for two things: "
        "above 1 it lowers confidences and makes sampled text more varied, below 1 it does the opposite. Greedy "
        "decoding and the order of single-token answers do not change. The number was fitted to the scores of whole "
        "options: for options of several tokens, dividing every token's logits is not the same.",
    ]
    section = "\n".join([_BEGIN, *lines, _END])
    found = re.search(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", card, re.DOTALL)
    if found:
        return card[: found.start()] + section + card[found.end() :]
    return f"{card.rstrip()}\n\n{section}\n".lstrip()


def _link_tree(source: Path, target: Path) -> None:
    for path, folders, files in os.walk(source):
        here = target / Path(path).relative_to(source)
        for name in folders:
            (here / name).mkdir()
        for name in files:
            try:
                os.link(Path(path) / name, here / name)
            except OSError:  # a file system without links
                shutil.copy2(Path(path) / name, here / name)


def _replace(path: Path, text: str) -> None:
    """Writes a new file in place of a linked one, whose content must stay."""
    with disk_errors(path):
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
