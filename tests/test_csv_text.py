"""The text of CSV files."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from utils.csv_text import csv_text

VALUES = st.text(st.sampled_from('ab,"\r\n \u00e9\udce9'), max_size=5)


@given(st.lists(st.lists(VALUES, min_size=2, max_size=4), max_size=5))
def test_any_values_are_read_back(rows: list[list[str]]) -> None:
    """Names of files may have quotes, commas and line breaks of both kinds; a reader gets the same rows."""
    assert list(csv.reader(io.StringIO(csv_text(rows), newline=""))) == rows


def test_lines_end_as_on_unix() -> None:
    """Plain rows are lines of `cut`, `sort` and other programs."""
    assert csv_text([("a", 1), ("b, c", 2.5)]) == 'a,1\n"b, c",2.5\n'
