"""The front as a table for a terminal, with parents, uniform line and intervals, and what to make of it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from objectives.questions.questions import Split
from search.errors import ConfigError
from search.results.arms import Arm
from search.results.board import Board, Row
from search.results.intervals import Cell
from search.results.picks import named_picks
from search.results.remarks import read, report_is_scored

WIDTH = 110
ARROWS = {True: "up", False: "down"}


def front_table(board: Board, split: str | None = None) -> str:
    """Front, parents and uniform line on one split (`report` once it is scored), and what they say."""
    scored = report_is_scored(board)
    shown: Split = "report" if split == "report" or (split is None and scored) else "search"
    if shown == "report" and not scored:
        raise ConfigError(
            f"study '{board.study}': the report split is scored when the search is complete. Resume it first."
        )
    metrics = _metrics(board, shown)
    notes = _notes(board)
    rows: list[Row | Arm] = [*board.front, *(row for row in board.uniform_line() if not row.front)]
    rows += [*board.alternatives, *board.arms]
    header = ["trial", "", *(f"{name} {ARROWS[up]}" if up is not None else name for name, up in metrics), ""]
    body = [
        [
            "" if row.trial is None else str(row.trial),
            _label(row),
            *(_cell(row.on(shown).get(name), interval=up is not None) for name, up in metrics),
            _note(row, notes),
        ]
        for row in rows
    ]
    lines = [f"{board.study}: {shown} split, {board.questions[shown]} questions, 95 % intervals", ""]
    lines += _aligned([header, *body])
    said = [remark.text for remark in read(board, split=shown)]
    lines += [
        "",
        f"* on the front ({len(board.front)} of {len(board.rows)} trials), chosen on the search split",
    ]
    if board.arms:
        lines.append("no number: no merge, but another way to use the checkpoints together (switch compare)")
    return "\n".join([*lines, *(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in said)])


def _metrics(board: Board, split: Split) -> list[tuple[str, bool | None]]:
    known = dict(board.objectives)
    extra = [] if split == "search" else ["brier", "nll", "auroc"]
    extra += board.preferences
    return [*board.objectives, *((name, None) for name in extra if name not in known)]


def _label(row: Row | Arm) -> str:
    label = "" if row.kind == "search" else row.label
    return f"{label} *".strip() if row.front else label


def _note(row: Row | Arm, notes: dict[int, str]) -> str:
    if isinstance(row, Arm):
        return f"{row.tokens:.2f}x tokens"
    if row.kind == "alternative":
        return "" if row.temperature is None else f"temperature {row.temperature:.3g}"
    return notes.get(row.trial, "")


def _notes(board: Board) -> dict[int, str]:
    notes: dict[int, list[str]] = {}
    for name, row in named_picks(board).items():
        notes.setdefault(row.trial, []).append(name)
    return {trial: ", ".join(names) for trial, names in notes.items()}


def _cell(cell: Cell | None, *, interval: bool) -> str:
    if cell is None:
        return "-"
    return f"{cell.value:.3f}" + (f" [{cell.low:.3f}, {cell.high:.3f}]" if interval else "")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(w) if j == 0 else text.ljust(w)
            for j, (text, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
