"""A trained switcher as a folder: `switcher.json`, what was learned, a card and a manifest; whole or absent.

The candidates are not copied: the folder names them, and their digests are compared when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from objectives.printable import shown
from objectives.questions.config import GenerateConfig, Section
from search import __version__
from search.checkpoints.parents import Parents
from search.config.switching import SwitchingConfig
from search.errors import CheckpointError, ConfigError, ExportError, IncompatibleModelsError
from search.export.model_card import cell_text, licences_said, render
from search.running.problem import Problem
from search.storage.files import read_json
from search.storage.manifest import read_manifest, write_manifest
from search.storage.staging import lone_folder
from search.switching.candidates import Setting, load_candidates
from search.switching.learned import ADAPTER, AskedBrain, Brain, ClassifierBrain
from search.switching.train import Trained, switching_of

SWITCHER = "switcher.json"
FORMAT = "mergefront-switcher-1"
KIND = "switcher"  # in the manifest


class _Place(Section):
    where: str
    revision: str | None = None
    sha256: str
    licence: str | None = None


class SwitcherFile(Section):
    """`switcher.json`: who the candidates are, how they take turns, and how answers are drawn if nobody says otherwise.

    `chat_template` and `until` are those of the study's first written task.
    """

    format: str
    version: str
    study: str
    candidates: dict[str, _Place]
    dtype: str
    host: str
    switching: SwitchingConfig
    generate: GenerateConfig
    chat_template: bool
    until: list[str]
    training: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Opened:
    """A switcher folder with its candidates loaded.

    Attributes:
        models: by name, in the order of their indices.
    """

    about: SwitcherFile
    brain: Brain
    models: Mapping[str, Any]
    tokenizer: Any


def save_switcher(
    trained: Trained, problem: Problem, settings: list[Setting], out: Path, *, overwrite: bool = False
) -> Path:
    """Writes the folder of a trained switcher.

    Raises:
        ExportError: `out` exists. DiskError: it cannot be written.
    """
    lesson, first = trained.lesson, settings[0].task
    about = SwitcherFile(
        format=FORMAT,
        version=__version__,
        study=problem.config.name,
        candidates={name: _Place(**facts) for name, facts in problem.provenance().items()},  # type: ignore[arg-type]
        dtype=problem.config.merge.dtype,
        host=trained.host,
        switching=switching_of(problem),
        generate=first.generation,
        chat_template=first.chat_template,
        until=list(first.until),
        training={
            "questions": problem.questions.digest,
            "traces": len(lesson.starts),
            "clear": int(lesson.labels.kept.sum()),
            "labels": lesson.counts,
            "entropy": lesson.labels.entropy,
            "held_out": trained.held_out,
        },
    )
    with lone_folder(out, overwrite=overwrite) as staging:
        text = json.dumps(about.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (staging / SWITCHER).write_text(text + "\n", encoding="utf-8")
        trained.brain.save(staging)
        (staging / "README.md").write_text(_card(about), encoding="utf-8")
        write_manifest(staging, {"mergefront": __version__, "kind": KIND, "study": about.study})
    return out


def read_switcher(folder: Path) -> SwitcherFile:
    """What a switcher's folder says, compared with its manifest; nothing else is opened.

    Raises:
        ExportError: no such folder, a changed file, or one that does not say what it must.
    """
    if read_manifest(folder).get("kind") != KIND:
        raise ExportError(f"{folder}: holds no switcher. Give a folder that mergefront switch train made.")
    try:
        about = SwitcherFile.model_validate(read_json(folder / SWITCHER))
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        raise ExportError(f"{folder / SWITCHER}: {shown(key)}: {detail['msg']}. Train it again.") from error
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if about.format != FORMAT or about.host not in about.candidates:
        raise ExportError(f"{folder / SWITCHER}: is of another format, or names no host. Train it again.")
    return about


def read_brain(folder: Path, about: SwitcherFile, parents: Parents, device: str) -> Brain:
    """What was learned; `parents` are the candidates.

    Raises:
        ExportError, CheckpointError: it is broken, or does not fit them.
    """
    if about.switching.switcher == "lora":
        base = dict(zip(parents.labels, parents.everybody, strict=True))[about.host]
        return AskedBrain.load(folder / ADAPTER, base, about.dtype, device)
    brain = ClassifierBrain.load(folder, about.host)
    if len(brain.classifier.bias) != len(about.candidates):
        raise ExportError(f"{folder}: its classifier does not know as many candidates. Train it again.")
    return brain


def open_switcher(folder: Path, moved: Mapping[str, str] | None = None, device: str = "auto") -> Opened:
    """A switcher ready to write.

    Args:
        moved: places of candidates that lie elsewhere now, by name.

    Raises:
        ExportError: see `read_switcher`. ConfigError: `moved` names no candidate.
        CheckpointError, IncompatibleModelsError: a candidate cannot be read, or is not the one it was trained with.
    """
    from search.checkpoints.placement import choose_device

    about = read_switcher(folder)
    names = list(about.candidates)
    for name in moved or ():
        if name not in names:
            raise ConfigError(f"--candidate {name}: found no such candidate (wanted {', '.join(names)}).")
    places = {name: (moved or {}).get(name, facts.where) for name, facts in about.candidates.items()}
    pre, *others = names
    parents = Parents.open(places[pre], {name: places[name] for name in others})
    check_same(about, {name: parents.sha256_of(name) for name in names}, folder)
    where = choose_device(device)
    models = load_candidates(parents, about.dtype, where)
    return Opened(about, read_brain(folder, about, parents, where), models, parents.tokenizer())


def check_same(about: SwitcherFile, found: Mapping[str, str | None], folder: Path) -> None:
    """Compares the candidates that a switcher was trained with to those at hand.

    Args:
        found: SHA-256 of weights and config by name.

    Raises:
        IncompatibleModelsError: one is another, or they are others.
    """
    names = list(about.candidates)
    if list(found) != names:
        raise IncompatibleModelsError(
            f"{folder}: was trained with {', '.join(names)} (found {', '.join(found)}). Train one with these."
        )
    for name, facts in about.candidates.items():
        if found[name] != facts.sha256:
            raise IncompatibleModelsError(
                f"{name}: is not the one that {folder} was trained with (sha256 {str(found[name])[:16]}..., wanted "
                f"{facts.sha256[:16]}...). Give that one, or train again."
            )


def check_taught(about: SwitcherFile, problem: Problem, folder: Path) -> None:
    """Refuses a study of other questions, of which some may have taught the switcher, or with other turns.

    Raises:
        ConfigError: as above.
    """
    if about.training.get("questions") != problem.questions.digest:
        raise ConfigError(
            f"{folder}: was trained on the search split of other questions, or of another split (see tasks and split). "
            "Train one on these: its scores on report questions would be no proof."
        )
    trained, given = about.switching.turns, switching_of(problem).turns
    if trained != given:
        raise ConfigError(f"{folder}: was trained for {trained} (found {given}). Train one for these turns.")


def _card(about: SwitcherFile) -> str:
    """The README.md of the folder."""
    licences = [one.licence for one in about.candidates.values()]
    return render(
        "switcher_card.md.j2",
        about=about,
        host=about.host,
        candidates=[
            {
                "name": name,
                "where": cell_text(one.where),
                "revision": cell_text(one.revision or "-"),
                "sha256": one.sha256,
                "licence": cell_text(one.licence or "unknown"),
            }
            for name, one in about.candidates.items()
        ],
        licence=licences[0] if len(set(licences)) == 1 else None,
        licences=licences_said(licences),
        training=about.training,
        version=__version__,
    )
