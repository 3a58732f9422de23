"""What a recipe scored, and the memory of it that studies of one process share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """Values in the order of the objectives and what is stored beside them; of a stopped trial, estimates of them."""

    values: Sequence[float]
    attributes: Mapping[str, Any]
    stopped: bool = False


@dataclass
class Memory:
    """What recipes scored, for several studies that one process runs on the same problem in one storage.

    Attributes:
        search: recipe -> its result, tokens included: a trial counts what it would have taken.
        report: recipe -> evidence of its answers and of its diversity on the report split.

    Both ask for the folder of the evidence, too: a study finds its own there.
    """

    search: dict[tuple[Path, str], Result] = field(default_factory=dict)
    report: dict[tuple[Path, str], tuple[str, str | None]] = field(default_factory=dict)
