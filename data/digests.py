"""Digests that identify images and files by their contents, and a run's manifest, which is made of them.

A digest is 64 bits of a SHA-256, as 16 hexadecimal digits: two different contents collide by accident once in 10^19 pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from data.io.image_file import image_files
from data.sets import RawData
from utils.config import Config
from utils.config.schema import stand_ins
from utils.errors import UserError
from utils.manifest import INPUT, TEST, TRAIN, Row, to_text, with_input
from utils.names import class_name
from utils.paths import is_dir, named_path
from utils.run_files import POISON_INDEX

CHUNK = 1 << 20  # bytes of a file that are read at a time


def short(contents: Any) -> str:
    """Return the digest of bytes, or of a C-contiguous array's bytes."""
    return sha256(contents).hexdigest()[:16]


def pixel_digests(images: np.ndarray) -> tuple[str, ...]:
    """Return the digest of each of (n, H, W, 3) uint8 images: 60,000 of 32 px take 0.2 s."""
    return tuple(short(np.ascontiguousarray(image).data) for image in images)


def file_digest(path: Path) -> str | None:
    """Return the digest of a file's bytes, or None if it is not a regular file or cannot be read."""
    digest = sha256()
    try:
        if not S_ISREG(path.stat().st_mode):
            return None
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()[:16]


def digest_of_named(name: str, key: str) -> str:
    """Return the digest of the file, or of the image files directly in the folder, that a setting names.

    The name of the file or folder does not count; the names of the files in the folder count for their order only.

    Args:
        name: a path, as in `utils.paths.named_path`.
        key: the setting, for the error.
    Raises:
        UserError: there is no such file or folder, or a file cannot be read.
    """
    path = named_path(name, key)
    folder = is_dir(path, key)
    files = image_files(path) if folder else [path]
    parts = [file_digest(file) for file in files]
    if None in parts:
        raise UserError(f"{key}: {files[parts.index(None)]}: cannot be read: make it readable")
    return short(repr(parts).encode()) if folder else parts[0]  # type: ignore[return-value]


# -- The manifest ------------------------------------------------------------------------------------------------------


def manifest_of(config: Config, raw: RawData) -> str:
    """Return the manifest of the configured data: all images before the attack, and the files that settings name."""
    rows = [
        *image_rows(TRAIN, raw.names, raw.train_labels, raw.class_names, digests_of(raw, TRAIN)),
        *image_rows(TEST, raw.test_names, raw.test_labels, raw.class_names, digests_of(raw, TEST)),
    ]
    files = [(key, value) for key, kind, value in stand_ins(config) if kind == "files" and value is not None]
    return to_text([*rows, *(Row(INPUT, key, "", digest_of_named(value, key)) for key, value in files)])


def digest_of_manifest(config: Config, raw: RawData) -> str:
    """Return the digest of `manifest_of`: that of all inputs of a poisoned set but the settings."""
    return short(manifest_of(config, raw).encode("utf-8", "surrogateescape"))


def digests_of(raw: RawData, part: str) -> tuple[str, ...]:
    """Return the digests of the training or the test images; computed unless they came with a table."""
    known, images = (raw.train_digests, raw.train_images) if part == TRAIN else (raw.test_digests, raw.test_images)
    return pixel_digests(images) if known is None else known


def image_rows(
    part: str, names: tuple[str, ...] | None, labels: np.ndarray, class_names: tuple[str, ...], digests: Iterable[str]
) -> list[Row]:
    """Return the rows of one part's images with labels (n,) int64; without names, the images are numbered."""
    names = names or tuple(map(str, range(len(labels))))
    classes = [class_name(label, class_names) for label in labels.tolist()]
    return [Row(part, *row) for row in zip(names, classes, digests, strict=True)]


def with_poisoned(known: str, poisoned: np.ndarray) -> str:
    """Return the manifest with the information which training images are poisoned, (N,) bool, added to it."""
    return with_input(known, POISON_INDEX, short(np.ascontiguousarray(poisoned, np.uint8).data))
