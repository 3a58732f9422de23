"""The console on stderr and the log lines on it. Light: the command line starts with it."""

from __future__ import annotations

import logging
import sys
import time
from functools import cache
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from objectives.printable import printable
from search.errors import ConfigError


@cache
def stderr_console() -> Console:
    """The console on stderr, one for bar and log lines so that they do not overwrite each other.

    No colour, no bar, no carriage return unless it is a terminal.
    """
    return Console(file=sys.stderr, soft_wrap=True)


def say(text: object, *, end: str = "\n", flush: bool = False, file: TextIO | None = None) -> None:
    """Prints one or more lines, on stdout if no file is given, so that a terminal does nothing but show them.

    Letters that the terminal's encoding lacks are escaped, too.
    """
    stream = sys.stdout if file is None else file
    encoding = stream.encoding or "utf-8"
    known = printable(str(text), keep="\n\t").encode(encoding, "backslashreplace").decode(encoding)
    print(known, end=end, flush=flush, file=stream)


class ConsoleHandler(logging.Handler):
    """Log lines on the console, warnings marked as such."""

    def emit(self, record: logging.LogRecord) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        stderr_console().print(
            Text(f"[{clock}] {mark}{printable(record.getMessage(), keep=chr(10))}"), highlight=False
        )


def start_logging(verbose: bool, quiet: bool, file: Path | None) -> None:
    """Sends the product's log to the console, and to a file where one is given.

    Raises:
        ConfigError: the file cannot be written.
    """
    logger = logging.getLogger("mergefront")
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(
        ConsoleHandler(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    )
    if file is not None:
        try:
            log = logging.FileHandler(file, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-file {file}: cannot be written: {error.strerror}.") from error
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(log)
