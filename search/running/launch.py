"""Creating a study in a storage, and opening it again from there: what is frozen, and what must not have changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from search import __version__
from search.checkpoints.local_parents import LocalParents
from search.config.study_file import StudyConfig, differences
from search.errors import ConfigError, StorageError
from search.running.problem import Materials
from search.storage.database import exclusive, shown, sqlite_path
from search.storage.frozen import STUDY_SCHEMA, _stored_config, check_identity, moved_config
from search.storage.store import StudyStore


def create(
    config: StudyConfig,
    url: str,
    device: str = "auto",
    *,
    fresh: bool = False,
    materials: Materials | None = None,
    local_parents: Path | None = None,
    **options: Any,
) -> tuple[StudyStore, Materials]:
    """Creates the study, or opens it to continue if it exists with the same config.

    Args:
        fresh: refuse a study that exists already.
        materials: those of the config, opened before.
        local_parents: where copies of the parents are read from (`local_parents`); they are made if they are not there.

    Raises:
        ConfigError: the study exists with another config, or `fresh` and it exists, or its engine follows gradients
            and this model has none.
    """
    if materials is None:
        local = _local(local_parents, _begun(url, config.name) if local_parents else None)
        materials = Materials.open(config, device, local)
    if config.sampler.follows_gradients:
        _ = materials.gradient  # a model without one is refused now, not after the baselines
    _ = materials.preferences, materials.equivalence  # so is a model that judges answers and does not load
    objectives = [(metric.name, metric.maximize) for metric in materials.metrics]
    store = StudyStore.create(url, config.name, objectives, **options)
    with store.exclusive():
        stored = store.attribute("config")
        if stored is None:
            store.set_attribute("schema", STUDY_SCHEMA)
            store.set_attribute("version", __version__)
            store.set_attribute("objectives", [[name, maximize] for name, maximize in objectives])
            store.set_attribute("identity", materials.identity)
            store.set_attribute("facts", _facts(materials))
            store.set_attribute("trials", config.trials)
            store.set_attribute("tokens", config.tokens)
            store.set_attribute("config", config.to_json())  # last: its presence says that the study is whole
            return store, materials
    if fresh:
        raise ConfigError(
            f"{shown(url)}: study '{config.name}' exists. Leave out --fresh to continue it, or rename it."
        )
    changed = differences(_stored_config(store, stored), config)
    if changed:
        raise ConfigError(
            f"study '{config.name}' exists with another config: {'; '.join(changed[:6])}. "
            "Rename the study, or take the changes back."
        )
    check_identity(store, materials.identity)
    with store.exclusive():
        stored = store.attribute("config")
        if _stored_config(store, stored).tokens != config.tokens:  # else what `resume --tokens` gave stays
            store.set_attribute("tokens", config.tokens)
        if stored != config.to_json():
            # Places may have moved: other workers and `export` look where this file says.
            store.set_attribute("config", config.to_json())
    return store, materials


def reopen(
    url: str,
    name: str,
    device: str = "auto",
    overrides: Sequence[str] = (),
    *,
    local_parents: Path | None = None,
    **options: Any,
) -> tuple[StudyStore, Materials]:
    """Opens an existing study from its storage alone.

    Args:
        overrides: new places of parents and tasks (`parents.pre=...`), should they have moved.
        local_parents: as for `create`.

    Raises:
        StorageError: no such study. ConfigError: what lies at the places is not what the study began with.
    """
    store = StudyStore.open(url, name, **options)
    materials = Materials.open(moved_config(store, overrides), device, _local(local_parents, store))
    check_identity(store, materials.identity)
    return store, materials


def _local(root: Path | None, store: StudyStore | None) -> LocalParents | None:
    """Copies of the parents below `root`; of those that the study began with, if it did."""
    if root is None:
        return None
    facts = None if store is None else store.attribute("facts")
    known = {label: str(one["sha256"]) for label, one in facts["parents"].items()} if facts else {}
    return LocalParents(root, known)


def _begun(url: str, name: str) -> StudyStore | None:
    """The study, if another worker made it before; what is wrong with the storage is said when it is opened to stay."""
    path = sqlite_path(url)
    if path is not None and not path.exists():
        return None
    with suppress(StorageError), exclusive(url):  # it may be in the making
        return StudyStore.find(url, name)
    return None


def _facts(materials: Materials) -> dict[str, Any]:
    """What front, report and export must know without opening the parents."""
    return {
        "groups": [[group.name, len(group.tensors)] for group in materials.space.groups],
        "baselines": len(materials.baselines),
        "tasks": list(materials.questions.task_names),
        "questions": {"search": len(materials.questions.search), "report": len(materials.questions.report)},
        "prompts": materials.prompts
        and {"search": len(materials.prompts.search), "report": len(materials.prompts.report)},
        "parameters": materials.parents.parameters,
        "notes": materials.notes,
        "parents": materials.provenance(),
    }
