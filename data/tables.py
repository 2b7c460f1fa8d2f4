"""One table (n, H, W, 3) uint8 out of many pictures: decoded in parallel, brought to one size, kept on disk.

A table is two files: `<name>-<digest>.u8`, the pixels and nothing else, so that it can be mapped into memory, and a
`.json` beside it that says what the pixels are. The digest is that of everything they depend on: names, sizes and times of
change of the picture files (or the pixels of arrays), the pre-transforms, the versions of the decoder and of this format.

Opening a table does not read all of it, for at 224 px it has gigabytes. Checked are: the `.json` by its own checksum, the
size of the pixel file, and of its blocks (4 MiB, SHA-256 each) the first, the last and some others, every time other ones.
Where the file's time of change is not the one that was noted, every block is read. A table that fails is made again.
"""

from __future__ import annotations

import json
import mmap
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
import torchvision
from PIL import Image

from data.picture import depth_line, prepared, read_prepared
from data.sets import Listing, Mapped, RawData
from utils.errors import UserError
from utils.files import remove_leftovers, write_atomically, write_text
from utils.runlog import progress

Say = Callable[[str], object]
Decode = Callable[[int], "np.ndarray | str"]  # a picture's number -> (H, W, 3) uint8, or why it cannot be read

FORMAT = 2  # 2: levels of more than 8 bits are scaled by the range that the file uses, EXIF orientation is honoured
BLOCK = 4 << 20  # bytes under one checksum
SAMPLE = 16  # blocks that are read when a table is opened: 64 MiB, 0.1 s
WINDOW = 256  # pictures that are decoded ahead of the writing: 40 MB at 224 px
LISTED = 100  # unreadable pictures that are said by name; the table's .json has all of them


@dataclass(frozen=True)
class Table:
    """A table and the pictures that are not in it."""

    images: np.ndarray  # (n, H, W, 3) uint8, mapped into memory copy-on-write where n > 0
    kept: np.ndarray  # (n,) int64, the numbers of the pictures in it, ascending
    unreadable: tuple[tuple[int, str], ...]  # numbers of the others, and why


def to_raw(found: RawData | Listing, pre: Sequence[Any], folder: Path, on_disk: bool, say: Say) -> RawData:
    """Return a data set as two tables of one size.

    Args:
        pre: the settings of `transform.pre`; each takes a PIL picture, as torchvision's transform of that name does.
        folder: where tables are kept.
        on_disk: keep tables also of data that are in memory already and need no pre-transform.
        say: is told, in a line, what is made, what is used again, and each picture that cannot be read.
    Raises:
        UserError: pictures of several sizes; pictures that cannot be read, unless the listing skips them.
    """
    if isinstance(found, RawData):
        if not pre and not on_disk:
            return found
        train, test = (
            table_of_array(images, pre, folder, name, say)
            for images, name in ((found.train_images, "train"), (found.test_images, "test"))
        )
        return RawData(train.images, found.train_labels, test.images, found.test_labels, found.class_names, found.names)
    pre = pre or found.pre
    train = table_of_files(found.root, found.train_files, pre, folder, f"{found.name}-train", say)
    test = table_of_files(found.root, found.test_files, pre, folder, f"{found.name}-test", say)
    tell_unreadable(found, train, test, say)
    if len(test.images) and train.images.shape[1:] != test.images.shape[1:]:
        first, other = found.train_files[train.kept[0]], found.test_files[test.kept[0]]
        raise several_sizes(found.root, shown(first), train.images.shape[1:], shown(other), test.images.shape[1:])
    names = tuple(name_of(found.train_files[i]) for i in train.kept)
    raw = RawData(
        train.images, found.train_labels[train.kept], test.images, found.test_labels[test.kept], found.class_names, names
    )
    for label, count in enumerate(np.bincount(raw.train_labels, minlength=int(found.train_labels.max()) + 1)):
        if count == 0 and (found.train_labels == label).any():
            raise UserError(f"{found.root}: class {found.class_names[label]}: no training picture of it can be read: mend them")
    return raw


def name_of(file: str) -> str:
    """Return a training picture's name: its path from the class folder on."""
    return "/".join(file.split("/")[-2:])


def table_of_files(root: Path, files: Sequence[str], pre: Sequence[Any], folder: Path, name: str, say: Say) -> Table:
    """Return the table of picture files, paths relative to `root`."""
    depths: list[int] = []

    def decode(i: int) -> np.ndarray | str:
        return read_prepared(root / files[i], pre, depths)

    digest = digest_of(pre, "files")
    for file in files:
        try:
            status = (root / file).stat()
            facts = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # a link to nowhere: the decoder will say so
            facts = "missing"
        digest.update(os.fsencode(file) + f"\0{facts}\n".encode())
    table = keep_table(root, folder, name, digest.hexdigest(), files, decode, say)
    scaled = depth_line(depths, len(files))
    if scaled:
        say(f"{name}: {scaled}")
    return table


def table_of_array(images: np.ndarray, pre: Sequence[Any], folder: Path, name: str, say: Say) -> Table:
    """Return the table of (N, H, W, 3) uint8 images that are in memory."""

    def decode(i: int) -> np.ndarray:
        return prepared(Image.fromarray(images[i]), pre) if pre else images[i]

    digest = digest_of(pre, f"array {images.shape}")
    digest.update(np.ascontiguousarray(images).data)
    names = [f"image {i}" for i in range(len(images))]
    return keep_table(folder, folder, f"array-{name}", digest.hexdigest(), names, decode, say)


def digest_of(pre: Sequence[Any], kind: str) -> Any:
    """Return a SHA-256 that has taken in all that pixels depend on beside the pictures themselves."""
    steps = [f"{type(step).__module__} {step!r}" for step in pre]
    return sha256(f"{FORMAT} {kind} {steps} {PIL.__version__} {torchvision.__version__}\n".encode())


# -- Tables ------------------------------------------------------------------------------------------------------------


def keep_table(root: Path, folder: Path, name: str, digest: str, names: Sequence[str], decode: Decode, say: Say) -> Table:
    """Return the table of that digest: the kept one if it is sound, else made and kept. A line says which.

    Args:
        root: named where pictures are of several sizes.
        names: of the pictures.
    """
    if not names:
        return Table(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.int64), ())
    path = folder / f"{name}-{digest[:16]}.u8"
    if path.exists() and path.with_suffix(".json").exists():
        table = open_table(path, digest, len(names))
        if table is not None:
            say(f"{name}: uses {path}, decoded before from the same pictures")
            return table
        say(f"{name}: {path} is damaged: it is made again")
    make_table(root, path, digest, name, names, decode)
    table = open_table(path, digest, len(names))
    if table is None:
        raise UserError(f"{path}: does not hold what was just written into it: check the disk, or set data.cache_dir")
    say(f"{name}: made {path} ({table.images.nbytes / 1e9:.2f} GB)")
    return table


def make_table(root: Path, path: Path, digest: str, name: str, names: Sequence[str], decode: Decode) -> None:
    """Decode all pictures and write the table's two files."""
    remove_leftovers(path.parent)
    unreadable: list[tuple[int, str]] = []
    blocks: list[str] = []
    shape: list[int] = []  # height, width, 3
    first = 0

    def write(file: IO[bytes]) -> None:
        nonlocal shape, first
        rows, block = 0, sha256()
        for i, pixels in enumerate(decoded(len(names), decode, f"decoding {name}")):
            if isinstance(pixels, str):
                unreadable.append((i, pixels))
                continue
            if not shape:
                shape, first = list(pixels.shape), i
            elif list(pixels.shape) != shape:
                raise several_sizes(root, shown(names[first]), shape, shown(names[i]), pixels.shape)
            data = np.ascontiguousarray(pixels).data
            file.write(data)
            block.update(data)
            rows += 1
            if rows % rows_per_block(shape) == 0:
                blocks.append(block.hexdigest())
                block = sha256()
        if shape and rows % rows_per_block(shape):
            blocks.append(block.hexdigest())

    write_atomically(path, write)
    described = {
        "format": FORMAT, "digest": digest, "shape": [len(names) - len(unreadable), *(shape or [0, 0, 3])],
        "unreadable": unreadable, "blocks": blocks, "mtime_ns": path.stat().st_mtime_ns,
    }  # fmt: skip
    write_description(path, described)


def decoded(count: int, decode: Decode, name: str) -> Iterator[np.ndarray | str]:
    """Yield what `decode` makes of every picture, in order, decoded by as many threads as there are cores.

    Pillow lets other threads run while it decodes and resizes, so threads do as well as processes and copy nothing.
    """

    def windows() -> Iterator[np.ndarray | str]:
        with ThreadPoolExecutor(cores()) as pool:
            for start in range(0, count, WINDOW):
                yield from pool.map(decode, range(start, min(start + WINDOW, count)))

    yield from progress(windows(), name, count)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rows_per_block(shape: Sequence[int]) -> int:
    """Return how many pictures of (H, W, 3) bytes are under one checksum."""
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


def open_table(path: Path, digest: str, count: int) -> Table | None:
    """Map a kept table of `count` pictures; None if it is damaged or not of that digest."""
    described = read_description(path)
    if described is None or described["format"] != FORMAT or described["digest"] != digest:
        return None
    shape, unreadable = tuple(described["shape"]), tuple((i, reason) for i, reason in described["unreadable"])
    status = path.stat()
    if status.st_size != int(np.prod(shape)) or shape[0] + len(unreadable) != count:
        return None
    untouched = status.st_mtime_ns == described["mtime_ns"]
    if not sound(path, shape, described["blocks"], SAMPLE if untouched else None):
        return None
    if not untouched:  # copied or touched, and every block is right
        write_description(path, described | {"mtime_ns": status.st_mtime_ns})
    kept = np.setdiff1d(np.arange(count), [i for i, _ in unreadable])
    return Table(map_table(path, shape), kept, unreadable)


def sound(path: Path, shape: Sequence[int], blocks: Sequence[str], sample: int | None) -> bool:
    """Return whether a table's blocks have their checksums.

    Args:
        sample: how many are read: the first, the last and others by chance; None: all of them.
    """
    size = rows_per_block(shape[1:]) * int(np.prod(shape[1:]))
    chosen = set(range(len(blocks)))
    if sample is not None and len(blocks) > sample:
        chosen = {0, len(blocks) - 1, *random.Random().sample(range(len(blocks)), sample - 2)}
    with open(path, "rb") as file:
        for i in sorted(chosen):
            file.seek(i * size)
            if sha256(file.read(size)).hexdigest() != blocks[i]:
                return False
    return True


def map_table(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Map a table's file into memory. What is written to the array goes to memory of this process, never to the file."""
    if not np.prod(shape):
        return np.zeros(tuple(shape), np.uint8)
    with open(path, "rb") as file:
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)  # it may be larger than the memory
        bytes_ = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    table = np.frombuffer(bytes_, np.uint8).reshape(tuple(shape)).view(Mapped)
    table.path = path
    return table


def own_copy(images: np.ndarray, placement: str) -> np.ndarray:
    """Return images that may be written to, for a set of that placement; the given ones stay as they are.

    A mapped table is mapped once more, which costs nothing until something is written; for placement `host` it is read.
    """
    if not isinstance(images, Mapped) or images.path is None:
        return images.copy()
    return read_table(images) if placement == "host" else map_table(images.path, images.shape)


def read_table(images: np.ndarray) -> np.ndarray:
    """Return a mapped table in memory: its file is read, not the map, whose pages would count as well. Others as they are."""
    if not isinstance(images, Mapped) or images.path is None:
        return images
    return np.fromfile(images.path, np.uint8).reshape(images.shape)


# -- What is said ------------------------------------------------------------------------------------------------------


def several_sizes(root: Path, first: str, shape: Sequence[int], other: str, other_shape: Sequence[int]) -> UserError:
    """Return the error of pictures that make no table."""
    return UserError(
        f"{root}: pictures of several sizes: {first} is {shape[1]} x {shape[0]} pixels, {other} is {other_shape[1]} x "
        f"{other_shape[0]}: bring them to one in transform.pre, e.g. {{resize: {{size: 256}}, center_crop: {{size: 224}}}}"
    )


def tell_unreadable(listing: Listing, train: Table, test: Table, say: Say) -> None:
    """Say by name which pictures cannot be read, and refuse them unless the listing skips them."""
    lines = [
        f"{shown(files[i])}: {shown(reason)}"
        for files, table in ((listing.train_files, train), (listing.test_files, test))
        for i, reason in table.unreadable
    ]
    if not lines:
        return
    for line in lines[:LISTED]:
        say(f"cannot be read: {line}")
    if len(lines) > LISTED:
        say(f"cannot be read: {len(lines) - LISTED} more")
    total = len(listing.train_files) + len(listing.test_files)
    if not listing.skip_unreadable or len(train.kept) == 0:
        raise UserError(
            f"{listing.root}: {len(lines)} of {total} pictures cannot be read (first: {lines[0]}): mend or remove them, or "
            f"leave them out with --set dataset.{listing.name}.skip_unreadable=true"
        )
    say(f"{len(lines)} of {total} pictures are left out (dataset.{listing.name}.skip_unreadable)")


def shown(text: str) -> str:
    """Return a file's name or text as a line may show it: without line breaks and control characters."""
    return text if text.isprintable() else ascii(text)
