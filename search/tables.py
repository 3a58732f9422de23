"""The front as a table for a terminal, with parents, uniform line and intervals, and what to make of it."""

from __future__ import annotations

from collections.abc import Sequence

from search.board import Board, Cell, Row, Split
from search.picks import named_picks

ARROWS = {True: "up", False: "down"}


def front_table(board: Board, split: str | None = None) -> str:
    """Front, parents and uniform line on one split (`report` once it is scored), and three lines of reading."""
    scored = any(row.report for row in board.rows)
    shown: Split = "report" if split == "report" or (split is None and scored) else "search"
    if shown == "report" and not scored:
        return (
            f"study '{board.study}': the report split is scored when the search is complete. Resume it first."
        )
    metrics = _metrics(board, shown)
    notes = _notes(board)
    rows = [*board.front, *(row for row in board.uniform_line() if not row.front)]
    if shown == "report":
        rows = [row for row in rows if row.report]
    header = ["trial", "", *(f"{name} {ARROWS[up]}" if up is not None else name for name, up in metrics), ""]
    body = [
        [
            str(row.trial),
            _label(row),
            *(_cell(row.on(shown).get(name), interval=up is not None) for name, up in metrics),
            notes.get(row.trial, ""),
        ]
        for row in rows
    ]
    lines = [f"{board.study}: {shown} split, {board.questions[shown]} questions, 95 % intervals", ""]
    lines += _aligned([header, *body])
    return "\n".join([*lines, "", *_reading(board, shown)])


def _metrics(board: Board, split: Split) -> list[tuple[str, bool | None]]:
    known = dict(board.objectives)
    extra = [] if split == "search" else [name for name in ("brier", "nll", "auroc") if name not in known]
    return [*board.objectives, *((name, None) for name in extra)]


def _label(row: Row) -> str:
    label = "" if row.kind == "search" else row.label
    return f"{label} *".strip() if row.front else label


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


def _reading(board: Board, split: Split) -> list[str]:
    volume = board.hypervolume[split]
    front, line = board.front, board.uniform_line()
    searched = sum(row.kind == "search" for row in front)
    lines = [
        f"* on the front, chosen on the search split ({len(front)} of {len(board.rows)} trials, "
        f"{searched} from the search)",
        f"hypervolume {volume.front:.4f}, uniform line ({len(line)} points) {volume.uniform:.4f}: "
        f"gain {volume.gain.value:+.4f} [{volume.gain.low:+.4f}, {volume.gain.high:+.4f}]{_ratio(board, split)}",
    ]
    if volume.gain.high < 0:
        lines.append("here the uniform line is better: what was chosen on the search split does not hold up")
    elif volume.gain.low <= 0:
        lines.append("the gain over the uniform line is within the noise of these questions")
    if split == "report":
        both = [row for row in front if row.kind == "search" and _beats_parents(board, row)]
        if both:
            names = ", ".join(str(row.trial) for row in both[:8])
            lines.append(
                f"better than both parents in every objective, beyond their 95 % intervals: trial {names}"
            )
    return lines


def _ratio(board: Board, split: Split) -> str:
    volume = board.hypervolume[split]
    return f" ({volume.front / volume.uniform:.2f} times)" if volume.uniform > 0 else ""


def _beats_parents(board: Board, row: Row) -> bool:
    """Whether every paired difference to both parents is on the good side with its whole interval."""
    return bool(row.against) and all(
        (cells[name].low > 0 if maximize else cells[name].high < 0)
        for cells in row.against.values()
        for name, maximize in board.objectives
    )
