"""How far rollouts are: a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rich.console import Console

from search.bar import Bar

if TYPE_CHECKING:
    from search.switching.lora import Epoch

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
