"""Names of classes and images: found however they are typed, and shown beside their number."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


class Names:
    """Known names, each of which is found by itself, or by another Unicode form of the same letters.

    A Mac decomposes file names (NFD), most keyboards compose letters (NFC): the two look alike and are not equal.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.by_form: dict[str, str | None] = {}  # None: several names have this form
        for name in self.names:
            form = unicodedata.normalize("NFC", name)
            self.by_form[form] = None if form in self.by_form else name

    def find(self, name: str) -> str | None:
        """Return the known name that is meant, or None: no name is, or several are and none of them exactly."""
        return name if name in self.names else self.by_form.get(unicodedata.normalize("NFC", name))


def class_text(label: int, class_names: Sequence[str]) -> str:
    """Return a class' number and name, e.g. `3 (cat)`; a name that is a number itself is marked, e.g. `2 (folder 10)`."""
    if not 0 <= label < len(class_names):
        return str(label)
    name = class_names[label]
    shown = name if name.isprintable() else ascii(name)
    return f"{label} ({'folder ' if name.isdecimal() else ''}{shown})"
