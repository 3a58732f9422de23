"""Creating a study in a storage, and opening it again from there: what is frozen, and what must not have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from search import __version__
from search.config import StudyConfig, apply_overrides, differences, parse_study
from search.database import exclusive, shown, sqlite_path
from search.errors import ConfigError, StorageError
from search.materials import Materials
from search.merging.local_parents import LocalParents
from search.storage import StudyStore

STUDY_SCHEMA = 1


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


def read_config(url: str, name: str) -> StudyConfig | None:
    """The frozen config of a study that may not exist yet."""
    try:
        return stored_config(StudyStore.open(url, name))
    except StorageError:
        return None


def stored_config(store: StudyStore) -> StudyConfig:
    """The frozen config of a study."""
    return _stored_config(store, store.attribute("config"))


def moved_config(store: StudyStore, overrides: Sequence[str]) -> StudyConfig:
    """The frozen config of a study, with new places of parents and tasks.

    Raises:
        ConfigError: an override names anything else than a place.
    """
    stored = stored_config(store)
    value = stored.to_json()
    apply_overrides(value, overrides)
    config = parse_study(value, f"study '{store.name}'")
    changed = differences(stored, config)
    if config.trials != stored.trials:
        changed = ["trials (give --trials instead)"]
    if config.tokens != stored.tokens:
        changed = ["tokens (give --tokens instead)"]
    if changed:
        raise ConfigError(f"study '{store.name}': only places may be set when resuming, found {changed[0]}.")
    return config


def _stored_config(store: StudyStore, value: object) -> StudyConfig:
    if value is None:
        raise StorageError(
            f"{shown(store.url)}: study '{store.name}' was never launched to its end. Launch it again."
        )
    schema = store.attribute("schema")
    if schema != STUDY_SCHEMA:
        raise StorageError(
            f"{shown(store.url)}: study '{store.name}' has schema {schema}, this mergefront reads {STUDY_SCHEMA}. "
            "Use the version that wrote it."
        )
    return parse_study(value, f"{shown(store.url)}: study '{store.name}'")


def check_identity(store: StudyStore, found: Mapping[str, str]) -> None:
    """Compares digests of parents, questions or groups with those that the study began with.

    Raises:
        ConfigError: one differs.
    """
    began = store.attribute("identity")
    for what, digest in found.items():
        if began.get(what) != digest:
            raise ConfigError(
                f"study '{store.name}': {what} changed since it began (sha256 {str(began.get(what))[:12]} -> "
                f"{digest[:12]}). Restore them, name their place (--set parents.pre=FOLDER), or rename the study."
            )


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
