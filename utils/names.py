"""Names of classes and images: lookup in any Unicode form, and display with their number."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


class Names:
    """Known names, found by exact match or by another Unicode form of the same characters.

    macOS decomposes file names (NFD), most keyboards produce composed characters (NFC): both look alike but are not equal.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.by_form: dict[str, str | None] = {}  # None: ambiguous, several names have this form
        for name in self.names:
            form = unicodedata.normalize("NFC", name)
            self.by_form[form] = None if form in self.by_form else name

    def find(self, name: str) -> str | None:
        """Return the matching known name; None if there is none, or several and no exact match."""
        return name if name in self.names else self.by_form.get(unicodedata.normalize("NFC", name))


def wrong_names(names: Sequence[object]) -> str | None:
    """Return why these cannot be the names of classes; None if they can."""
    if not names or not all(isinstance(name, str) and name for name in names):
        return "a name is empty" if names else "there are none"
    return "a name occurs twice" if len(set(names)) < len(names) else None


def class_name(label: int, class_names: Sequence[str]) -> str:
    """Return the name of a class, or its number if it has none."""
    return class_names[label] if label < len(class_names) else str(label)


def class_text(label: int, class_names: Sequence[str]) -> str:
    """Return the number and the name of a class, e.g. `3 (cat)`; for a numeric name e.g. `2 (folder 10)`."""
    if not 0 <= label < len(class_names):
        return str(label)
    name = class_names[label]
    shown = name if name.isprintable() else ascii(name)
    return f"{label} ({'folder ' if name.isdecimal() else ''}{shown})"
