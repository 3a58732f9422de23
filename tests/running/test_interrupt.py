"""Signals that are held back and let through; how a study takes them is under `tests/faults/`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from search import interrupt
from search.interrupt import Interrupted, check_interrupted, held_back, interruptible, let_through, pause


@pytest.fixture
def handled() -> Iterator[None]:
    with interruptible():
        yield


def strike() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_raises_at_once_or_when_the_outermost_block_ends(handled: None) -> None:
    reached = []

    @held_back()
    def strike_within() -> None:
        with held_back():
            strike()
            reached.append("inner")
        reached.append("outer")

    with pytest.raises(Interrupted, match="SIGTERM") as stop:
        strike_within()
    assert reached == ["inner", "outer"]
    assert stop.value.exit_code == 143
    assert not interrupt.is_due()


def test_a_part_lets_through_what_came_before_it_and_what_comes_within(handled: None) -> None:
    reached = []
    with held_back():
        strike()
        assert interrupt.is_due()
        with pytest.raises(Interrupted), let_through():
            reached.append("never")
        with held_back():  # what is put in order afterwards may wait again
            pause(0.0)
            reached.append("order")
    assert reached == ["order"]


def test_a_part_raises_at_once(handled: None) -> None:
    reached = []

    @let_through()
    def part() -> None:
        strike()
        reached.append("never")

    with held_back(), pytest.raises(Interrupted):
        part()
    assert reached == []


@pytest.mark.parametrize("error", [RuntimeError("what a library made of it"), None])
def test_a_signal_that_a_library_swallowed_or_renamed_is_raised(
    handled: None, error: Exception | None
) -> None:
    @let_through()
    def library() -> None:
        try:
            strike()
        except Interrupted:
            if error is not None:
                raise error from None

    with held_back(), pytest.raises(Interrupted):
        library()


def test_a_signal_takes_the_place_of_an_error_that_it_met(handled: None) -> None:
    @held_back()
    def fail() -> None:
        strike()
        raise ValueError("this as well")

    with pytest.raises(Interrupted):
        fail()


def test_it_is_raised_once_and_asked_for_as_often_as_one_likes(handled: None) -> None:
    with pytest.raises(Interrupted), held_back():
        strike()
    with held_back(), let_through():
        pause(0.0)
    for _ in range(2):
        with pytest.raises(Interrupted):
            check_interrupted()


def test_other_threads_change_nothing(handled: None) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with held_back():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with pytest.raises(Interrupted):
        strike()
    leave.set()
    thread.join()


def test_a_pause_ends_with_a_signal(handled: None) -> None:
    timer = threading.Timer(0.2, strike)
    began = time.monotonic()
    timer.start()
    with held_back(), pytest.raises(Interrupted):
        pause(30)
    assert time.monotonic() - began < 10


def test_decorated_functions_hold_back_and_may_call_themselves(handled: None) -> None:
    reached = []

    @held_back()
    def count(down: int) -> None:
        if down:
            count(down - 1)
        else:
            strike()
        reached.append(down)

    with pytest.raises(Interrupted):
        count(2)
    assert reached == [0, 1, 2]


def test_a_second_signal_ends_the_process_held_back_or_not() -> None:
    code = """
import os, signal
from search.interrupt import held_back, interruptible
with interruptible(), held_back():
    os.kill(os.getpid(), signal.SIGINT)
    print("held back", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "held back\n", "")
