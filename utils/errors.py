"""Errors that a user can fix: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """One line that names the file, the key, its value and what is expected.

    It may be raised anywhere; `utils.cli.command` prints it and exits with code 2.
    """


def one_line(error: BaseException | str) -> str:
    """Return the text of an exception or a warning as one short line without control characters; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else text[:199] + "\u2026"


def without_controls(text: str) -> str:
    """Return a text with escapes such as `\\n` for its line breaks and control characters; other characters are kept."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def printable(text: str) -> str:
    """Return a name in a form that fits into a line: short, without control characters."""
    return text if text.isprintable() and len(text) < 200 else f"{text!a:.80}"


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the end of an error line: the known name nearest to `name`, if one is near, and all known names."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    listing = ", ".join(names) if names else "none"
    return f"did you mean {close[0]}? (known: {listing})" if close else f"known: {listing}"


def kind_of(value: Any) -> str:
    """Return dtype and shape of an array or a tensor, e.g. `uint8 (5, 3)`; the type of another value."""
    return f"{value.dtype} {tuple(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
