"""A bar on stderr; on no terminal and when quiet, none."""

from __future__ import annotations

import logging
import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from objectives.printable import shown

if TYPE_CHECKING:
    from search.merging.anchors.build import Progress as Built
    from search.switching.lora import Epoch


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


logger = logging.getLogger("mergefront")


class MergeBar(Bar):
    """A bar over tensors or pieces."""

    def watch(self, progress: Built) -> None:
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
                logging.DEBUG if self.live else logging.INFO,
                "block %s: distance to the experts %s%s  [%d/%d]",
                progress.block,
                value.strip() or "unknown",
                known,
                progress.done,
                progress.of,
            )


logger = logging.getLogger("mergefront")


class RolloutBar(Bar):
    """A bar over questions."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        super().__init__(console, quiet=quiet)
        self._told: dict[str, int] = {}

    def watch(self, task: str, done: int, of: int, stored: bool) -> None:
        """Shows that so many questions of a task are rolled out."""
        known = " (stored)" if stored else ""
        self.show(done, of, f"rollouts {task}: {done}/{of} questions{known}")
        tenth = 10 * done // of
        if tenth > self._told.get(task, -1):
            self._told[task] = tenth
            level = logging.DEBUG if self.live else logging.INFO
            logger.log(level, "rollouts of %s: %d of %d questions%s", task, done, of, known)

    def learn(self, done: int, of: int, epoch: Epoch | None) -> None:
        """Shows how far the training of a LoRA is, and what each epoch came to."""
        self.show(done, of, f"lora: step {done}/{of}")
        if epoch is not None:
            held = "" if epoch.held_loss is None else f", {epoch.held_loss:.3f} on questions held out"
            logger.info("epoch %d: log loss %.3f nats%s", epoch.number, epoch.loss, held)
