"""The nouns of the data: raw images, an image set on a device, and the ground truth kept apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLEAN, POISONED, COVER = 0, 1, 2  # ground-truth flags; a cover image is altered and keeps its label


@dataclass(frozen=True)
class RawData:
    """A data set as it lies on disk, before the attacker."""

    train_images: np.ndarray  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test_images: np.ndarray  # (M, H, W, 3) uint8
    test_labels: np.ndarray  # (M,) int64
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ImageSet:
    """Images with the labels that they carry, resident on one device. This is all that the defender sees."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> ImageSet:
        """Return the same set on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Oracle:
    """The ground truth of a poisoned training set.

    Only the drawing of seed samples and the reports receive it; the splits and the training never do (threat model).
    """

    flags: Tensor  # (N,) uint8: CLEAN, POISONED or COVER
    original_labels: Tensor  # (N,) int64, before the attacker

    def poisoned(self) -> Tensor:
        """Return (N,) bool: image is poisoned."""
        return self.flags == POISONED


@dataclass(frozen=True)
class Scene:
    """What an attack may know when it is made."""

    raw: RawData
    target_label: int
    num_classes: int
    seed: int
    assets: Path  # folder where made assets are kept, for all runs beside one another
    device: torch.device = torch.device("cpu")  # where assets are made
    say: Callable[[str], object] = print


def to_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    """Return an ImageSet on the CPU from (N, H, W, 3) uint8 and (N,) labels."""
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)))
