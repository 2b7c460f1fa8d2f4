"""Log handlers: standard output for a command, `asd.log` for a run. Every module has its own logger.

Nothing is configured unless a command or a run is active: programs that import these modules get Python's usual logging.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

PACKAGES = (
    "__main__",
    "ASD",
    "benchmark",
    "data",
    "defenses",
    "engine",
    "loss",
    "model",
    "utils",
)  # loggers of libraries are not touched


class Screen(logging.Handler):
    """Writes each message to standard output, above the progress bars. An error of the stream ends the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message. Only on a terminal are there bars that it must not disturb."""
        if sys.stderr.isatty():
            tqdm.write(self.format(record))
        else:
            print(self.format(record), flush=True)


class ProgressLines:
    """Standard error for progress bars that are not on a terminal: each state of a bar is a line, and nothing is erased."""

    def write(self, text: str) -> None:
        """Write the state of a bar, if the text is one."""
        if state := text.strip():
            sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        """Flush standard error."""
        sys.stderr.flush()


class LogFile(logging.FileHandler):
    """Appends each message with its time to a file. A full disk ends the run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the error of the write that has just failed."""
        raise


def attach(handler: logging.Handler) -> None:
    """Attach a handler to the loggers of this project, from level INFO on."""
    for logger in map(logging.getLogger, PACKAGES):
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def detach(handler: logging.Handler) -> None:
    """Detach a handler and close it."""
    for logger in map(logging.getLogger, PACKAGES):
        logger.removeHandler(handler)
        if not logger.handlers:
            logger.setLevel(logging.NOTSET)
    handler.close()


@contextlib.contextmanager
def on_screen(level: int) -> Iterator[None]:
    """Show log lines from `level` on during the block, each once, whatever handlers the root logger has."""
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
