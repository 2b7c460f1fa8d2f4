"""What only shows results (pictures, TensorBoard) may fail: a line says so, and the results are written all the same."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any


class BestEffort:
    """Calls functions that a run can do without; several threads may ask for it.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say = say
        self.failed: set[str] = set()
        self.lock = threading.RLock()  # warnings are caught for the whole process: one function at a time

    def attempt(self, what: str, function: Callable[..., object], *args: Any) -> bool:
        """Call `function(*args)` and return whether it worked; the first failure is said in a line.

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
                self.say(f"warning: {what}: cannot be made ({reason(error)}): left out")
                return False
        if caught:
            more = f" and {len(caught) - 1} more" if len(caught) > 1 else ""
            self.say(f"warning: {what}: {reason(caught[0].message)}{more}")
        return True


def reason(error: BaseException | str) -> str:
    """Return an error or a warning as one short line."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 200 else text[:199] + "\u2026"
    return short if isinstance(error, (str, Warning)) else f"{type(error).__name__}: {short}".removesuffix(": ")
