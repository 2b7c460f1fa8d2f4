"""Mistakes that a user can mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What went wrong, where, with which value, and the remedy, in one line.

    Raised anywhere below the command line; `utils.cli.command` prints it and exits with code 2.
    """


def nearest(name: object, known: Iterable[str]) -> str:
    """Return `name` set beside the nearest of the `known` names, for the end of an error line."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    listing = ", ".join(names) if names else "none"
    return f"did you mean {close[0]}? (known: {listing})" if close else f"known: {listing}"
