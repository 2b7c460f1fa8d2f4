"""Where log lines go: to standard output for a command, to `asd.log` for a run. Every module logs to a logger of its own.

Without a command or an open run nothing is configured: a program that imports these modules has Python's usual logging.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

PACKAGES = ("__main__", "benchmark", "data", "engine", "loss", "model", "utils")  # loggers of libraries are left alone


class Screen(logging.Handler):
    """Writes each message to standard output, above the progress bars. A stream that fails ends the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        tqdm.write(self.format(record))


class LogFile(logging.FileHandler):
    """Appends each message with its time to a file. A full disk ends the run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the error of the write that has just failed."""
        raise


def attach(handler: logging.Handler) -> None:
    """Give a handler all lines of this project from INFO on."""
    for logger in map(logging.getLogger, PACKAGES):
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def detach(handler: logging.Handler) -> None:
    """Undo `attach` and close the handler."""
    for logger in map(logging.getLogger, PACKAGES):
        logger.removeHandler(handler)
        if not logger.handlers:
            logger.setLevel(logging.NOTSET)
    handler.close()


@contextlib.contextmanager
def on_screen(level: int) -> Iterator[None]:
    """Show the lines from `level` on during the block, once each, whatever handlers the root logger has."""
    handler = Screen(level)
    attach(handler)
    for logger in map(logging.getLogger, PACKAGES):
        logger.propagate = False
    try:
        yield
    finally:
        for logger in map(logging.getLogger, PACKAGES):
            logger.propagate = True
        detach(handler)
