"""Shipping trials: a mergekit config that rebuilds them bit for bit, a model card, and with weights a checkpoint.

OUT/trial-00017/  mergekit_config.yml  recipe.yaml  README.md  model/ (with weights)  manifest.json (written last)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from search import __version__
from search.checkpoints.parents import Parents
from search.config.study_file import StudyConfig
from search.errors import ExportError
from search.export.model_card import model_card
from search.merging.mergekit_config import (
    CONFIG,
    caveats,
    config_text,
    natural,
    number,
    parent_places,
    quoted,
    rebuild_command,
    rebuild_header,
)
from search.merging.save import check_saved, save_checkpoint, size_of
from search.merging.space import CoefficientSpace
from search.recipe import Recipe
from search.results.board import Board, Row
from search.running.problem import blend_of, groups_digest, make_space, provenance
from search.storage.database import sqlite_path
from search.storage.frozen import check_identity, moved_config
from search.storage.manifest import MANIFEST, write_manifest
from search.storage.postgresql import server_url, without_secrets
from search.storage.staging import check_space, locked_folder, staged_folder
from search.storage.store import StudyStore

logger = logging.getLogger("mergefront")

RECIPE, CARD, MODEL = "recipe.yaml", "README.md", "model"
_SMALL = 2**20  # bytes: config, recipe, card and manifest are less


def export_rows(
    store: StudyStore,
    board: Board,
    rows: Sequence[Row],
    out: Path,
    *,
    weights: bool,
    overwrite: bool,
    overrides: Sequence[str],
) -> list[Path]:
    """Writes one folder a trial; returns the folders. Each is whole or absent, whatever happens.

    Args:
        weights: also write checkpoints, whose headers are read back and compared with the parents.
        overwrite: replace earlier exports of these trials.
        overrides: new places of the parents (`parents.pre=...`), should they have moved.

    Raises:
        ExportError: a folder exists, `out` is no folder, or the merge cannot be written as a mergekit config.
        DiskError: no space or no permission. ConfigError: the parents are not those of the study.
    """
    finals = [out / f"trial-{row.trial:05d}" for row in rows]
    _check_targets(finals, overwrite)
    shipment = _Shipment.open(store, board, overrides)
    for final in finals:
        shipment.check_not_inside(final)
    with locked_folder(out):
        _check_targets(finals, overwrite)  # again: another export may have held the folder until now
        check_space(out, len(rows) * (_SMALL + (size_of(shipment.parents, shipment.dtype) if weights else 0)))
        for row, final in zip(rows, finals, strict=True):
            with staged_folder(final, overwrite=overwrite) as staging:
                shipment.write(row, staging, weights=weights)
            logger.info("%s: %s", final, _said(shipment, weights))
    return finals


@dataclass(frozen=True)
class _Shipment:
    """A study opened for export: its parents, without its questions."""

    store: StudyStore
    board: Board
    config: StudyConfig
    parents: Parents
    space: CoefficientSpace
    dtype: torch.dtype

    @classmethod
    def open(cls, store: StudyStore, board: Board, overrides: Sequence[str]) -> _Shipment:
        config = moved_config(store, overrides)
        # Their values were read when the study began; equal digests say that they are still the same.
        parents = Parents.open(config.parents.pre, config.parents.post_trained, check_values=False)
        space = make_space(config, parents)
        check_identity(store, {"parents": parents.digest, "groups": groups_digest(space)})
        return cls(store, board, config, parents, space, getattr(torch, config.merge.dtype))

    def check_not_inside(self, final: Path) -> None:
        """An export must not replace the parents it is made from."""
        for one in self.parents.everybody:
            if one.folder.is_relative_to(final.resolve()):
                raise ExportError(f"{final}: holds a parent of the study ({one.folder}). Give another --out.")

    def write(self, row: Row, folder: Path, *, weights: bool) -> None:
        recipe = Recipe(row.method, row.coefficients)
        blend = blend_of(self.config, self.parents, self.space, recipe)
        blend = blend.in_order(natural(blend.weights))
        origin = provenance(self.config, self.parents)
        places = parent_places(self.parents, origin)
        if weights:
            (folder / MODEL).mkdir()
            save_checkpoint(self.parents, blend, self.dtype, folder / MODEL)
            check_saved(folder / MODEL, self.parents, self.dtype)
        header = [
            f"The weights of trial {row.trial} of study {self.board.study}: a {row.method} merge of {len(places)} "
            "checkpoints.",
            f"Coefficients by group: {RECIPE}. A filter is a part of a tensor's name; the first that matches counts.",
            *rebuild_header(self.parents, blend, origin),
        ]
        config = config_text(self.parents, blend, places, self.config.merge.dtype, header)
        card = model_card(
            self.board,
            row,
            parents=origin,
            places=places,
            tensors={group.name: len(group.tensors) for group in self.space.groups},
            tasks=self.store.attribute("facts")["tasks"],
            dtype=self.config.merge.dtype,
            recipe=recipe.key,
            weights=weights,
            caveats=caveats(self.parents, blend),
            rebuild=rebuild_command(blend),
            options=self.space.options(recipe),
        )
        _write(folder / CONFIG, config)
        _write(folder / RECIPE, self._recipe_text(row, recipe))
        _write(folder / CARD, card)
        if weights:
            _write(folder / MODEL / CARD, card)  # a hub looks for it beside the weights
        write_manifest(folder, self._facts(row, recipe, origin, weights))

    def _recipe_text(self, row: Row, recipe: Recipe) -> str:
        single = len(self.space.experts) == 1
        lines = [
            f"# 0 is pre, 1 is {'post' if single else 'the expert'}; all tensors of a group share its coefficient.",
            f"study: {quoted(self.board.study)}",
            f"trial: {row.trial}",
            f"kind: {row.kind}",
            f"method: {row.method}",
            f"dtype: {self.config.merge.dtype}",
            f"recipe: {recipe.key}",
            *(f"{name}: {number(value)}" for name, value in self.space.options(recipe).items()),
            "groups:",
        ]
        names = self.space.coefficients
        for place, group in enumerate(self.space.groups):
            values = [number(row.coefficients[name]) for name in names[place :: len(self.space.groups)]]
            each = ", ".join(f"{one}: {v}" for one, v in zip(self.space.experts, values, strict=True))
            text = f"coefficient: {values[0]}" if single else f"coefficients: {{{each}}}"
            lines.append(f"  {quoted(group.name)}: {{{text}, tensors: {len(group.tensors)}}}")
        return "\n".join(lines) + "\n"

    def _facts(
        self, row: Row, recipe: Recipe, origin: dict[str, dict[str, str | None]], weights: bool
    ) -> dict[str, Any]:
        record = next(record for record in self.store.trials() if record.number == row.trial)
        return {
            "mergefront": __version__,
            "study": self.board.study,
            "storage": portable_url(self.store.url),
            "trial": row.trial,
            "kind": row.kind,
            "recipe": recipe.key,
            "method": row.method,
            "dtype": self.config.merge.dtype,
            "parents": origin,
            "parents_digest": self.parents.digest,
            "evidence": {
                "search": record.attributes["evidence"],
                "report": self.store.attribute(f"report:{row.trial}"),
            },
            "weights": weights,
        }


def portable_url(url: str) -> str:
    """The storage's URL as it may be written down: SQLite with an absolute path, a server without password."""
    path = sqlite_path(url)
    if path is not None:
        return f"sqlite:///{path.absolute()}"
    # `set` cannot take a password away, so the URL is put together without it.
    return without_secrets(server_url(url))._replace(password=None).render_as_string(hide_password=False)


def _check_targets(finals: Sequence[Path], overwrite: bool) -> None:
    for final in finals:
        if not final.exists() and not final.is_symlink():
            continue
        if not overwrite:
            raise ExportError(f"{final}: exists. Give another --out, or --overwrite to replace it.")
        if final.is_symlink() or not (final / MANIFEST).is_file():
            raise ExportError(
                f"{final}: is not an export of mergefront, so it is not replaced. Remove it yourself."
            )


def _said(shipment: _Shipment, weights: bool) -> str:
    if not weights:
        return "merge config; no weights were written"
    count = len(shipment.parents.names)
    return f"checkpoint read back, {count} tensors as in the parents; mergefront verify scores it again"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
