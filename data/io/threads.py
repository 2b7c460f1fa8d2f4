"""Work on many items in threads, e.g. decoding image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from utils.reporting.runlog import progress

T = TypeVar("T")
WINDOW = 256  # items that are worked on ahead of the consumer: 40 MB of images at 224 px


def in_threads(items: Sequence[int], work: Callable[[int], T], title: str) -> Iterator[T]:
    """Yield `work(item)` for every item, in order, computed by one thread per core, with a progress bar.

    Pillow releases the interpreter lock while it decodes and resizes, so threads are as fast as processes and copy nothing.
    """

    def windows() -> Iterator[T]:
        with ThreadPoolExecutor(cores()) as pool:
            for start in range(0, len(items), WINDOW):
                yield from pool.map(work, items[start : start + WINDOW])

    yield from progress(windows(), title, len(items))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
