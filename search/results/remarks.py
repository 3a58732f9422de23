"""What a study's numbers say, in sentences: no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from objectives.questions.questions import Split
from search.results.arms import SWITCH, Arm
from search.results.board import Board, Row
from search.results.picks import named_picks


@dataclass(frozen=True)
class Remark:
    """One sentence or two; `tone` is good, bad, or plain."""

    text: str
    tone: str = "plain"


def read(board: Board, failed: int = 0, split: Split | None = None) -> list[Remark]:
    """Remarks on a board, the most important first.

    Args:
        failed: number of trials that failed; they are on no board.
        split: which split to speak of; None takes the report split once it is scored.
    """
    scored = report_is_scored(board)
    split = split if split is not None and scored else "report" if scored else "search"
    remarks = [_gain(board, split)]
    if not scored:
        text = (
            "The report split is not scored yet. What follows is about the questions that steered the search, on "
            "which the front looks better than it is."
        )
        remarks.insert(0, Remark(text, "bad"))
    elif split == "report":
        remarks += [_parents(board), *_temperature(board), *_turns(board), *_shrinkage(board)]
    remarks += [*_neighbours(board, split), *_beside(board)]
    if board.stopped:
        were = "trial was" if board.stopped == 1 else "trials were"
        remarks.append(
            Remark(f"{board.stopped} {were} stopped early, before all questions were scored, and not shown.")
        )
    if failed:
        remarks.append(
            Remark(
                f"{failed} {_plural(failed, 'trial')} failed and {'is' if failed == 1 else 'are'} not shown."
            )
        )
    return remarks


def report_is_scored(board: Board) -> bool:
    """Whether the whole front and the whole uniform line have been scored on the report split."""
    return all(row.report for row in (*board.front, *board.uniform_line()))


def beats(row: Row | Arm, board: Board, parent: str, name: str) -> bool:
    """Whether the row is better than that parent in that objective with its whole paired interval (report)."""
    cell = row.against.get(parent, {}).get(name)
    return cell is not None and (cell.low > 0 if dict(board.objectives)[name] else cell.high < 0)


def _gain(board: Board, split: Split) -> Remark:
    volume = board.hypervolume[split]
    n = board.questions.get(split, 0)
    which = f"On the {n:,} questions of the {split} split" + (
        ", which the search never saw," if split == "report" else ""
    )
    numbers = (
        f"{which} the front's hypervolume is {volume.front:.4f} and the uniform line's {volume.uniform:.4f}: "
        f"a gain of {volume.gain.value:+.4f} "
        f"(95 % interval {volume.gain.low:+.4f} to {volume.gain.high:+.4f})."
    )
    if not board.of_kind("search"):
        return Remark(f"{numbers} There are no search trials yet.")
    if volume.gain.low > 0:
        return Remark(
            f"{numbers} The interval lies above zero: the search found more than the uniform line has.",
            "good",
        )
    if volume.gain.high < 0:
        return Remark(
            f"{numbers} The interval lies below zero: the uniform line is better than what was found.", "bad"
        )
    return Remark(
        f"{numbers} The interval holds zero: these questions cannot tell the search from the line.", "bad"
    )


def _parents(board: Board) -> Remark:
    names = [name for name, _ in board.objectives]
    searched = [row for row in board.front if row.kind == "search"]
    every = [
        row
        for row in searched
        if all(beats(row, board, p.label, name) for p in board.parents for name in names)
    ]
    if every:
        listed = ", ".join(str(row.trial) for row in every[:6]) + (", ..." if len(every) > 6 else "")
        return Remark(
            f"{len(every)} of the front's {len(searched)} search trials {'is' if len(every) == 1 else 'are'} "
            f"better than {_all_parents(board)} in every objective, beyond the paired 95 % intervals: "
            f"{_plural(len(every), 'trial')} {listed}.",
            "good",
        )
    return Remark(
        f"No search trial of the front is better than {_all_parents(board)} in every objective beyond the paired "
        "95 % intervals: what it shows against them is a trade."
    )


def _temperature(board: Board) -> list[Remark]:
    """Whether merging buys more than a temperature, which costs nothing and changes no answer."""
    posts = {row.trial for row in board.of_kind("post")}
    rivals = [row for row in board.alternatives if row.trial in posts and row.temperature and row.report]
    searched = [row for row in board.front if row.kind == "search" and row.report]
    if not rivals or not searched:
        return []
    said = []
    for rival in rivals:
        names = [name for name, _ in board.objectives if name in rival.report]
        scores = ", ".join(f"{name} {rival.report[name].value:.3f}" for name in names)
        wins = ", ".join(
            f"{sum(beats(row, board, rival.label, name) for row in searched)} in {name}" for name in names
        )
        every = sum(all(beats(row, board, rival.label, name) for name in names) for row in searched)
        said.append(
            f"{rival.label} has {scores}; of {len(searched)} search trials on the front {wins}, {every} in all"
        )
    return [
        Remark(
            "A temperature alone costs nothing and changes no answer. How many merges beat it beyond the paired 95 % "
            f"intervals: {'. '.join(said)}."
        )
    ]


def _turns(board: Board) -> list[Remark]:
    """How merges stand to a trained switcher, whose answers cost more tokens."""
    arm = next((arm for arm in board.arms if arm.label == SWITCH and arm.report), None)
    searched = [row for row in board.front if row.kind == "search" and row.report]
    if arm is None:
        return []
    names = [name for name, _ in board.objectives if name in arm.report]
    scores = ", ".join(f"{name} {arm.report[name].value:.3f}" for name in names)
    text = (
        f"Checkpoints that take turns (switch), at {arm.tokens:.2f} times the tokens of one, have {scores}."
    )
    if searched:
        wins = ", ".join(
            f"{sum(beats(row, board, SWITCH, name) for row in searched)} in {name}" for name in names
        )
        every = sum(all(beats(row, board, SWITCH, name) for name in names) for row in searched)
        text += (
            f" Of the front's search trials ({len(searched)}) these are better beyond the paired 95 % intervals: "
            f"{wins}, {every} in all."
        )
    return [Remark(text)]


def _shrinkage(board: Board) -> list[Remark]:
    """How the front changed from search to report split, beside the uniform line, which nobody chose."""
    searched = [row for row in board.front if row.kind == "search" and row.report]
    line = [row for row in board.uniform_line() if row.report]
    if not searched or not line:
        return []
    said = (
        f"{name} {_shift(searched, name):+.4f} (line {_shift(line, name):+.4f})"
        for name, _ in board.objectives
    )
    return [
        Remark(
            "From the search split to the report split the front's search trials changed on average by "
            f"{', '.join(said)}. Where they fare worse than the uniform line, which nobody chose, that is "
            "the winner's curse. Quote the report split."
        )
    ]


def _shift(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row.report[name].value - row.search[name].value for row in rows]))


def _neighbours(board: Board, split: Split) -> list[Remark]:
    front = [row for row in board.front if row.on(split)]
    pairs = list(pairwise(front))
    if not pairs:
        return [Remark("The front is a single point.")] if len(front) == 1 else []
    alike = sum(all(_overlap(a, b, split, name) for name, _ in board.objectives) for a, b in pairs)
    if not alike:
        return [Remark("Neighbouring points of the front differ beyond their 95 % intervals.", "good")]
    return [
        Remark(
            f"{alike} of {len(pairs)} neighbouring pairs on the front overlap in their 95 % intervals in every "
            "objective: read such points as one, and choose between them by other needs."
        )
    ]


def _overlap(a: Row, b: Row, split: Split, name: str) -> bool:
    one, other = a.on(split)[name], b.on(split)[name]
    return one.low <= other.high and other.low <= one.high


def _beside(board: Board) -> list[Remark]:
    """ECE alone can be gamed: what proper scores say about the knee."""
    knee = named_picks(board)["knee"]
    posts = board.of_kind("post")
    names = [
        name
        for name in ("brier", "nll", "auroc")
        if name not in dict(board.objectives) and name in knee.report
    ]
    if not names or not posts or not posts[0].report:
        return []
    said = [
        f"{name} {knee.report[name].value:.3f} (post {posts[0].report[name].value:.3f})" for name in names
    ]
    return [
        Remark(f"Beside the objectives, on the report split, the knee ({knee.label}) has {', '.join(said)}.")
    ]


def _all_parents(board: Board) -> str:
    return "both parents" if len(board.parents) == 2 else f"all {len(board.parents)} parents"


def _plural(n: int, word: str) -> str:
    return word if n == 1 else f"{word}s"
