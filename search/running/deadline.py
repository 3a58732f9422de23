"""A trial's time limit, looked at between batches: nothing is interrupted within a computation."""

from __future__ import annotations

import time
from collections.abc import Callable

from search.errors import EvaluationError


class Deadline:
    """Starts when it is made; without a number of seconds it never passes."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._began = time.monotonic()  # a clock that is set back or forth changes nothing

    def check(self, where: str) -> None:
        """Raises EvaluationError once the time is over; `where` says how far the trial came."""
        took = time.monotonic() - self._began
        if self._seconds is not None and took > self._seconds:
            raise EvaluationError(
                f"took {took:.1f} s until {where}, wanted at most {self._seconds:g} s (trial_seconds). Raise the "
                "limit, or leave it out."
            )

    def watching(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """The same progress, with a look at the time at every call."""

        def checked(done: int, of: int) -> None:
            progress(done, of)
            self.check(f"question {done} of {of}")

        return checked
