"""Images without labels, for `test.py --images`: all files below a folder, resized to the size of the training images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.io.image_file import depth_line, printable, read_prepared, unreadable_lines
from data.io.threads import in_threads
from utils.csv_text import csv_text
from utils.errors import UserError
from utils.names import class_name
from utils.paths import is_dir, is_folder, visible

HEAD = ("path", "label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3")


class ImageFiles:
    """The image files below a folder. Which cannot be read, and how many were resized, is known once `batches` has ended.

    Args:
        root: their folder.
        pre: settings of the transforms of `transform.pre`.
        size: height and width of the images that the network was trained on.
    Raises:
        UserError: `root` is not a folder, or contains no files.
    """

    def __init__(self, root: Path, pre: Sequence[Any], size: tuple[int, int]) -> None:
        if not is_dir(root, "--images"):
            raise UserError(f"--images {root}: not a folder: give the folder of the images")
        self.root, self.pre, self.size = root, pre, size
        self.linked: list[str] = []  # folders
        self.files = list(files_below(root, "", self.linked))
        if not self.files:
            raise UserError(f"--images {root}: contains no files: give the folder of the images")
        self.kept: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.resized: list[int] = []
        self.depths: list[int] = []  # bits assumed for images that are not stored with 8

    def batches(self, count: int) -> Iterator[Tensor]:
        """Yield all readable images, (<= count, 3, H, W) uint8 each, in the order of `kept`.

        Raises:
            UserError: none of the files can be read.
        """
        batch: list[np.ndarray] = []
        decoded = in_threads(range(len(self.files)), self.decode, "images")
        for file, pixels in zip(self.files, decoded, strict=True):
            if isinstance(pixels, str):
                self.unreadable.append((file, pixels))
                continue
            self.kept.append(file)
            batch.append(pixels)
            if len(batch) == count:
                yield stack(batch)
                batch = []
        if batch:
            yield stack(batch)
        if not self.kept:
            file, reason = self.unreadable[0]
            first = f"first: {printable(file)}: {reason}"
            raise UserError(f"--images {self.root}: none of {len(self.files)} files is a readable image ({first})")

    def decode(self, i: int) -> np.ndarray | str:
        """Return image i, (H, W, 3) uint8 at the size of training, or the reason why it cannot be read."""
        pixels = read_prepared(self.root / self.files[i], self.pre, self.depths)
        if isinstance(pixels, str) or pixels.shape[:2] == self.size:
            return pixels
        self.resized.append(i)
        return np.asarray(Image.fromarray(pixels).resize(self.size[::-1], Image.Resampling.BILINEAR))

    def remarks(self) -> Iterator[str]:
        """Yield log lines on what happened while reading."""
        height, width = self.size
        if self.resized:
            yield (
                f"{len(self.resized)} of {len(self.kept)} images were resized to {width} x {height} pixels, the size of the "
                "training images, without keeping their proportions (transform.pre can crop them)"
            )
        depths = depth_line(self.depths, len(self.kept))
        if depths:
            yield depths
        if self.linked:
            first = printable(self.linked[0])
            yield f"{len(self.linked)} links to folders are not followed (first: {first}): label those folders separately"
        yield from unreadable_lines(self.unreadable)


def files_below(root: Path, inside: str, linked: list[str]) -> Iterator[str]:
    """Yield the files below a folder, as paths relative to it with `/`, sorted by folder.

    Args:
        linked: gets the links to folders, which are not followed: they could lead round in a circle.
    """
    for entry in visible(root / inside):
        name = f"{inside}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(root, f"{name}/", linked)
        elif is_folder(entry):
            linked.append(name)
        else:  # a file that is not an image, or cannot be opened, is reported as unreadable
            yield name


def stack(images: list[np.ndarray]) -> Tensor:
    """Return n images (H, W, 3) as one tensor (n, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def label_table(files: Sequence[str], logits: Tensor, class_names: Sequence[str]) -> bytes:
    """Return the CSV of labeled images: path, label and confidence, then the next two labels with their confidences.

    Args:
        files: n paths.
        logits: (n, C).
    """
    rows: list[Sequence[object]] = [HEAD]
    shares, labels = logits.softmax(1).sort(stable=True, dim=1, descending=True)
    for file, best_labels, best_shares in zip(files, labels[:, :3].tolist(), shares[:, :3].tolist(), strict=True):
        row = [file]
        for label, share in zip(best_labels, best_shares, strict=True):
            row += [class_name(label, class_names), f"{share:.4f}"]
        rows.append(row + [""] * (len(HEAD) - len(row)))  # with two classes there is no third label
    return csv_text(rows).encode("utf-8", "surrogateescape")  # file names need not be UTF-8
