"""Ending on a signal: bookkeeping first, and at once if asked twice.

An exception that flies through SQLAlchemy, a lock or Ray leaves them half done: a cursor that stays open keeps this
very process from giving its trial back. So signals are held back there, and let through where a study waits or
computes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager, suppress
from types import FrameType

TETHER_SECONDS = 20
_arrived: list[int] = []  # signals since the block began in which they are handled
_due: list[int] = []  # those of them that were held back, until they are raised
_held = False


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an `Exception`, so that no handler of failures swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Interrupted` at the first SIGINT or SIGTERM within the block; a second one ends the process at once."""
    _reset()

    def handle(number: int, frame: FrameType | None) -> None:
        if _arrived:
            os._exit(128 + number)
        _arrived.append(number)
        if not _held:
            raise Interrupted(number)
        _due.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _reset()


class _Block(ContextDecorator):
    """Sets for the main thread whether a signal raises at once. Not a generator, of which an exception at its end would
    leave the rest to the garbage collector.
    """

    def __init__(self, held: bool) -> None:
        self._hold = held

    def _recreate_cm(self) -> _Block:
        return _Block(self._hold)

    def __enter__(self) -> None:
        global _held
        self._before, self._known = _held, len(_arrived)
        if _in_main_thread():
            _held = self._hold
            _raise_due()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _held
        if not _in_main_thread():
            return
        _held = self._before
        _raise_due()
        if not self._hold and len(_arrived) > self._known and kind is not Interrupted:
            _raise()  # a finalizer or a callback dropped it, or made another error of it


def held_back() -> _Block:
    """A block, or a decorated function, after which signals are raised that come within it; in the main thread."""
    return _Block(held=True)


def let_through() -> _Block:
    """A part of a block that is held back, in which signals raise at once: where it waits or computes for long.

    A signal at the first line of an `__exit__` that is written in Python skips the rest of it. So what has to be left
    in order, such as a lock, holds signals back itself.
    """
    return _Block(held=False)


def pause(seconds: float) -> None:
    """Sleeps; a signal ends that, held back or not."""
    with let_through():
        time.sleep(seconds)


def is_due() -> bool:
    """Whether a signal is held back at the moment: what may take long should come to an end."""
    return bool(_due)


def check_interrupted() -> None:
    """Raises `Interrupted` if a signal arrived, be it held back or raised where Python drops exceptions."""
    if _arrived:
        _raise()


def _raise_due() -> None:
    if _due and not _held:
        _raise()


def _raise() -> None:
    _due.clear()
    raise Interrupted(_arrived[0])


def _reset() -> None:
    global _held
    _held = False
    _arrived.clear()
    _due.clear()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # it alone handles signals


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
