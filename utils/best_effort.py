"""What only shows results (pictures, TensorBoard) may fail: a line says so, and the results are written all the same."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class BestEffort:
    """Calls functions that a run can do without; several threads may ask for it."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.lock = threading.RLock()  # warnings are caught for the whole process: one function at a time

    def attempt(self, what: str, function: Callable[..., object], *args: Any) -> bool:
        """Call `function(*args)` and return whether it worked; the first failure is logged in a line.

        What has failed once is not tried again, for a writer that has lost its file fails every time. Warnings of
        libraries come as one line that names `what`.
        """
        if what in self.failed:
            return False
        with self.lock, warnings.catch_warnings(record=True) as caught:
            try:
                function(*args)
            except Exception as error:  # whatever libraries raise, missing ones included
                self.failed.add(what)
                logger.warning(f"warning: {what}: cannot be made ({reason(error)}): left out")
                return False
        if caught:
            more = f" and {len(caught) - 1} more" if len(caught) > 1 else ""
            logger.warning(f"warning: {what}: {reason(caught[0].message)}{more}")
        return True


def reason(error: BaseException | str) -> str:
    """Return an error or a warning as one short line."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 200 else text[:199] + "\u2026"
    return short if isinstance(error, (str, Warning)) else f"{type(error).__name__}: {short}".removesuffix(": ")
