"""The uniform line, ever finer: what the published method searches, as an engine to compare others with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from search.merging.space import UNIFORM_LINE
from search.samplers.engine import Engine, Proposal
from search.storage.trials import TrialRecord


class LineEngine(Engine):
    """One coefficient for all groups, spread evenly between the bounds at any time (see `Engine`).

    The points are the van der Corput sequence in base 2 over the bounds, both of which come first, without those that
    the baselines have. Coordinates in `neutral` stay there.
    """

    def __init__(
        self, groups: tuple[str, ...], bounds: tuple[float, float], neutral: Mapping[str, float]
    ) -> None:
        self._groups = groups
        self._bounds = bounds
        self._neutral = neutral

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`."""
        wanted = sum(record.kind == "search" for record in history)
        low, high = self._bounds
        place = 0
        while True:
            share = float(place) if place < 2 else van_der_corput(place - 1)
            coefficient = low + share * (high - low)
            if coefficient not in UNIFORM_LINE:
                if wanted == 0:
                    return Proposal(dict.fromkeys(self._groups, coefficient) | dict(self._neutral))
                wanted -= 1
            place += 1


def van_der_corput(index: int) -> float:
    """The `index`-th number, from 1 on, of the sequence that fills (0, 1) evenly: binary digits mirrored at the point.

    >>> [van_der_corput(i) for i in (1, 2, 3, 4)]
    [0.5, 0.25, 0.75, 0.125]
    """
    share, weight = 0.0, 0.5
    while index:
        index, digit = divmod(index, 2)
        share, weight = share + digit * weight, weight / 2
    return share
