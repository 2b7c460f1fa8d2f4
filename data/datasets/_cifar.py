"""What CIFAR-10 and CIFAR-100 have in common: where their folder is found, and the pickled batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.io.unpickle import read_pickle
from utils.errors import UserError, one_line
from utils.paths import is_file


def find_folder(folder: Path, download: bool, title: str, inside: str, files: tuple[str, ...]) -> Path:
    """Return the folder with the files of a CIFAR set: `folder` or the one inside it; download the set if allowed.

    Args:
        title: `CIFAR-10` or `CIFAR-100`.
        inside: the name of the folder in the authors' archive.
        files: if one of these files exists, the set is taken to be complete.
    Raises:
        UserError: the set is missing, or cannot be downloaded.
    """
    for candidate in (folder, folder / inside):
        if any(is_file(candidate / name, "dataset_dir") for name in files):
            return candidate
    if not download:
        raise UserError(
            f"dataset_dir: {folder}: does not contain {title}: download {title.lower()}-python.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there, or set download: true (--set download=true)"
        )
    import torchvision.datasets  # only here: it imports all of torchvision

    parent = folder.parent if folder.name == inside else folder
    try:
        getattr(torchvision.datasets, title.replace("-", ""))(str(parent), download=True)
    except Exception as error:  # the downloader passes on all exceptions of its network libraries
        raise UserError(f"dataset_dir: {folder}: the download failed ({one_line(error)}): download {title} yourself") from None
    return parent / inside


def read_batch(path: Path, name: str, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch and check its contents.

    Args:
        name: of the data set, for error messages.
        key: of the labels in the batch.
    Returns:
        images (N, 32, 32, 3) uint8 and labels (N,) int64.
    Raises:
        UserError: the file is missing, damaged, or not such a batch.
    """
    batch = read_pickle(path)
    if not isinstance(batch, dict) or not {"data", key} <= batch.keys():
        raise UserError(f"{path}: not a {name} batch (without data and {key}): unpack the data set again")
    images, labels = batch["data"], batch[key]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        shape = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise UserError(f"{path}: data is {shape} instead of uint8 (N, 3072): unpack the data set again")
    if len(images) == 0:
        raise UserError(f"{path}: contains no images: unpack the data set again")
    count = len(labels) if isinstance(labels, list) or (isinstance(labels, np.ndarray) and labels.ndim == 1) else "no"
    if count != len(images):
        raise UserError(f"{path}: {count} labels for {len(images)} images: unpack the data set again")
    if isinstance(labels, np.ndarray) and labels.dtype.kind not in "iu":
        raise UserError(f"{path}: {key} is {labels.dtype} instead of integers: unpack the data set again")
    for label in labels:
        if not (isinstance(label, (int, np.integer)) and 0 <= label < classes):
            raise UserError(f"{path}: label {label!r:.40} is not in 0..{classes - 1}: unpack the data set again")
    pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.asarray(labels, np.int64)
