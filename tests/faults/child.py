"""A function in a process of its own, which may do to itself what nobody may do to the tests' process."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from tests.study_process import context


def in_child(function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> Any:
    """What the function returns there. Both it and its arguments must be found by name in the child.

    Raises:
        AssertionError: it raised, with its traceback, or did not end in time.
    """
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        assert here.poll(seconds), f"the child said nothing within {seconds:g} s"
        fine, answer = here.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the child ended with code {process.exitcode} and said nothing") from None
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    assert fine, answer
    return answer


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
