"""Arms on a study's board: other ways to use its checkpoints together than merging, on the same questions.

`mergefront switch compare` puts them there. An arm is no trial and has no recipe, so it is never on the front, picked
or exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from objectives.questions.questions import Split
from search.results.alternatives import SPLITS
from search.results.intervals import Cell

# What an arm is called, in the order of the board.
SWITCH, UNTRAINED, RANDOM, ROUTER, REFINE = (
    "switch",
    "untrained switcher",
    "random switching",
    "router",
    "refine",
)
AVERAGE, CONTRASTIVE, SOUP, DARE = "logit average", "contrastive", "greedy soup", "dare-ties"
ARMS = (SWITCH, UNTRAINED, RANDOM, ROUTER, REFINE, AVERAGE, CONTRASTIVE, SOUP, DARE)


def arm_key(label: str, split: Split) -> str:
    """Study attribute with what an arm wrote to a split: evidence, tokens, switcher; None once it was taken back."""
    return f"arm:{label}:{split}"


@dataclass(frozen=True)
class StoredArm:
    """What a study's attributes say about an arm.

    Attributes:
        evidence: digests of its answers by split.
        tokens: by split, of all its models, as a multiple of one model's that writes as much.
        switcher: SHA-256 of the `switcher.json` it used; None where it used none.
        setting: SHA-256 of the study file's rules of taking turns.
    """

    label: str
    evidence: Mapping[Split, str]
    tokens: Mapping[Split, float]
    switcher: str | None
    setting: str


def stored_arms(attributes: Mapping[str, Any]) -> Iterator[StoredArm]:
    """The arms of a study in the order of the board."""
    labels = {key.split(":")[1] for key in attributes if key.startswith("arm:")}
    known = [*(label for label in ARMS if label in labels), *sorted(labels - {*ARMS})]
    for label in known:
        found: dict[Split, dict[str, Any]] = {
            split: value for split in SPLITS if (value := attributes.get(arm_key(label, split)))
        }
        if found:
            one = next(iter(found.values()))
            yield StoredArm(
                label,
                {split: str(value["evidence"]) for split, value in found.items()},
                {split: float(value["tokens"]) for split, value in found.items()},
                one["switcher"],
                str(one["setting"]),
            )


@dataclass(frozen=True)
class Arm:
    """An arm as a row of the board, where it stands beside `search.results.board.Row`.

    Attributes:
        search, report: metrics by name; empty if it wrote nothing there.
        against: paired differences on the report split: this arm minus that parent.
        tokens: that all its models read and wrote, as a multiple of one model's that writes as much.
    """

    label: str
    search: Mapping[str, Cell]
    report: Mapping[str, Cell]
    tokens: float
    against: Mapping[str, Mapping[str, Cell]] = field(default_factory=dict)

    kind: ClassVar[str] = "alternative"
    trial: ClassVar[None] = None
    temperature: ClassVar[None] = None
    front: ClassVar[bool] = False

    def on(self, split: Split) -> Mapping[str, Cell]:
        return self.search if split == "search" else self.report

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "trial": None,
            "kind": self.kind,
            "label": self.label,
            "front": False,
            "recipe": None,
            "search": cells_to_json(self.search),
            "report": cells_to_json(self.report),
        }
        if self.against:
            shown["against"] = {other: cells_to_json(cells) for other, cells in self.against.items()}
        return {**shown, "tokens": self.tokens}


def cells_to_json(cells: Mapping[str, Cell]) -> dict[str, dict[str, float]]:
    """Cells by metric as plain JSON."""
    return {name: cell.to_json() for name, cell in cells.items()}
