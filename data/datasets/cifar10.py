"""CIFAR-10 (Krizhevsky, 2009) in its authors' python layout, a folder `cifar-10-batches-py` of six pickles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sets import RawData
from data.unpickle import read_pickle
from utils.errors import UserError
from utils.paths import is_file, user_path

FOLDER_NAMES = "^(?!.*cifar-?100).*cifar"
FOLDER = "cifar-10-batches-py"
BACKDOORBENCH = "cifar10"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Settings:
    """No settings: `dataset: cifar10`."""


def load(settings: Settings, dataset_dir: str | None, download: bool) -> RawData:
    """Read the six batches, in order, whatever their lengths."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder of cifar-10-batches-py")
    folder = find_folder(user_path(dataset_dir, "dataset_dir"), download, "CIFAR-10", FOLDER, (TRAIN[0], TEST[0]))
    train_images, train_labels = read_batches(folder, TRAIN)
    test_images, test_labels = read_batches(folder, TEST)
    return RawData(train_images, train_labels, test_images, test_labels, CLASSES)


def find_folder(folder: Path, download: bool, title: str, inside: str, files: tuple[str, ...]) -> Path:
    """Return the folder of a CIFAR set's files: the one named or the one inside it; fetch it where that is allowed.

    Args:
        title: `CIFAR-10` or `CIFAR-100`.
        inside: the name of the folder that its authors pack.
        files: any of them tells that the set is there.
    """
    for candidate in (folder, folder / inside):
        if any(is_file(candidate / name, "dataset_dir") for name in files):
            return candidate
    if not download:
        raise UserError(
            f"dataset_dir: {folder}: {title} is not there: get {title.lower()}-python.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there, or set download: true (--set download=true)"
        )
    import torchvision.datasets  # only here: it brings in all of torchvision

    parent = folder.parent if folder.name == inside else folder
    try:
        getattr(torchvision.datasets, title.replace("-", ""))(str(parent), download=True)
    except Exception as error:  # the downloader raises whatever its network stack does
        what = " ".join(str(error).split())
        raise UserError(f"dataset_dir: {folder}: the download failed ({what}): fetch {title} by hand") from None
    return parent / inside


def read_batches(folder: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,) int64 of the named batches, concatenated."""
    parts = [read_batch(folder / name) for name in names]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def read_batch(path: Path, name: str = "CIFAR-10", key: str = "labels", classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch and check that it is one.

    Args:
        name: of the data set, for errors.
        key: where the batch keeps its labels.
    """
    batch = read_pickle(path)
    if not isinstance(batch, dict) or not {"data", key} <= batch.keys():
        raise UserError(f"{path}: is no {name} batch (no data and {key} inside): unpack the data set again")
    images, labels = batch["data"], batch[key]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        shape = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise UserError(f"{path}: data is {shape} and not uint8 (N, 3072): unpack the data set again")
    if len(images) == 0:
        raise UserError(f"{path}: holds no image: unpack the data set again")
    count = len(labels) if isinstance(labels, list) or (isinstance(labels, np.ndarray) and labels.ndim == 1) else "no"
    if count != len(images):
        raise UserError(f"{path}: {count} labels for {len(images)} images: unpack the data set again")
    for label in labels:
        if not (isinstance(label, (int, np.integer)) and 0 <= label < classes):
            raise UserError(f"{path}: label {label!r:.40} is not in 0..{classes - 1}: unpack the data set again")
    pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.asarray(labels, np.int64)
