"""The console on stderr and the log lines on it. Light: the command line starts with it."""

from __future__ import annotations

import logging
import sys
import time
from functools import cache

from rich.console import Console
from rich.text import Text


@cache
def stderr_console() -> Console:
    """The console on stderr, one for bar and log lines so that they do not overwrite each other.

    No colour, no bar, no carriage return unless it is a terminal.
    """
    return Console(file=sys.stderr, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Log lines on the console, warnings marked as such."""

    def emit(self, record: logging.LogRecord) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        stderr_console().print(Text(f"[{clock}] {mark}{record.getMessage()}"), highlight=False)
