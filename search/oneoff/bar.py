"""What a one-off merge shows on stderr while it runs: a bar on a terminal, a line a block elsewhere."""

from __future__ import annotations

import logging
import os
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from search.merging.header import shown

if TYPE_CHECKING:
    from search.anchors.build import Progress

logger = logging.getLogger("mergefront")


class MergeBar:
    """A bar over tensors or pieces; on no terminal and when quiet, none."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        live = console.is_terminal and not os.environ.get("NO_COLOR") and not quiet
        self._bar = None
        if live:
            self._bar = RichProgress(
                TextColumn("{task.percentage:>3.0f} %"),
                BarColumn(bar_width=22),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=console,
                transient=True,
            )
        self._task = None if self._bar is None else self._bar.add_task("", total=1.0)

    def __enter__(self) -> MergeBar:
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

    def watch(self, progress: Progress) -> None:
        """Shows how far a build of anchors is."""
        ended = progress.step == progress.steps
        where = "" if progress.block is None else f" block {progress.block}"
        whose = "" if progress.expert is None else f" {progress.expert}"
        value = "" if progress.value is None else f" {progress.value:.4g}"
        text = f"{progress.phase}{where}{whose}{value}"
        within = 0.0 if ended else progress.step / max(1, progress.steps)
        self.show(progress.done + within, progress.of, text)
        if ended and progress.phase == "adapt":
            known = " (was there)" if progress.reused else ""
            logger.log(
                logging.INFO if self._bar is None else logging.DEBUG,
                "block %s: distance to the experts %s%s  [%d/%d]",
                progress.block,
                value.strip() or "unknown",
                known,
                progress.done,
                progress.of,
            )
