"""Ending on a signal: bookkeeping first, and at once if asked twice."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

TETHER_SECONDS = 20
_arrived: list[int] = []  # signals since the block began in which they are handled


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an `Exception`, so that no handler of failures swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Interrupted` at the first SIGINT or SIGTERM within the block; a second one ends the process at once."""

    def stop(number: int) -> None:
        raise Interrupted(number)

    with _handled(stop):
        yield


@contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """As `interruptible`, but it is the yielded call that raises: for libraries through which no exception may fly."""
    arrived: list[int] = []

    def check() -> None:
        if arrived:
            raise Interrupted(arrived[0])

    with _handled(arrived.append):
        yield check


def check_interrupted() -> None:
    """Raises `Interrupted` again if it was raised where Python drops exceptions, in a finalizer or a callback."""
    if _arrived:
        raise Interrupted(_arrived[0])


@contextmanager
def _handled(first: Callable[[int], None]) -> Iterator[None]:
    _arrived.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        if _arrived:
            os._exit(128 + number)
        _arrived.append(number)
        first(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _arrived.clear()


def tether() -> None:
    """Ends this process with SIGTERM when its input ends: whoever started it is gone, however that came about.

    Should it still be there after `TETHER_SECONDS`, it ends at once.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(handle, 4096):
                pass
        if not _arrived:  # else it is ending already, and a second signal would cut that short
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(TETHER_SECONDS)
        os._exit(128 + signal.SIGTERM)

    handle = sys.stdin.fileno()
    threading.Thread(target=watch, name="mergefront-tether", daemon=True).start()
