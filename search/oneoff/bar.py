"""What a one-off merge shows on stderr while it runs: a bar on a terminal, a line a block elsewhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from search.bar import Bar

if TYPE_CHECKING:
    from search.anchors.build import Progress

logger = logging.getLogger("mergefront")


class MergeBar(Bar):
    """A bar over tensors or pieces."""

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
                logging.DEBUG if self.live else logging.INFO,
                "block %s: distance to the experts %s%s  [%d/%d]",
                progress.block,
                value.strip() or "unknown",
                known,
                progress.done,
                progress.of,
            )
