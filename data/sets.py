"""The records of the data: raw images, what the defender sees of them, and the ground truth kept apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from data.choice import label_after
from utils.config import Backdoor
from utils.schema import Named

CLEAN, POISONED, COVER = 0, 1, 2  # ground-truth flags; a cover image is altered and keeps its label


@dataclass(frozen=True)
class RawData:
    """A data set as it lies on disk, before the attacker."""

    train_images: np.ndarray  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test_images: np.ndarray  # (M, H, W, 3) uint8
    test_labels: np.ndarray  # (M,) int64
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None = None  # N, of the training images, e.g. `cat/0001.png`; None: they have numbers only
    test_names: tuple[str, ...] | None = None  # M, likewise
    train_digests: tuple[str, ...] | None = None  # N, `data.digests.pixel_digests`; None: not known yet
    test_digests: tuple[str, ...] | None = None  # M

    def cut(self, train: int | None, test: int | None) -> RawData:
        """Return the first so many images (None: all) of both parts; nothing is copied."""
        return replace(
            self,
            train_images=self.train_images[:train], train_labels=self.train_labels[:train],
            names=self.names and self.names[:train], train_digests=self.train_digests and self.train_digests[:train],
            test_images=self.test_images[:test], test_labels=self.test_labels[:test],
            test_names=self.test_names and self.test_names[:test], test_digests=self.test_digests and self.test_digests[:test],
        )  # fmt: skip


class Mapped(np.ndarray):
    """A whole table that is mapped into memory; what is made of it (slices, copies) is an array like any other."""

    file: IO[bytes] | None = None  # open; only the whole table has it. Its pixels stay when another process replaces the name


@dataclass(frozen=True)
class Listing:
    """A data set as picture files of any format and size: `data/tables.py` decodes them."""

    name: str  # of the data set, as in `dataset: folder`
    root: Path
    train_files: tuple[str, ...]  # N paths relative to root
    train_labels: np.ndarray  # (N,) int64
    test_files: tuple[str, ...]  # M paths
    test_labels: np.ndarray  # (M,) int64
    class_names: tuple[str, ...]
    pre: tuple[Any, ...] = ()  # settings of the transforms that are applied where `transform.pre` names none
    skip_unreadable: bool = False
    limits: tuple[int | None, int | None] = (None, None)  # what it was cut to

    def cut(self, train: int | None, test: int | None) -> Listing:
        """Return a listing of so many pictures (None: all) of both parts, spread evenly: pictures are listed by class."""
        a, b = (spread(len(files), limit) for files, limit in ((self.train_files, train), (self.test_files, test)))
        return replace(
            self,
            train_files=tuple(self.train_files[i] for i in a), train_labels=self.train_labels[a],
            test_files=tuple(self.test_files[i] for i in b), test_labels=self.test_labels[b], limits=(train, test),
        )  # fmt: skip


def spread(count: int, limit: int | None) -> np.ndarray:
    """Return `limit` (None: all) of `count` numbers, ascending, spread evenly: int64."""
    kept = count if limit is None else min(limit, count)
    return np.arange(kept) * count // max(kept, 1)


@dataclass(frozen=True)
class ImageSet:
    """Images with the labels that they carry. This is all that the defender sees.

    The labels lie on the device. So do the images, unless they are placed elsewhere (`data.placement`): then they stay a
    table of whole images, one after the other, in host memory or in a mapped file, and are fetched from there.
    """

    images: Tensor  # (N, 3, H, W) uint8; not on the device: a view of (N, H, W, 3) in the computer's memory
    labels: Tensor  # (N,) int64
    placement: str = "device"  # or "host" or "disk"

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> ImageSet:
        """Return the same set with what lies on the device on another one."""
        images = self.images.to(device) if self.resident else self.images
        return replace(self, images=images, labels=self.labels.to(device))

    @property
    def resident(self) -> bool:
        """Whether the images lie on the device: fetching then waits for nothing and may be captured in a CUDA graph."""
        return self.placement == "device"

    def fetch(self, index: Tensor | slice) -> Tensor:
        """Return the images of an index (B,) or slice, (B, 3, H, W) uint8, on the labels' device."""
        if self.resident:
            return self.images[index]
        table = self.images.permute(0, 2, 3, 1)  # (N, H, W, 3), a row an image: gathering copies whole rows
        rows = table[index] if isinstance(index, slice) else table[index.cpu()]
        return rows.to(self.labels.device).permute(0, 3, 1, 2).contiguous()

    def part(self, rows: slice) -> ImageSet:
        """Return the set of some rows; nothing is copied."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class GroundTruth:
    """What the attacker did to each training image.

    Only the drawing of seed samples and the reports receive it; the splits and the training never do (threat model).
    """

    flags: Tensor  # (N,) uint8: CLEAN, POISONED or COVER
    original_labels: Tensor  # (N,) int64, before the attacker

    def poisoned(self) -> Tensor:
        """Return (N,) bool: image is poisoned."""
        return self.flags == POISONED


@dataclass(frozen=True)
class Part:
    """A part of a poisoned data set (the training set or one of the test sets) with its ground truth, as arrays."""

    images: np.ndarray  # (n, H, W, 3) uint8
    labels: np.ndarray  # (n,) int64, the labels that the images carry
    original_labels: np.ndarray  # (n,) int64, before the attacker
    flags: np.ndarray  # (n,) uint8: CLEAN, POISONED or COVER
    indices: np.ndarray  # (n,) int64, ascending: places in the data set's training or test images

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, limit: int | None) -> Part:
        """Return what comes of the data set's first `limit` images (None: of all); no copy is made."""
        count = len(self) if limit is None else int(np.searchsorted(self.indices, limit))
        return Part(*(getattr(self, f.name)[:count] for f in fields(self)))

    def to_set(self, placement: str = "device") -> ImageSet:
        """Return what the defender sees: images and labels."""
        return to_set(self.images, self.labels, placement)

    def ground_truth(self) -> GroundTruth:
        """Return what the defender does not see."""
        return GroundTruth(torch.from_numpy(self.flags), torch.from_numpy(self.original_labels.astype(np.int64)))


@dataclass(frozen=True)
class TestSets:
    """The two sets that a model is tested on."""

    clean: ImageSet | None  # None: there is no test image, and the attack is unknown
    backdoor: ImageSet | None = None  # triggered, with the label that the attacker wants; None: no success rate
    origin: Tensor | None = None  # (M',) int64: which clean test image each triggered one was made from

    def to(self, device: torch.device) -> TestSets:
        """Return both sets on a device."""
        return TestSets(
            self.clean and self.clean.to(device),
            self.backdoor and self.backdoor.to(device),
            None if self.origin is None else self.origin.to(device),
        )


@dataclass(frozen=True)
class PoisonedData:
    """All images that a run works with, wherever they come from."""

    train: ImageSet
    tests: TestSets
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None  # N, of the training images; None: they have numbers only
    manifest: str  # what the data are (`utils/manifest.py`)
    examples: np.ndarray  # (2, n, H, W, 3) uint8: some images before and after the attack
    caption: str = ""  # what the examples are
    ground_truth: GroundTruth | None = None  # for seed samples and reports only; None: nobody knows it
    backdoor: Backdoor | None = None  # the attack that made the set; None: unknown


NewClassifier = Callable[[Named, int], nn.Module]


def no_network(network: Named, num_classes: int) -> nn.Module:
    """Stand where nobody passed a function that builds networks."""
    raise NotImplementedError(f"{network.name}: no function that builds networks was passed")


@dataclass(frozen=True)
class Scene:
    """What an attack may know when it is made."""

    raw: RawData
    target_label: int | None  # None: all-to-all labels
    target_shift: int | None = field(default=None, kw_only=True)  # of all-to-all labels
    num_classes: int
    seed: int
    assets: Path  # folder where made assets are kept, for all runs beside one another
    device: torch.device = torch.device("cpu")  # where assets are made
    new_classifier: NewClassifier = no_network  # builds a network of a section of the YAML, for so many classes

    def label_after(self, labels: np.ndarray) -> np.ndarray:
        """Return the labels (n,) int64 that images of the labels (n,) carry once they are poisoned."""
        return label_after(labels, self.target_label, self.target_shift, self.num_classes)


def to_set(images: np.ndarray, labels: np.ndarray, placement: str = "device") -> ImageSet:
    """Return an ImageSet on the CPU from (N, H, W, 3) uint8 and (N,) labels; `host` and `disk` keep the very images."""
    pixels = images.transpose(0, 3, 1, 2)
    if placement == "device":
        pixels = np.ascontiguousarray(pixels)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), placement)
