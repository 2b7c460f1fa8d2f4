"""Text of CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV, one line each unless a value has line breaks; values with line breaks of either kind are quoted."""
    text, lines = io.StringIO(), []
    writer = csv.writer(text)  # quotes a carriage return because its own line end, which is removed here, has one
    for row in rows:
        writer.writerow(row)
        lines.append(text.getvalue().removesuffix("\r\n"))
        text.seek(0)
        text.truncate()
    return "".join(f"{line}\n" for line in lines)
