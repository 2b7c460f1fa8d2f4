"""Plots and TensorBoard only display results. If they fail, one warning is logged and the run continues."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

from utils.errors import one_line

logger = logging.getLogger(__name__)


class BestEffort:
    """Calls functions that may fail without ending the run. Thread-safe."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.lock = threading.RLock()  # Python records warnings per process: one function at a time

    def attempt(self, what: str, function: Callable[..., object], *args: Any) -> bool:
        """Call `function(*args)` and return whether it succeeded; log the first failure of `what` in one line.

        After a failure, `what` is not tried again: a writer that has lost its file fails every time. All warnings that
        libraries raise are logged as one line that names `what`.
        """
        if what in self.failed:
            return False
        with self.lock, warnings.catch_warnings(record=True) as caught:
            try:
                function(*args)
            except Exception as error:  # whatever a library raises, also if it is not installed
                self.failed.add(what)
                logger.warning(f"warning: {what}: failed ({reason(error)}): skipped")
                return False
        if caught:
            more = f" and {len(caught) - 1} more" if len(caught) > 1 else ""
            logger.warning(f"warning: {what}: {reason(caught[0].message)}{more}")
        return True


def reason(error: BaseException | str) -> str:
    """Return the text of an error, with its type, or of a warning as one short line."""
    text = one_line(error)
    name = type(error).__name__
    return text if isinstance(error, (str, Warning)) or text == name else f"{name}: {text}"
