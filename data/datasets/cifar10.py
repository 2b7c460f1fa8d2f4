"""CIFAR-10 (Krizhevsky, 2009) in its authors' Python layout: a folder `cifar-10-batches-py` with six pickles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.datasets._cifar import find_folder, read_batch
from data.sets import RawData
from utils.errors import UserError
from utils.paths import user_path

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
    """Read the six batches in order; they may have any length."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder cifar-10-batches-py")
    folder = find_folder(user_path(dataset_dir, "dataset_dir"), download, "CIFAR-10", FOLDER, (TRAIN[0], TEST[0]))
    train_images, train_labels = read_batches(folder, TRAIN)
    test_images, test_labels = read_batches(folder, TEST)
    return RawData(train_images, train_labels, test_images, test_labels, CLASSES)


def read_batches(folder: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,) int64 of the named batches, concatenated."""
    parts = [read_batch(folder / name, "CIFAR-10", "labels", len(CLASSES)) for name in names]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
