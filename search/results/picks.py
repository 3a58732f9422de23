"""Choosing one point of a front, on the search split only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from search.errors import ConfigError
from search.front import best, knee, prefer
from search.results.board import Board, Row

_CALIBRATION = ("ece", "mce", "brier", "nll")


def pick(board: Board, selection: str) -> Row:
    """The row that a selection names.

    Args:
        selection: `knee`, `best-accuracy`, `best-calibration`, `best-METRIC` (an objective of the study), `trial:N`,
            or `prefer:accuracy=0.7,ece=0.3` (how much the front's whole range of each objective is worth).

    Raises:
        ConfigError: no such selection, objective or trial.
    """
    names = [name for name, _ in board.objectives]
    if selection == "knee":
        return _chosen(board, lambda points: knee(points, maximise=board.maximize))
    if selection.startswith("trial:"):
        number = selection.removeprefix("trial:")
        if not number.isdigit():
            raise ConfigError(f"--select {selection}: wanted trial:N, such as trial:17.")
        return board.row(int(number))
    if selection.startswith("prefer:"):
        weights = _preferences(selection, names)
        return _chosen(board, lambda points: prefer(points, weights, maximise=board.maximize))
    if selection.startswith("best-"):
        objective = _objective(selection, names)
        return _chosen(board, lambda points: best(points, objective, maximise=board.maximize))
    if selection in (arm.label for arm in board.arms):
        raise ConfigError(
            f"--select {selection}: is no trial and has no recipe, but is another way to use the checkpoints together "
            "(switch compare). Choose knee, best-accuracy, best-calibration or trial:N."
        )
    raise ConfigError(
        f"--select {selection}: wanted knee, best-accuracy, best-calibration, trial:N or prefer:{names[0]}=0.7,..."
    )


def named_picks(board: Board) -> dict[str, Row]:
    """The picks that tables and pictures point out: the best of each objective, and the knee."""
    picks = {f"best {name}": pick(board, f"best-{name}") for name, _ in board.objectives}
    return {**picks, "knee": pick(board, "knee")}


def _chosen(board: Board, choose: Callable[[NDArray[np.float64]], int]) -> Row:
    front = board.front
    return front[choose(board.points(front, "search"))]


def _objective(selection: str, names: list[str]) -> int:
    wanted = selection.removeprefix("best-")
    if wanted == "calibration":
        for index, name in enumerate(names):
            if name.partition(":")[0].partition("@")[0] in _CALIBRATION:
                return index
        raise ConfigError(
            f"--select {selection}: no objective measures calibration (found {', '.join(names)})."
        )
    if wanted not in names:
        raise ConfigError(f"--select {selection}: '{wanted}' is no objective (found {', '.join(names)}).")
    return names.index(wanted)


def _preferences(selection: str, names: list[str]) -> list[float]:
    weights = dict.fromkeys(names, 0.0)
    for part in selection.removeprefix("prefer:").split(","):
        name, _, number = part.partition("=")
        if name.strip() not in weights:
            raise ConfigError(
                f"--select {selection}: '{name.strip()}' is no objective (found {', '.join(names)})."
            )
        try:
            weights[name.strip()] = float(number)
        except ValueError as error:
            raise ConfigError(
                f"--select {selection}: found '{part}', wanted such as {names[0]}=0.7."
            ) from error
    return list(weights.values())
