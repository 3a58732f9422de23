"""A comparison as a table in Markdown, which a terminal shows as well."""

from __future__ import annotations

from collections.abc import Sequence

from search.results.compare.standings import Standing, Standings
from search.results.intervals import Cell


def comparison_table(found: Standings) -> str:
    """Entrants with hypervolumes, ratios and the winner's curse, what they must beat, and how to read it."""
    aims = ", ".join(f"{name} {'up' if maximize else 'down'}" for name, maximize in found.objectives)
    reach = [f"HV at {tokens / found.evaluation:.0f}x" for tokens in found.checkpoints[:-1]]
    curses = [f"curse, {name}" for name, _ in found.objectives]
    header = ["engine", "seeds", "trials", "HV search", *reach, "HV report", "smallest to largest"]
    header += ["more than the line", "times the line", "times a temperature", *curses]
    lines = [
        f"{found.study}: {aims}; {found.budget:,} scored tokens each "
        f"({found.budget / found.evaluation:.0f} evaluations of the search split)",
        "",
        *_markdown([header, *(_row(one, found) for one in found.standings)]),
        "",
        *_markdown(_rivals(found)),
        "",
        f"HV: hypervolume x 1000 of the front, chosen on the {found.questions['search']:,} questions of the search "
        "split, over the corner",
        f"of the parents' worst values; on the {found.questions['report']:,} questions of the report split unless it "
        "says search. [ ]: 95 % bootstrap",
        "intervals over questions and seeds. The line: the uniform line at the same budget; times is '-' where a "
        "resample leaves it",
        "no hypervolume. Times a temperature: of the front with post + temperature, over post + temperature alone. "
        "Curse: how much",
        "better the front looked on the search split than on the report split, beyond what parents and uniform line "
        "did.",
    ]
    return "\n".join(lines)


def _row(one: Standing, found: Standings) -> list[str]:
    low, high = one.spread
    cells = [one.label, str(one.seeds), f"{one.trials:.0f}", _thousandths(one.search[-1])]
    cells += [_thousandths(value) for value in one.at[:-1]]
    cells += [_volume(one.report), f"{_thousandths(low)} to {_thousandths(high)}"]
    cells += [_more(one.gain), _times(one.over_line), _times(one.over_temperature)]
    return cells + [
        f"{one.optimism[name]:+.4f}" if name in one.optimism else "-" for name, _ in found.objectives
    ]


def _rivals(found: Standings) -> list[list[str]]:
    names = [name for name, _ in found.objectives]
    rows = [["without a search", "HV report", *names]]
    for one in found.rivals:
        rows.append(
            [
                one.label,
                _volume(one.report),
                *(_plain(one.values[n]) if n in one.values else "-" for n in names),
            ]
        )
    return rows


def _thousandths(value: float) -> str:
    return f"{1000 * value:.2f}"


def _volume(cell: Cell) -> str:
    return f"{_thousandths(cell.value)} [{_thousandths(cell.low)}, {_thousandths(cell.high)}]"


def _more(cell: Cell) -> str:
    return f"{1000 * cell.value:+.2f} [{1000 * cell.low:+.2f}, {1000 * cell.high:+.2f}]"


def _times(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]"


def _plain(cell: Cell) -> str:
    return f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(3, *(len(row[j]) for row in rows)) for j in range(len(rows[0]))]
    lines = [f"| {' | '.join(text.ljust(w) for text, w in zip(row, widths, strict=True))} |" for row in rows]
    return [lines[0], f"|{'|'.join('-' * (w + 2) for w in widths)}|", *lines[1:]]
