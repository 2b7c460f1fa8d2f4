"""Files of arrays (`.npz`), which are untrusted input: nothing in them can run code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np


def read_arrays(path: Path, wanted: Collection[str] | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the arrays of a file by name, and the names of the others.

    Args:
        wanted: the arrays to read; None: all.
    Raises:
        ValueError: a member is not an array; or any other exception, since numpy and zipfile pass on those of many libraries.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if wanted is None or name in wanted}
        others = [name for name in file.files if name not in arrays]
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy returns the bytes of a member in any other format
            raise ValueError(f"{name!r:.80} is not an array")
    return arrays, others
