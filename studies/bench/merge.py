"""How long one merge takes, as a multiple of a memory copy of the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

from timing import Ratio, take_turns

from search.merging.blend import make_blend
from search.merging.live import LiveModel


@dataclass(frozen=True)
class MergeTimes:
    """Seconds of merges and of copies of the same bytes, in turns; `size` in bytes."""

    merge: list[float]
    copy: list[float]
    size: int

    @property
    def ratio(self) -> Ratio:
        return Ratio.of(self.merge, self.copy)


def measure(live: LiveModel, method: str, repeats: int) -> MergeTimes:
    """Merges with another coefficient in every tensor, and copies of all parameters, `repeats` times each."""
    targets = list(live.model.parameters())
    sources = [target.clone() for target in targets]
    coefficients = {name: ((i * 7 % 19) / 19,) for i, name in enumerate(live.parents.names)}

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def merge() -> None:
        live.apply(make_blend(live.parents, coefficients, method))

    merge()  # maps the files' pages, and measures the angles of slerp
    copy()
    merges, copies = take_turns([merge, copy], repeats)
    return MergeTimes(merges, copies, sum(target.nbytes for target in targets))
