"""A bar on stderr; on no terminal and when quiet, none."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from search.merging.header import shown


class Bar:
    """How far something is that takes a while.

    Attributes:
        live: whether there is a bar.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.live = console.is_terminal and not os.environ.get("NO_COLOR") and not quiet
        self._bar = None
        if self.live:
            self._bar = Progress(
                TextColumn("{task.percentage:>3.0f} %"),
                BarColumn(bar_width=22),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=console,
                transient=True,
            )
        self._task = None if self._bar is None else self._bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, of: float, text: str) -> None:
        """Moves the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=of, description=shown(text))
