"""The README.md of an export: a model card with front matter that a hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from objectives.printable import shown
from search import __version__
from search.merging.baselines import UNCHOSEN
from search.merging.groups import split_name
from search.merging.mergekit_config import MERGEKIT, number
from search.results.board import SPLITS, Board, Row
from search.results.intervals import Cell

_TITLES = {"search": "Search split (it steered the search)", "report": "Report split (it steered nothing)"}


def model_card(
    board: Board,
    row: Row,
    *,
    parents: Mapping[str, Mapping[str, str | None]],
    places: Sequence[str],
    tensors: Mapping[str, int],
    tasks: Sequence[str],
    dtype: str,
    recipe: str,
    weights: bool,
    caveats: Sequence[str],
    rebuild: str,
    options: Mapping[str, float],
) -> str:
    """Markdown of the card.

    Args:
        parents: where, revision, sha256 and licence of every parent by name, pre first.
        places: of the parents in this order, as in the mergekit config.
        tensors: how many tensors each group has.
        recipe: the recipe's key.
        weights: whether the folder has a checkpoint.
        rebuild: the command with which mergekit makes the same weights.
        options: hyper-parameters of the method, searched or fixed.
    """
    licences = [facts["licence"] for facts in parents.values()]
    return render(
        "model_card.md.j2",
        base_models=[place.partition("@")[0] for place in places if not place.startswith("/")],
        licence=licences[0] if len(set(licences)) == 1 else None,
        licences=licences_said(licences),
        study=board.study,
        label=row.label if row.label.startswith("trial") else f"trial {row.trial} ({row.label})",
        method=row.method,
        searched=row.kind not in UNCHOSEN,
        dtype=dtype,
        objectives=" and ".join(f"{name} ({'up' if up else 'down'})" for name, up in board.objectives),
        parents=[_parent(name, facts) for name, facts in parents.items()],
        splits=[_split(board, row, split, tasks) for split in SPLITS],
        groups=[
            {"name": cell_text(name), "coefficient": number(value), "tensors": tensors[split_name(name)[1]]}
            for name, value in row.coefficients.items()
            if split_name(name)[1] in tensors
        ],
        weights=weights,
        mergekit=MERGEKIT,
        caveats=caveats,
        rebuild=rebuild,
        options=[(name, number(value)) for name, value in options.items()],
        command=f"mergefront export {board.study} --select trial:{row.trial}{' --weights' * weights} --out DIR",
        version=__version__,
        recipe=recipe,
    )


def render(template: str, **facts: Any) -> str:
    """A Markdown file from a template of this package; every name in it must be given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(template).render(**facts)


def licences_said(licences: Sequence[str | None]) -> str:
    """What the licences of several models mean for what is made of them."""
    if None in licences:
        return "A parent's card names no licence: find it out before you share this merge."
    if len(set(licences)) > 1:
        return "The parents' licences differ: a merge has to keep all of them."
    return "The merge keeps the licence of its parents."


def _parent(name: str, facts: Mapping[str, str | None]) -> dict[str, str]:
    return {
        "name": name,
        "where": cell_text(facts["where"] or ""),
        "revision": cell_text(facts["revision"] or "-"),
        "sha256": facts["sha256"] or "-",
        "licence": cell_text(facts["licence"] or "unknown"),
    }


def _split(board: Board, row: Row, split: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """Columns: this merge, the parents, and where known the paired differences to them."""
    others = [other for other in board.parents if other.trial != row.trial]
    against = row.against if split == "report" else {}
    columns = ["this merge", *(f"`{o.label}`" for o in others), *(f"this minus `{name}`" for name in against)]
    arrows = {name: " (up)" if up else " (down)" for name, up in board.objectives}
    rows = [
        [
            _text(name) + arrows.get(name, ""),
            _score(cell),
            *(_score(other.on(split).get(name)) for other in others),
            *(_score(cells.get(name), sign="+") for cells in against.values()),
        ]
        for name, cell in row.on(split).items()
    ]
    return {
        "title": _TITLES[split],
        "questions": board.questions[split],
        "tasks": f" of {', '.join(map(_text, tasks))}",
        "columns": columns,
        "rows": rows,
    }


def _score(cell: Cell | None, sign: str = "") -> str:
    return "-" if cell is None else f"{cell.value:{sign}.4f} [{cell.low:{sign}.4f}, {cell.high:{sign}.4f}]"


def _text(name: str) -> str:
    """A name of a task or an objective; one that Markdown might read as more than text stands in a code span."""
    return name if re.fullmatch(r"[A-Za-z0-9_.:@-]+", name) else f"`{cell_text(name)}`"


def cell_text(text: str) -> str:
    """Text of a path or a name, fit for a code span in a table cell."""
    return shown(text).replace("`", "'").replace("|", "\\|")
