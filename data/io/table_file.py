"""A table of decoded images on disk: one (n, H, W, 3) uint8 array, its description, and how both are verified.

A table is two files: `<name>-<key>.u8`, the pixels alone, so that it can be mapped into memory, and a `.json` beside it, which
describes them. For every image the description has a digest of the file that was decoded and the file's mark: size, both
modification times and inode number.

Contents decide whether a table is up to date. A modification time alone proves nothing, since programs set it freely (archives
may unpack all files with the same one); the time of the last change of the inode (ctime) cannot be set. An image file with
the recorded mark counts as unchanged, except that a random sample is read again at every start, for file systems that do not
keep such times. A file with another mark (a copied set, a restored backup) is read and compared by digest, which is much
faster than decoding. An image that could not be read is tried again every time.

Opening a table does not read all of it, since at 224 px it has gigabytes. Three things are verified: the description by its
own checksum; the size of the pixel file; and by the digests of their images the first, the last and some random blocks of
4 MiB. If the file's modification time is not the recorded one, every block is read.
"""

from __future__ import annotations

import json
import mmap
import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.digests import pixel_digests, short
from data.io.threads import in_threads
from data.sets import Mapped
from utils.errors import UserError
from utils.files import write_text

FORMAT = 4  # increased by every change of the pixels or of the description
BLOCK = 4 << 20  # bytes of images that are verified together
SAMPLE = 16  # blocks read when a table is opened (64 MiB, 0.1 s), and image files compared by content


@dataclass(frozen=True)
class TableSource:
    """The N images that a table is made of, and what shows whether one has changed without decoding it."""

    name: str  # of the table, e.g. `folder-train`
    root: Path  # the folder of the images, for error messages
    recipe: str  # digest of all that the pixels depend on besides the images themselves
    files: Sequence[str]  # names of the images
    marks: Sequence[str | None]  # equal marks mean equal contents; starts with the file's size; None: no such file
    digest: Callable[[int], str | None]  # of the contents that are decoded; None: they cannot be read
    decode: Callable[[int], np.ndarray | str]  # (H, W, 3) uint8, or the reason why the image cannot be read


class StoredTable:
    """A complete table that was found on disk.

    Attributes:
        described: its description, the `.json`.
        images: (n, H, W, 3) uint8.
        trust_marks: whether equal marks mean equal contents; False once an image has disproved it.
    """

    def __init__(self, described: dict[str, Any], images: np.ndarray) -> None:
        self.described, self.images, self.trust_marks = described, images, True
        left_out = {i for i, _ in described["unreadable"]}
        readable = [i for i in range(len(described["files"])) if i not in left_out]
        self.rows = {described["files"][i]: (row, i) for row, i in enumerate(readable)}  # row and number of each image by name

    def row(self, source: TableSource, i: int, trust_mark: bool) -> int | None:
        """Return the row of image `i` of the source, or None if the table lacks it or it has changed."""
        row, at = self.rows.get(source.files[i], (None, 0))
        now, then = source.marks[i], self.described["marks"][at]
        if row is None or now is None or then is None:
            return None
        if now == then and trust_mark:
            return row
        if now.split()[0] != then.split()[0]:
            return None
        digest = source.digest(i)
        if digest is None and now == then:  # a failure to read does not mean that the file has changed
            return row
        return row if digest is not None and digest == self.described["sources"][at] else None

    def matches(self, source: TableSource) -> bool:
        """Return whether every image of the source is unchanged; unreadable ones are not compared."""
        if self.described["files"] != list(source.files):
            return False
        readable, marks = [at for _, at in self.rows.values()], self.described["marks"]
        same = [i for i in readable if marks[i] == source.marks[i]]
        sample = random.Random().sample(same, min(SAMPLE, len(same)))
        self.trust_marks = all(self.row(source, i, trust_mark=False) is not None for i in sample)
        unsure = [i for i in readable if marks[i] != source.marks[i]]
        compared = in_threads(unsure, lambda i: self.row(source, i, trust_mark=False), "comparing images")
        return self.trust_marks and all(row is not None for row in compared)

    def unreadable(self, source: TableSource) -> list[tuple[int, str]] | None:
        """Try the unreadable images again; return their numbers and the reasons, or None if one can be read now."""
        tried = ((i, source.decode(i)) for i, _ in self.described["unreadable"])
        reasons: list[tuple[int, str]] = []
        for i, found in tried:
            if not isinstance(found, str):
                return None
            reasons.append((i, found))
        return reasons

    def pixels(self, row: int) -> np.ndarray | None:
        """Return an image, (H, W, 3) uint8, or None if it is damaged."""
        image = self.images[row]
        return image if short(np.ascontiguousarray(image).data) == self.described["digests"][row] else None


# -- The description ---------------------------------------------------------------------------------------------------


def write_description(path: Path, described: dict[str, Any]) -> None:
    """Write the `.json` of the table at `path`, with a checksum of itself."""
    text = json.dumps(described, sort_keys=True)
    write_text(path.with_suffix(".json"), json.dumps(described | {"sha256": sha256(text.encode()).hexdigest()}, sort_keys=True))


def read_description(path: Path) -> dict[str, Any] | None:
    """Return the `.json` of the table at `path`, or None if it is missing or damaged."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        checksum = described.pop("sha256")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None
    text = json.dumps(described, sort_keys=True)
    return described if checksum == sha256(text.encode()).hexdigest() else None


def record_marks(path: Path, table: StoredTable, source: TableSource) -> None:
    """Record the present marks of a verified table and of its images if they have changed, e.g. because a copy was made.

    This only saves the comparison at the next start, so a folder without write permission is not an error.
    """
    seen = {"mtime_ns": path.stat().st_mtime_ns, "marks": list(source.marks)}
    if table.described | seen != table.described:
        with suppress(UserError, OSError):
            write_description(path, table.described | seen)


# -- The pixels --------------------------------------------------------------------------------------------------------


def open_table(path: Path, described: dict[str, Any]) -> StoredTable | None:
    """Map the table at `path` into memory; None if it is damaged."""
    shape = tuple(described["shape"])
    try:
        file = open(path, "rb")  # noqa: SIM115 - open as long as the table is used
    except OSError:
        return None
    status = os.fstat(file.fileno())
    complete = status.st_size == int(np.prod(shape)) and shape[0] + len(described["unreadable"]) == len(described["files"])
    untouched = status.st_mtime_ns == described["mtime_ns"]
    if not complete or not blocks_intact(file, shape, described["digests"], SAMPLE if untouched else None):
        file.close()
        return None
    return StoredTable(described, map_table(file, shape))


def rows_per_block(shape: Sequence[int]) -> int:
    """Return how many images of (H, W, 3) bytes are verified together."""
    return max(1, BLOCK // max(1, int(np.prod(shape))))


def blocks_intact(file: IO[bytes], shape: Sequence[int], digests: Sequence[str], sample: int | None) -> bool:
    """Return whether the images in a table's blocks have their digests.

    Args:
        sample: how many blocks are read: the first, the last and random others; None: all blocks.
    """
    rows, size = rows_per_block(shape[1:]), int(np.prod(shape[1:]))
    starts = range(0, len(digests), rows)
    chosen = set(starts)
    if sample is not None and len(starts) > sample:
        chosen = {0, starts[-1], *random.Random().sample(starts, sample - 2)}
    for start in sorted(chosen):
        expected = tuple(digests[start : start + rows])
        file.seek(start * size)
        block = np.frombuffer(file.read(len(expected) * size), np.uint8)
        if len(block) != len(expected) * size or pixel_digests(block.reshape(len(expected), size)) != expected:
            return False
    return True


def map_table(file: IO[bytes], shape: Sequence[int]) -> np.ndarray:
    """Map a table's file into memory, copy-on-write: writing to the array never changes the file."""
    if not np.prod(shape):
        return np.zeros(tuple(shape), np.uint8)
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)  # the table may be larger than the memory
    bytes_ = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    table = np.frombuffer(bytes_, np.uint8).reshape(tuple(shape)).view(Mapped)
    table.file = file
    return table


def own_copy(images: np.ndarray, placement: str) -> np.ndarray:
    """Return a copy of images that may be written to, for a set with that placement.

    A mapped table is mapped a second time, which costs nothing until something is written; for placement `host` it is read.
    """
    if not isinstance(images, Mapped) or images.file is None:
        return images.copy()
    return read_table(images) if placement == "host" else map_table(images.file, images.shape)


def read_table(images: np.ndarray) -> np.ndarray:
    """Return a mapped table as an array in memory, and any other array as it is.

    The file is read instead of the map, whose pages would count as memory of this process as well.
    """
    if not isinstance(images, Mapped) or images.file is None:
        return images
    images.file.seek(0)
    return np.fromfile(images.file, np.uint8).reshape(images.shape)
