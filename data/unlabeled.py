"""Pictures without labels, for `test.py --images`: every file below a folder, brought to the size of training."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.picture import depth_line, read_prepared
from data.tables import LISTED, decoded, shown
from utils.errors import UserError
from utils.paths import is_dir, is_folder, visible
from utils.suspects import class_name

HEAD = ("path", "label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3")


class Pictures:
    """The pictures below a folder; which could not be read, and how many had another size, is known after reading.

    Args:
        root: their folder.
        pre: the settings of `transform.pre`.
        size: height and width of the images that the network was trained on.
    """

    def __init__(self, root: Path, pre: Sequence[Any], size: tuple[int, int]) -> None:
        if not is_dir(root, "--images"):
            raise UserError(f"--images {root}: is no folder: give the one that the pictures lie in")
        self.root, self.pre, self.size = root, pre, size
        self.files = list(below(root, ""))
        if not self.files:
            raise UserError(f"--images {root}: holds no file: give the folder that the pictures lie in")
        self.kept: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.resized: list[int] = []
        self.depths: list[int] = []  # bits that were assumed of those that are not stored with 8

    def batches(self, count: int) -> Iterator[Tensor]:
        """Yield all that can be read, (<= count, 3, H, W) uint8 each, in the order of `kept`.

        Raises:
            UserError: nothing can be read.
        """
        part: list[np.ndarray] = []
        for file, pixels in zip(self.files, decoded(len(self.files), self.decode, "pictures"), strict=True):
            if isinstance(pixels, str):
                self.unreadable.append((file, pixels))
                continue
            self.kept.append(file)
            part.append(pixels)
            if len(part) == count:
                yield stack(part)
                part = []
        if part:
            yield stack(part)
        if not self.kept:
            file, reason = self.unreadable[0]
            raise UserError(f"--images {self.root}: none of {len(self.files)} files is a picture ({shown(file)}: {reason})")

    def decode(self, i: int) -> np.ndarray | str:
        """Return picture i, (H, W, 3) uint8 of the size of training, or why it cannot be read."""
        pixels = read_prepared(self.root / self.files[i], self.pre, self.depths)
        if isinstance(pixels, str) or pixels.shape[:2] == self.size:
            return pixels
        self.resized.append(i)
        return np.asarray(Image.fromarray(pixels).resize(self.size[::-1], Image.Resampling.BILINEAR))

    def remarks(self) -> Iterator[str]:
        """Yield what a person should know of the reading, a line each."""
        height, width = self.size
        if self.resized:
            yield (
                f"{len(self.resized)} of {len(self.kept)} pictures were not {width} x {height} pixels, as in training: they "
                "were resized to that, whatever their proportions (transform.pre can crop them)"
            )
        depths = depth_line(self.depths, len(self.kept))
        if depths:
            yield depths
        for file, reason in self.unreadable[:LISTED]:
            yield f"cannot be read: {shown(file)}: {shown(reason)}"
        if len(self.unreadable) > LISTED:
            yield f"cannot be read: {len(self.unreadable) - LISTED} more"


def below(root: Path, inside: str) -> Iterator[str]:
    """Yield the files below a folder, paths relative to it with `/`, sorted within each folder; links to folders are left."""
    for entry in visible(root / inside):
        name = f"{inside}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from below(root, f"{name}/")
        elif not is_folder(entry):  # what is no picture, or cannot be opened, is reported as unreadable
            yield name


def stack(images: list[np.ndarray]) -> Tensor:
    """Return (n, 3, H, W) uint8 from n times (H, W, 3)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def label_table(files: Sequence[str], logits: Tensor, class_names: Sequence[str]) -> bytes:
    """Return the CSV of labeled pictures: path, label, confidence, and the next two labels with theirs.

    Args:
        files: n paths.
        logits: (n, C).
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(HEAD)
    shares, labels = logits.softmax(1).sort(stable=True, dim=1, descending=True)
    for file, first, theirs in zip(files, labels[:, :3].tolist(), shares[:, :3].tolist(), strict=True):
        row = [file]
        for label, share in zip(first, theirs, strict=True):
            row += [class_name(label, class_names), f"{share:.4f}"]
        rows.writerow(row + [""] * (len(HEAD) - len(row)))  # a network of two classes has no third
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names need not be UTF-8
