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
from search.storage.files import read_json
from search.storage.manifest import MANIFEST, write_manifest
from search.storage.staging import disk_errors, lone_folder, write_whole

CARD, GENERATION = "README.md", "generation_config.json"
_BEGIN, _END = "<!-- mergefront:calibration -->", "<!-- /mergefront:calibration -->"


def write_into_export(folder: Path, model: str, fitted: FittedTemperature, facts: Mapping[str, Any]) -> None:
    """Replaces an export by one that carries the temperature, with a new manifest; weights are linked, not copied.

    Args:
        model: name of the checkpoint's folder inside it.
        facts: of its manifest.

    Raises:
        CheckpointError: an unreadable `generation_config.json`. DiskError: no space or no permission.
    """
    folder = folder.resolve()
    generation = _generation(folder / model, fitted)
    with lone_folder(folder, overwrite=True) as staging:
        _link_tree(folder, staging)
        write_whole(staging / model / GENERATION, generation)
        for card in (staging / CARD, staging / model / CARD):
            write_whole(card, _card(card, fitted))
        (staging / MANIFEST).unlink()
        kept = {key: value for key, value in facts.items() if key not in ("format", "files")}
        write_manifest(staging, {**kept, "calibration": fitted.to_json()})


def write_into_checkpoint(folder: Path, fitted: FittedTemperature) -> None:
    """Writes `generation_config.json` and the card of a checkpoint, each whole or not at all; nothing else is touched.

    Raises:
        CheckpointError: an unreadable `generation_config.json`. DiskError: no space or no permission.
    """
    generation = _generation(folder, fitted)
    with disk_errors(folder):
        write_whole(folder / GENERATION, generation)
        write_whole(folder / CARD, _card(folder / CARD, fitted))


def _generation(model: Path, fitted: FittedTemperature) -> bytes:
    path = model / GENERATION
    settings = read_json(path) if path.exists() else {}
    settings |= {"do_sample": True, "temperature": fitted.temperature}
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def _card(path: Path, fitted: FittedTemperature) -> bytes:
    return with_section(path.read_text(encoding="utf-8") if path.exists() else "", fitted).encode()


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
