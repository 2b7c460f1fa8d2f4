"""The records of the data: raw images, the images and labels that the defender sees, and the separate ground truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from data.choice import label_after
from utils.config.schema import Named
from utils.config.settings import Backdoor
from utils.kinds import POISONED

MOST_CLASSES = 10**6  # of a file that another program wrote; the names of more could fill the memory


@dataclass(frozen=True)
class RawData:
    """A data set as arrays, before the attack."""

    train_images: np.ndarray  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test_images: np.ndarray  # (M, H, W, 3) uint8
    test_labels: np.ndarray  # (M,) int64
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None = None  # N, of the training images, e.g. `cat/0001.png`; None: images without names
    test_names: tuple[str, ...] | None = None  # M, likewise
    train_digests: tuple[str, ...] | None = None  # N, `data.digests.pixel_digests`; None: not computed yet
    test_digests: tuple[str, ...] | None = None  # M
    left_out: int = 0  # images of the data set that cannot be read and are missing here
    pre: tuple[Any, ...] = ()  # settings of the transforms that the images have been through

    def cut(self, train: int | None, test: int | None) -> RawData:
        """Return the first `train` and `test` images of the two parts (None: all); nothing is copied."""
        return replace(
            self,
            train_images=self.train_images[:train], train_labels=self.train_labels[:train],
            names=self.names and self.names[:train], train_digests=self.train_digests and self.train_digests[:train],
            test_images=self.test_images[:test], test_labels=self.test_labels[:test],
            test_names=self.test_names and self.test_names[:test], test_digests=self.test_digests and self.test_digests[:test],
        )  # fmt: skip


class Mapped(np.ndarray):
    """A complete table that is mapped into memory; arrays that are made from it (slices, copies) have no `file`."""

    file: IO[bytes] | None = None  # open: its pixels stay available when another process replaces the file


@dataclass(frozen=True)
class Listing:
    """A data set as image files of any format and size, which `data/io/tables.py` decodes."""

    name: str  # of the data set, as in `dataset: folder`
    root: Path
    train_files: tuple[str, ...]  # N paths relative to root
    train_labels: np.ndarray  # (N,) int64
    test_files: tuple[str, ...]  # M paths
    test_labels: np.ndarray  # (M,) int64
    class_names: tuple[str, ...]
    pre: tuple[Any, ...] = ()  # settings of the transforms that are applied if `transform.pre` names none
    skip_unreadable: bool = False
    limits: tuple[int | None, int | None] = (None, None)  # most training and test images, as given to `cut`
    passed_over: str | None = None  # a folder between class folder and image, which is no part of an image's name

    def name_of(self, file: str) -> str:
        """Return an image's name: its path from the class folder on."""
        parts = file.split("/")
        if parts[-2] == self.passed_over and len(parts) > 3:  # train/<class>/images/<file>, but not val/images/<file>
            del parts[-2]
        return "/".join(parts[-2:])

    def cut(self, train: int | None, test: int | None) -> Listing:
        """Return `train` and `test` images of the two parts (None: all), spread evenly, since files are listed by class."""
        a, b = (spread(len(files), limit) for files, limit in ((self.train_files, train), (self.test_files, test)))
        return replace(
            self,
            train_files=tuple(self.train_files[i] for i in a), train_labels=self.train_labels[a],
            test_files=tuple(self.test_files[i] for i in b), test_labels=self.test_labels[b], limits=(train, test),
        )  # fmt: skip


def spread(count: int, limit: int | None) -> np.ndarray:
    """Return `limit` (None: all) of the numbers below `count`, ascending, spread evenly, int64."""
    kept = count if limit is None else min(limit, count)
    return np.arange(kept) * count // max(kept, 1)


@dataclass(frozen=True)
class ImageSet:
    """Images with the labels that they carry. This is all that the defender sees.

    The labels are on the device. So are the images with placement `device`; otherwise they stay in host memory or in a mapped
    file, image after image, and are fetched from there.
    """

    images: Tensor  # (N, 3, H, W) uint8; with placements `host` and `disk` a view of an array (N, H, W, 3)
    labels: Tensor  # (N,) int64
    placement: str = "device"  # or "host" or "disk"

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> ImageSet:
        """Return the set with its labels, and its images if they are resident, on another device."""
        images = self.images.to(device) if self.resident else self.images
        return replace(self, images=images, labels=self.labels.to(device))

    @property
    def resident(self) -> bool:
        """Whether the images are on the device: then fetching never waits and may be captured in a CUDA graph."""
        return self.placement == "device"

    def fetch(self, index: Tensor | slice) -> Tensor:
        """Return the images of an index (B,) or slice, (B, 3, H, W) uint8, on the labels' device."""
        if self.resident:
            return self.images[index]
        table = self.images.permute(0, 2, 3, 1)  # (N, H, W, 3), one row per image: gathering copies whole rows
        rows = table[index] if isinstance(index, slice) else table[index.cpu()]
        return rows.to(self.labels.device).permute(0, 3, 1, 2).contiguous()

    def chosen(self, index: Tensor) -> ImageSet:
        """Return the images of an index (n,) as a set of its own, on the labels' device."""
        return ImageSet(self.fetch(index), self.labels[index])

    def part(self, rows: slice) -> ImageSet:
        """Return a range of the images as a set; nothing is copied."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class GroundTruth:
    """What the attacker did to each training image.

    Only the drawing of seed samples, oracle baselines and reports receive it; splits and training never do (threat model).
    """

    flags: Tensor  # (N,) uint8: CLEAN, POISONED or COVER
    original_labels: Tensor  # (N,) int64, before the attack

    def poisoned(self) -> Tensor:
        """Return (N,) bool: whether an image is poisoned."""
        return self.flags == POISONED


@dataclass(frozen=True)
class Part:
    """A part of a poisoned data set (the training set or one of the test sets) with its ground truth, as arrays."""

    images: np.ndarray  # (n, H, W, 3) uint8
    labels: np.ndarray  # (n,) int64, the labels that the images carry
    original_labels: np.ndarray  # (n,) int64, before the attack
    flags: np.ndarray  # (n,) uint8: CLEAN, POISONED or COVER
    indices: np.ndarray  # (n,) int64, ascending: positions in the data set's training or test images

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, limit: int | None) -> Part:
        """Return the images that come from the data set's first `limit` images (None: from all); nothing is copied."""
        count = len(self) if limit is None else int(np.searchsorted(self.indices, limit))
        return Part(*(getattr(self, f.name)[:count] for f in fields(self)))

    def to_set(self, placement: str = "device") -> ImageSet:
        """Return the images and labels, which the defender sees."""
        return to_set(self.images, self.labels, placement)

    def ground_truth(self) -> GroundTruth:
        """Return the ground truth, which the defender does not see."""
        return GroundTruth(torch.from_numpy(self.flags), torch.from_numpy(self.original_labels.astype(np.int64)))


@dataclass(frozen=True)
class TestSets:
    """The two sets that a model is tested on."""

    clean: ImageSet | None  # None: there are no test images, and the attack is unknown
    backdoor: ImageSet | None = None  # triggered, with the labels that the attacker wants; None: no success rate
    origin: Tensor | None = None  # (M',) int64: index of the clean test image that each triggered one was made from

    def to(self, device: torch.device) -> TestSets:
        """Return both sets on a device."""
        return TestSets(
            self.clean and self.clean.to(device),
            self.backdoor and self.backdoor.to(device),
            None if self.origin is None else self.origin.to(device),
        )


@dataclass(frozen=True)
class PoisonedData:
    """All images that a run works with."""

    train: ImageSet
    tests: TestSets
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None  # N, of the training images; None: images without names
    examples: np.ndarray  # (2, n, H, W, 3) uint8: some images before and after the attack
    caption: str = ""  # of the examples
    ground_truth: GroundTruth | None = None  # for seed samples and reports only; None: unknown
    backdoor: Backdoor | None = None  # the attack that made the set; None: unknown
    manifest: str = ""  # identity of the data (`utils/manifest.py`)
    pre: tuple[Any, ...] = ()  # settings of the transforms that the images have been through before the attack


NewClassifier = Callable[[Named, int], nn.Module]


def no_network(network: Named, num_classes: int) -> nn.Module:
    """Default of parameters that take a function that builds networks: raise NotImplementedError."""
    raise NotImplementedError(f"{network.name}: no function that builds networks was passed")


@dataclass(frozen=True)
class AssetDigests:
    """The digests of the assets with which a run's images are altered (`data.attack.keep_asset`), by their files' stems.

    A stem consists of the asset's name and a digest of all that it depends on, so assets for other settings do not conflict.
    """

    known: Mapping[str, str] = field(default_factory=dict)  # of a run that has begun: no others may be used
    used: dict[str, str] = field(default_factory=dict)  # filled while images are altered

    def digest(self, name: str, stem: str) -> str | None:
        """Return the digest of an asset of a run that has begun; None if it has no such asset.

        Args:
            name: of the asset, which is all that the manifests of earlier versions have.
        """
        return self.known.get(stem, self.known.get(name))


@dataclass(frozen=True)
class AttackContext:
    """The data and settings that an attack is built from."""

    raw: RawData
    target_label: int | None  # None: all-to-all labels
    target_shift: int | None = field(default=None, kw_only=True)  # of all-to-all labels
    num_classes: int
    seed: int
    assets: Path  # the assets' folder, shared by all runs with the same saved_dir
    device: torch.device = torch.device("cpu")  # where assets are made
    new_classifier: NewClassifier = no_network  # builds the network that a section of the YAML names, for so many classes
    assets_of_run: AssetDigests = field(default_factory=AssetDigests)

    def label_after(self, labels: np.ndarray) -> np.ndarray:
        """Return the labels (n,) int64 that images with the labels (n,) carry once they are poisoned."""
        return label_after(labels, self.target_label, self.target_shift, self.num_classes)


def to_set(images: np.ndarray, labels: np.ndarray, placement: str = "device") -> ImageSet:
    """Return a set on the CPU from images (N, H, W, 3) uint8 and labels (N,); `host` and `disk` do not copy the images."""
    pixels = images.transpose(0, 3, 1, 2)
    if placement == "device":
        pixels = np.ascontiguousarray(pixels)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), placement)
