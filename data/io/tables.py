"""From a data set to tables: many images become one (n, H, W, 3) uint8 array of one size, kept on disk.

Images are decoded in parallel, brought to one size by the pre-transforms and cached (`data/io/table_file.py`: the files and how
they are verified). The key in a table's file name is a digest of the image folder, the classes, the limits and the
pre-transforms. So a changed data set replaces its own table, and each configuration has its own. Only images that have
changed are decoded again; the rows of the others are copied. A table that was made from a copy of the images in another
folder is used as it is. A damaged table is made again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
import torchvision
from PIL import Image

from data.digests import file_digest, pixel_digests, short
from data.io.image_file import depth_line, prepared, printable, read_prepared, unreadable_lines
from data.io.table_file import FORMAT, StoredTable, TableSource, open_table, read_description, record_marks, write_description
from data.io.threads import in_threads
from data.sets import Listing, RawData
from utils import plugins
from utils.errors import UserError
from utils.files import remove_leftovers, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """A table and the images that are missing from it."""

    images: np.ndarray  # (n, H, W, 3) uint8, mapped into memory copy-on-write if n > 0
    kept: np.ndarray  # (n,) int64, numbers of the images in the table, ascending
    unreadable: tuple[tuple[int, str], ...]  # numbers of the others, with reasons
    digests: tuple[str, ...]  # n, of the images' pixels


def to_raw(found: RawData | Listing, pre: Sequence[Any], folder: Path, on_disk: bool) -> RawData:
    """Return a data set as two tables of one size.

    Args:
        pre: settings of the transforms of `transform.pre`; each takes a PIL image, like torchvision's transform of that name.
        folder: the tables' folder.
        on_disk: write tables also for data that are in memory already and need no pre-transform.
    Raises:
        UserError: images of several sizes, or unreadable images, unless the listing skips them.
    """
    if isinstance(found, RawData):
        if not pre and not on_disk:
            return found
        train, test = (
            table_of_array(images, pre, folder, name)
            for images, name in ((found.train_images, "train"), (found.test_images, "test"))
        )
        return replace(
            found,
            train_images=train.images,
            test_images=test.images,
            train_digests=train.digests,
            test_digests=test.digests,
            pre=tuple(pre),
        )
    pre = pre or found.pre
    train, test = (table_of_files(found, part, pre, folder) for part in ("train", "test"))
    check_unreadable(found, train, test)
    if len(test.images) and train.images.shape[1:] != test.images.shape[1:]:
        first, other = found.train_files[train.kept[0]], found.test_files[test.kept[0]]
        raise several_sizes(found.root, (first, train.images.shape[1:]), (other, test.images.shape[1:]))
    names, test_names = (
        tuple(found.name_of(files[i]) for i in table.kept)
        for files, table in ((found.train_files, train), (found.test_files, test))
    )
    raw = RawData(
        train.images, found.train_labels[train.kept], test.images, found.test_labels[test.kept], found.class_names,
        names, test_names, train.digests, test.digests, len(train.unreadable) + len(test.unreadable), tuple(pre),
    )  # fmt: skip
    for label, count in enumerate(np.bincount(raw.train_labels, minlength=int(found.train_labels.max()) + 1)):
        if count == 0 and (found.train_labels == label).any():
            name = found.class_names[label]
            raise UserError(f"{found.root}: class {name}: none of its training images can be read: repair or replace them")
    return raw


def table_of_files(listing: Listing, part: str, pre: Sequence[Any], folder: Path) -> Table:
    """Return the table of one part of a listing, "train" or "test"."""
    train = part == "train"
    files, limit = (listing.train_files, listing.limits[0]) if train else (listing.test_files, listing.limits[1])
    paths = [listing.root / file for file in files]
    depths: dict[int, list[int]] = {}  # by image, which may be decoded twice

    def decode(i: int) -> np.ndarray | str:
        depths[i] = []
        return read_prepared(paths[i], pre, depths[i])

    source = TableSource(
        f"{listing.name}-{part}", listing.root, recipe_of(pre), files, [mark_of(path) for path in paths],
        lambda i: file_digest(paths[i]), decode,
    )  # fmt: skip
    classes = sorted({file.rpartition("/")[0] for file in files})
    key = digest_of([os.path.realpath(listing.root), classes, limit, described_steps(pre)])
    table = find_or_make(folder / f"{source.name}-{key}.u8", source)
    scaled = depth_line([bits for found in depths.values() for bits in found], len(files))
    if scaled:
        logger.info(f"{source.name}: {scaled}")
    return table


def table_of_array(images: np.ndarray, pre: Sequence[Any], folder: Path, name: str) -> Table:
    """Return the table of (N, H, W, 3) uint8 images that are in memory."""

    def decode(i: int) -> np.ndarray:
        try:
            return prepared(Image.fromarray(images[i]), pre) if pre else images[i]
        except ValueError as error:
            raise UserError(f"transform.pre: images of {error}") from None

    digests = pixel_digests(images)
    files = [f"image {i}" for i in range(len(images))]
    source = TableSource(f"array-{name}", folder, recipe_of(pre), files, digests, lambda i: digests[i], decode)
    key = digest_of([images.shape, digests, described_steps(pre)])
    return find_or_make(folder / f"array-{name}-{key}.u8", source)


def mark_of(path: Path) -> str | None:
    """Return what identifies a file without reading it: size, times of change of contents and inode, inode number."""
    try:
        status = path.stat()
    except OSError:  # e.g. a broken link: decoding reports it
        return None
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def described_steps(pre: Sequence[Any]) -> list[str]:
    """Return the pre-transforms with their settings."""
    return [f"{type(step).__module__} {step!r}" for step in pre]


def recipe_of(pre: Sequence[Any]) -> str:
    """Return the digest of all that the pixels depend on besides the images themselves."""
    return digest_of([described_steps(pre), PIL.__version__, torchvision.__version__])


def digest_of(facts: Any) -> str:
    """Return the digest of a value that JSON can express."""
    return short(json.dumps(facts).encode())


# -- Finding or making a table -----------------------------------------------------------------------------------------


def find_or_make(path: Path, source: TableSource) -> Table:
    """Return the table of a source: one that is on disk, or else a new one at `path`. The log names the file."""
    if not source.files:
        return Table(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.int64), (), ())
    name, earlier = source.name, None
    for candidate in (path, *sorted(p.with_suffix(".u8") for p in path.parent.glob(f"{name}-*.json") if p.stem != path.stem)):
        described = read_description(candidate)
        if described is not None and (described["format"] != FORMAT or described["recipe"] != source.recipe):
            continue
        if candidate != path and (described is None or described["files"] != list(source.files)):
            continue
        stored = None if described is None else open_table(candidate, described)
        if stored is None:
            if candidate == path and path.exists() and path.with_suffix(".json").exists():
                logger.info(f"{name}: {path} is damaged: making it again")
            continue
        unreadable = stored.unreadable(source) if stored.matches(source) else None
        if unreadable is not None:
            record_marks(candidate, stored, source)
            logger.info(f"{name}: using {candidate}, decoded earlier from the same images")
            return as_table(stored, unreadable)
        if candidate == path:
            earlier = stored
    make_table(path, source, earlier)
    described = read_description(path)
    made = None if described is None else open_table(path, described)
    if made is None:
        raise UserError(f"{path}: does not contain what was just written: check the disk, or set data.cache_dir to another one")
    total = sum(file.stat().st_size for file in path.parent.glob("*.u8"))
    size = f"{made.images.nbytes / 1e9:.2f} GB; all tables in that folder take {total / 1e9:.2f} GB and may be deleted"
    logger.info(f"{name}: made {path} ({size})")
    return as_table(made, made.described["unreadable"])


def as_table(stored: StoredTable, unreadable: Iterable[Sequence[Any]]) -> Table:
    """Return the part of a stored table that a data set needs."""
    numbers = np.asarray([at for _, at in stored.rows.values()], np.int64)
    reasons = tuple((int(i), str(reason)) for i, reason in unreadable)
    return Table(stored.images, numbers, reasons, tuple(stored.described["digests"]))


def make_table(path: Path, source: TableSource, earlier: StoredTable | None = None) -> None:
    """Write the two files of a table.

    Args:
        earlier: the table that is at `path` now; its rows of unchanged images are copied.
    """
    remove_leftovers(path.parent)
    files = source.files
    unreadable: list[tuple[int, str]] = []
    digests_of_files: list[str | None] = []
    digests: list[str] = []
    shape: list[int] = []  # height, width, 3
    first = 0

    def produce(i: int) -> tuple[np.ndarray | str, str | None]:
        row = earlier.row(source, i, earlier.trust_marks) if earlier else None
        pixels: np.ndarray | str | None = earlier.pixels(row) if earlier and row is not None else None
        if pixels is not None and earlier is not None:
            return pixels, earlier.described["sources"][earlier.rows[files[i]][1]]
        digest = source.digest(i)  # before decoding: if the file changes in between, the next start finds another digest
        return source.decode(i), digest

    def write(file: IO[bytes]) -> None:
        nonlocal shape, first
        for i, (pixels, digest) in enumerate(in_threads(range(len(files)), produce, f"decoding {source.name}")):
            digests_of_files.append(digest)
            if isinstance(pixels, str):
                unreadable.append((i, pixels))
                continue
            if not shape:
                shape, first = list(pixels.shape), i
            elif list(pixels.shape) != shape:
                raise several_sizes(source.root, (files[first], shape), (files[i], pixels.shape))
            data = np.ascontiguousarray(pixels).data
            file.write(data)
            digests.append(short(data))

    write_atomically(path, write)
    write_description(path, {
        "format": FORMAT, "recipe": source.recipe, "shape": [len(digests), *(shape or [0, 0, 3])], "unreadable": unreadable,
        "files": list(files), "marks": list(source.marks), "sources": digests_of_files, "digests": digests,
        "mtime_ns": path.stat().st_mtime_ns,
    })  # fmt: skip


# -- Messages ----------------------------------------------------------------------------------------------------------


def several_sizes(root: Path, one: tuple[str, Sequence[int]], other: tuple[str, Sequence[int]]) -> UserError:
    """Return the error for images of several sizes, of which two are given as (name, shape)."""
    remedies = " or ".join(plugins.declared("data.transforms", "TO_ONE_SIZE").values())
    first, second = (f"{printable(name)} is {shape[1]} x {shape[0]} pixels" for name, shape in (one, other))
    return UserError(
        f"{root}: images of several sizes: {first}, {second}: bring them to one size in transform.pre, e.g. {remedies}"
    )


def check_unreadable(listing: Listing, train: Table, test: Table) -> None:
    """Log the names of the images that cannot be read, and raise UserError unless the listing skips them."""
    unreadable = [
        (files[i], reason)
        for files, table in ((listing.train_files, train), (listing.test_files, test))
        for i, reason in table.unreadable
    ]
    if not unreadable:
        return
    for line in unreadable_lines(unreadable):
        logger.info(line)
    count, total = len(unreadable), len(listing.train_files) + len(listing.test_files)
    key = f"dataset.{listing.name}.skip_unreadable"
    first = ": ".join(map(printable, unreadable[0]))
    if not listing.skip_unreadable:
        raise UserError(
            f"{listing.root}: {count} of {total} images cannot be read (first: {first}): repair or remove them, or leave them "
            f"out with --set {key}=true; a run that was begun with them then needs another name, --set run=NAME"
        )
    if len(train.kept) == 0:
        raise UserError(f"{listing.root}: none of the training images can be read (first: {first}): repair them")
    logger.info(f"{count} of {total} images are left out ({key})")
