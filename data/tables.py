"""One table (n, H, W, 3) uint8 out of many pictures: decoded in parallel, brought to one size, kept on disk.

A table is two files: `<name>-<key>.u8`, the pixels and nothing else, so that it can be mapped into memory, and a `.json`
beside it that says what the pixels are. The key is that of the place: of the folder of the pictures, the classes, limits and
pre-transforms. So a set that changes replaces its own table, and each run configuration has one.

What a table is of is decided by content. For every picture the `.json` has a digest of the file that was decoded, and the
file's mark: size, both times and inode. Modification times alone prove nothing, since programs set them freely (archives
unpack all files with the same one); the time of the last change of the inode (ctime) cannot be set. A picture whose mark
is the noted one is taken for unchanged, but for a random sample, which is read again at every start for the sake of file
systems without such times. A picture with another mark (a copied set, a restored backup) is read and compared by digest,
which is much faster than decoding. Only pictures that differ are decoded again; the others' rows are copied. A table of
equal pictures that was made from another folder is used as it is. A picture that could not be read is tried again every time.

Opening a table does not read all of it, for at 224 px it has gigabytes. Checked are: the `.json` by its own checksum, the
size of the pixel file, and of its blocks (4 MiB) the first, the last and some others, every time other ones, by the digests
of the images in them. Where the file's time of change is not the one that was noted, every block is read. A table that fails
is made again.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import PIL
import torchvision
from PIL import Image

from data.digests import file_digest, pixel_digests, short
from data.picture import depth_line, prepared, read_prepared
from data.sets import Listing, Mapped, RawData
from utils import plugins
from utils.errors import UserError
from utils.files import remove_leftovers, write_atomically, write_text
from utils.runlog import progress

logger = logging.getLogger(__name__)
T = TypeVar("T")
Decode = Callable[[int], "np.ndarray | str"]  # a picture's number -> (H, W, 3) uint8, or why it cannot be read

FORMAT = 4  # whatever changes the pixels or the description raises it
BLOCK = 4 << 20  # bytes of the images that are checked together
SAMPLE = 16  # blocks that are read when a table is opened: 64 MiB, 0.1 s; and as many of the pictures' own files
WINDOW = 256  # pictures that are decoded ahead of the writing: 40 MB at 224 px
LISTED = 100  # unreadable pictures that are said by name; the table's .json has all of them


@dataclass(frozen=True)
class Table:
    """A table and the pictures that are not in it."""

    images: np.ndarray  # (n, H, W, 3) uint8, mapped into memory copy-on-write where n > 0
    kept: np.ndarray  # (n,) int64, the numbers of the pictures in it, ascending
    unreadable: tuple[tuple[int, str], ...]  # numbers of the others, and why
    digests: tuple[str, ...]  # n, of the images' pixels


@dataclass(frozen=True)
class Pictures:
    """N pictures that a table is made of, and what tells whether one has changed without decoding it."""

    names: Sequence[str]
    marks: Sequence[str | None]  # equal marks mean equal contents; begins with the file's size; None: no such file
    digest: Callable[[int], str | None]  # of the contents that are decoded; None: they cannot be read
    decode: Decode


def to_raw(found: RawData | Listing, pre: Sequence[Any], folder: Path, on_disk: bool) -> RawData:
    """Return a data set as two tables of one size.

    Args:
        pre: the settings of `transform.pre`; each takes a PIL picture, as torchvision's transform of that name does.
        folder: where tables are kept.
        on_disk: keep tables also of data that are in memory already and need no pre-transform.
    Raises:
        UserError: pictures of several sizes; pictures that cannot be read, unless the listing skips them.
    """
    if isinstance(found, RawData):
        if not pre and not on_disk:
            return found
        train, test = (
            table_of_array(images, pre, folder, name)
            for images, name in ((found.train_images, "train"), (found.test_images, "test"))
        )
        return replace(
            found, train_images=train.images, test_images=test.images, train_digests=train.digests, test_digests=test.digests
        )
    pre = pre or found.pre
    limits = found.limits
    train = table_of_files(found.root, found.train_files, pre, folder, f"{found.name}-train", limits[0])
    test = table_of_files(found.root, found.test_files, pre, folder, f"{found.name}-test", limits[1])
    tell_unreadable(found, train, test)
    if len(test.images) and train.images.shape[1:] != test.images.shape[1:]:
        first, other = found.train_files[train.kept[0]], found.test_files[test.kept[0]]
        raise several_sizes(found.root, shown(first), train.images.shape[1:], shown(other), test.images.shape[1:])
    names, test_names = (
        tuple(name_of(files[i]) for i in table.kept) for files, table in ((found.train_files, train), (found.test_files, test))
    )
    raw = RawData(
        train.images, found.train_labels[train.kept], test.images, found.test_labels[test.kept], found.class_names,
        names, test_names, train.digests, test.digests,
    )  # fmt: skip
    for label, count in enumerate(np.bincount(raw.train_labels, minlength=int(found.train_labels.max()) + 1)):
        if count == 0 and (found.train_labels == label).any():
            raise UserError(
                f"{found.root}: class {found.class_names[label]}: no training picture of it can be read: repair them"
            )
    return raw


def name_of(file: str) -> str:
    """Return a picture's name: its path from the class folder on."""
    return "/".join(file.split("/")[-2:])


def table_of_files(
    root: Path, files: Sequence[str], pre: Sequence[Any], folder: Path, name: str, limit: int | None = None
) -> Table:
    """Return the table of picture files, paths relative to `root`.

    Args:
        limit: what the list of files was cut to.
    """
    paths = [root / file for file in files]
    depths: list[int] = []

    def decode(i: int) -> np.ndarray | str:
        return read_prepared(paths[i], pre, depths)

    pictures = Pictures(files, [mark_of(path) for path in paths], lambda i: file_digest(paths[i]), decode)
    classes = sorted({file.rpartition("/")[0] for file in files})
    key = digest_of([os.path.realpath(root), classes, limit, described_steps(pre)])
    table = keep_table(root, folder / f"{name}-{key}.u8", name, recipe_of(pre), pictures)
    scaled = depth_line(depths, len(files))
    if scaled:
        logger.info(f"{name}: {scaled}")
    return table


def table_of_array(images: np.ndarray, pre: Sequence[Any], folder: Path, name: str) -> Table:
    """Return the table of (N, H, W, 3) uint8 images that are in memory."""

    def decode(i: int) -> np.ndarray:
        return prepared(Image.fromarray(images[i]), pre) if pre else images[i]

    digests = pixel_digests(images)
    pictures = Pictures([f"image {i}" for i in range(len(images))], digests, lambda i: digests[i], decode)
    key = digest_of([images.shape, digests, described_steps(pre)])
    return keep_table(folder, folder / f"array-{name}-{key}.u8", f"array-{name}", recipe_of(pre), pictures)


def mark_of(path: Path) -> str | None:
    """Return what a file is recognized by without reading it: size, times of change of contents and inode, inode number."""
    try:
        status = path.stat()
    except OSError:  # a link to nowhere: the decoder says so
        return None
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def described_steps(pre: Sequence[Any]) -> list[str]:
    """Return the pre-transforms with their settings."""
    return [f"{type(step).__module__} {step!r}" for step in pre]


def recipe_of(pre: Sequence[Any]) -> str:
    """Return the digest of all that pixels depend on beside the pictures themselves."""
    return digest_of([described_steps(pre), PIL.__version__, torchvision.__version__])


def digest_of(facts: Any) -> str:
    """Return the digest of what JSON can express."""
    return short(json.dumps(facts).encode())


# -- Tables ------------------------------------------------------------------------------------------------------------


class KeptTable:
    """A whole table that was found on the disk, and what it knows of its pictures.

    Attributes:
        described: the `.json`.
        images: (n, H, W, 3) uint8.
        trust: the same mark means the same contents; false once a picture has shown otherwise.
    """

    def __init__(self, described: dict[str, Any], images: np.ndarray) -> None:
        self.described, self.images, self.trust = described, images, True
        left_out = {i for i, _ in described["unreadable"]}
        rows = [i for i in range(len(described["files"])) if i not in left_out]
        self.rows = {described["files"][i]: (row, i) for row, i in enumerate(rows)}  # row and number of each picture in it

    def row(self, pictures: Pictures, i: int, trust: bool) -> int | None:
        """Return the row of picture `i`; None where it is not in the table or has changed."""
        row, at = self.rows.get(pictures.names[i], (None, 0))
        now, then = pictures.marks[i], self.described["marks"][at]
        if row is None or now is None or then is None:
            return None
        if now == then and trust:
            return row
        if now.split()[0] != then.split()[0]:
            return None
        digest = pictures.digest(i)
        if digest is None and now == then:  # a failure to read is no sign of change
            return row
        return row if digest is not None and digest == self.described["sources"][at] else None

    def is_of(self, pictures: Pictures) -> bool:
        """Return whether every picture is the one that was decoded, or was and is unreadable."""
        if self.described["files"] != list(pictures.names):
            return False
        readable, marks = [at for _, at in self.rows.values()], self.described["marks"]
        same = [i for i in readable if marks[i] == pictures.marks[i]]
        sample = random.Random().sample(same, min(SAMPLE, len(same)))
        self.trust = all(self.row(pictures, i, trust=False) is not None for i in sample)
        unsure = [i for i in readable if marks[i] != pictures.marks[i]]
        compared = in_threads(unsure, lambda i: self.row(pictures, i, trust=False), "comparing pictures")
        return self.trust and all(row is not None for row in compared)

    def unreadable(self, pictures: Pictures) -> list[tuple[int, str]] | None:
        """Try the unreadable pictures again; return them with the reasons, or None where one can be read now."""
        tried = ((i, pictures.decode(i)) for i, _ in self.described["unreadable"])
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


def keep_table(root: Path, path: Path, name: str, recipe: str, pictures: Pictures) -> Table:
    """Return the table of these pictures: a kept one, else made and kept. A line says which.

    Args:
        root: named where pictures are of several sizes.
        path: of the table, if it has to be made.
    """
    if not pictures.names:
        return Table(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.int64), (), ())
    earlier = None
    for candidate in (path, *sorted(p.with_suffix(".u8") for p in path.parent.glob(f"{name}-*.json") if p.stem != path.stem)):
        described = read_description(candidate)
        if described is not None and (described["format"] != FORMAT or described["recipe"] != recipe):
            continue
        if candidate != path and (described is None or described["files"] != list(pictures.names)):
            continue
        kept = None if described is None else open_table(candidate, described)
        if kept is None:
            if candidate == path and path.exists() and path.with_suffix(".json").exists():
                logger.info(f"{name}: {path} is damaged: it is made again")
            continue
        unreadable = kept.unreadable(pictures) if kept.is_of(pictures) else None
        if unreadable is not None:
            note(candidate, kept, pictures)
            logger.info(f"{name}: uses {candidate}, decoded before from the same pictures")
            return as_table(kept, unreadable)
        if candidate == path:
            earlier = kept
    make_table(root, path, name, recipe, pictures, earlier)
    described = read_description(path)
    made = None if described is None else open_table(path, described)
    if made is None:
        raise UserError(f"{path}: does not hold what was just written into it: check the disk, or set data.cache_dir")
    total = sum(file.stat().st_size for file in path.parent.glob("*.u8"))
    size = f"{made.images.nbytes / 1e9:.2f} GB; all tables there take {total / 1e9:.2f} GB and may be deleted"
    logger.info(f"{name}: made {path} ({size})")
    return as_table(made, made.described["unreadable"])


def as_table(kept: KeptTable, unreadable: Iterable[Sequence[Any]]) -> Table:
    """Return what a data set needs of a table."""
    numbers = np.asarray([at for _, at in kept.rows.values()], np.int64)
    reasons = tuple((int(i), str(reason)) for i, reason in unreadable)
    return Table(kept.images, numbers, reasons, tuple(kept.described["digests"]))


def make_table(root: Path, path: Path, name: str, recipe: str, pictures: Pictures, earlier: KeptTable | None = None) -> None:
    """Write the table's two files.

    Args:
        earlier: the table that these files hold, of which rows of unchanged pictures are copied.
    """
    remove_leftovers(path.parent)
    names = pictures.names
    unreadable: list[tuple[int, str]] = []
    sources: list[str | None] = []
    digests: list[str] = []
    shape: list[int] = []  # height, width, 3
    first = 0

    def produce(i: int) -> tuple[np.ndarray | str, str | None]:
        row = earlier.row(pictures, i, earlier.trust) if earlier else None
        pixels: np.ndarray | str | None = earlier.pixels(row) if earlier and row is not None else None
        if pixels is not None and earlier is not None:
            return pixels, earlier.described["sources"][earlier.rows[names[i]][1]]
        source = pictures.digest(i)  # before it is decoded: if it changes in between, the next start finds another digest
        return pictures.decode(i), source

    def write(file: IO[bytes]) -> None:
        nonlocal shape, first
        for i, (pixels, source) in enumerate(in_threads(range(len(names)), produce, f"decoding {name}")):
            sources.append(source)
            if isinstance(pixels, str):
                unreadable.append((i, pixels))
                continue
            if not shape:
                shape, first = list(pixels.shape), i
            elif list(pixels.shape) != shape:
                raise several_sizes(root, shown(names[first]), shape, shown(names[i]), pixels.shape)
            data = np.ascontiguousarray(pixels).data
            file.write(data)
            digests.append(short(data))

    write_atomically(path, write)
    write_description(path, {
        "format": FORMAT, "recipe": recipe, "shape": [len(digests), *(shape or [0, 0, 3])], "unreadable": unreadable,
        "files": list(names), "marks": list(pictures.marks), "sources": sources, "digests": digests,
        "mtime_ns": path.stat().st_mtime_ns,
    })  # fmt: skip


def decoded(count: int, decode: Decode, name: str) -> Iterator[np.ndarray | str]:
    """Yield what `decode` makes of every picture, in order, decoded by as many threads as there are cores.

    Pillow lets other threads run while it decodes and resizes, so threads do as well as processes and copy nothing.
    """
    return in_threads(range(count), decode, name)


def in_threads(items: Sequence[int], work: Callable[[int], T], name: str) -> Iterator[T]:
    """Yield `work(item)` of every item, in order, from as many threads as there are cores, a window ahead of the reader."""

    def windows() -> Iterator[T]:
        with ThreadPoolExecutor(cores()) as pool:
            for start in range(0, len(items), WINDOW):
                yield from pool.map(work, items[start : start + WINDOW])

    yield from progress(windows(), name, len(items))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rows_per_block(shape: Sequence[int]) -> int:
    """Return how many images of (H, W, 3) bytes are checked together."""
    return max(1, BLOCK // max(1, int(np.prod(shape))))


def write_description(path: Path, described: dict[str, Any]) -> None:
    """Write the `.json` of a table, with a checksum of itself."""
    text = json.dumps(described, sort_keys=True)
    write_text(path.with_suffix(".json"), json.dumps(described | {"sha256": sha256(text.encode()).hexdigest()}, sort_keys=True))


def read_description(path: Path) -> dict[str, Any] | None:
    """Return what the `.json` of a table says, or None if it is damaged."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        checksum = described.pop("sha256")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None
    text = json.dumps(described, sort_keys=True)
    return described if checksum == sha256(text.encode()).hexdigest() else None


def open_table(path: Path, described: dict[str, Any]) -> KeptTable | None:
    """Map a kept table; None if it is damaged."""
    shape = tuple(described["shape"])
    try:
        file = open(path, "rb")  # noqa: SIM115 - open as long as the table is used
    except OSError:
        return None
    status = os.fstat(file.fileno())
    pictures = len(described["files"])
    whole = status.st_size == int(np.prod(shape)) and shape[0] + len(described["unreadable"]) == pictures
    untouched = status.st_mtime_ns == described["mtime_ns"]
    if not whole or not sound(file, shape, described["digests"], SAMPLE if untouched else None):
        file.close()
        return None
    return KeptTable(described, map_table(file, shape))


def note(path: Path, kept: KeptTable, pictures: Pictures) -> None:
    """Note the marks of a table and of its pictures where they have changed (copied, touched) and everything was right.

    It only saves the next start from comparing again, so a folder that may not be written to is no error.
    """
    seen = {"mtime_ns": path.stat().st_mtime_ns, "marks": list(pictures.marks)}
    if kept.described | seen != kept.described:
        with suppress(UserError, OSError):
            write_description(path, kept.described | seen)


def sound(file: IO[bytes], shape: Sequence[int], digests: Sequence[str], sample: int | None) -> bool:
    """Return whether the images of a table's blocks have their digests.

    Args:
        sample: how many blocks are read: the first, the last and others by chance; None: all of them.
    """
    rows, size = rows_per_block(shape[1:]), int(np.prod(shape[1:]))
    starts = range(0, len(digests), rows)
    chosen = set(starts)
    if sample is not None and len(starts) > sample:
        chosen = {0, starts[-1], *random.Random().sample(starts, sample - 2)}
    for start in sorted(chosen):
        wanted = tuple(digests[start : start + rows])
        file.seek(start * size)
        block = np.frombuffer(file.read(len(wanted) * size), np.uint8)
        if len(block) != len(wanted) * size or pixel_digests(block.reshape(len(wanted), size)) != wanted:
            return False
    return True


def map_table(file: IO[bytes], shape: Sequence[int]) -> np.ndarray:
    """Map a table's file into memory. What is written to the array goes to memory of this process, never to the file."""
    if not np.prod(shape):
        return np.zeros(tuple(shape), np.uint8)
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)  # it may be larger than the memory
    bytes_ = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    table = np.frombuffer(bytes_, np.uint8).reshape(tuple(shape)).view(Mapped)
    table.file = file
    return table


def own_copy(images: np.ndarray, placement: str) -> np.ndarray:
    """Return images that may be written to, for a set of that placement; the given ones stay as they are.

    A mapped table is mapped once more, which costs nothing until something is written; for placement `host` it is read.
    """
    if not isinstance(images, Mapped) or images.file is None:
        return images.copy()
    return read_table(images) if placement == "host" else map_table(images.file, images.shape)


def read_table(images: np.ndarray) -> np.ndarray:
    """Return a mapped table in memory: its file is read, not the map, whose pages would count as well. Others as they are."""
    if not isinstance(images, Mapped) or images.file is None:
        return images
    images.file.seek(0)
    return np.fromfile(images.file, np.uint8).reshape(images.shape)


# -- What is said ------------------------------------------------------------------------------------------------------


def several_sizes(root: Path, first: str, shape: Sequence[int], other: str, other_shape: Sequence[int]) -> UserError:
    """Return the error of pictures that make no table."""
    remedies = plugins.declared("data.transforms", "TO_ONE_SIZE").values()
    return UserError(
        f"{root}: pictures of several sizes: {first} is {shape[1]} x {shape[0]} pixels, {other} is {other_shape[1]} x "
        f"{other_shape[0]}: bring them to one in transform.pre, e.g. {' or '.join(remedies)}"
    )


def tell_unreadable(listing: Listing, train: Table, test: Table) -> None:
    """Log by name which pictures cannot be read, and refuse them unless the listing skips them."""
    lines = [
        f"{shown(files[i])}: {shown(reason)}"
        for files, table in ((listing.train_files, train), (listing.test_files, test))
        for i, reason in table.unreadable
    ]
    if not lines:
        return
    for line in lines[:LISTED]:
        logger.info(f"cannot be read: {line}")
    if len(lines) > LISTED:
        logger.info(f"cannot be read: {len(lines) - LISTED} more")
    total = len(listing.train_files) + len(listing.test_files)
    if not listing.skip_unreadable or len(train.kept) == 0:
        raise UserError(
            f"{listing.root}: {len(lines)} of {total} pictures cannot be read (first: {lines[0]}): repair or remove them, "
            f"or leave them out with --set dataset.{listing.name}.skip_unreadable=true; without them a run that was begun with "
            "them needs another name, --set run=NAME"
        )
    logger.info(f"{len(lines)} of {total} pictures are left out (dataset.{listing.name}.skip_unreadable)")


def shown(text: str) -> str:
    """Return a file's name or text as a line may show it: without line breaks and control characters."""
    return text if text.isprintable() else ascii(text)
