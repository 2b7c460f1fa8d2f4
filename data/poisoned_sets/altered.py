"""Altered images stored without the clean ones: overlaid on the clean data set they give a poisoned set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.io.table_file import own_copy
from data.poisoned_sets.origin import Origin
from data.poisoned_sets.stored import PARTS, StoredSet
from data.sets import Listing, Part, RawData
from utils.errors import UserError
from utils.kinds import CLEAN


@dataclass(frozen=True)
class Altered:
    """Altered images of an imported attack, to be merged into the clean data set."""

    clean: RawData | Listing
    train: Part  # altered training images alone; indices: their places in the clean data set
    test: Part  # triggered test images
    origin: Origin

    def over(self, raw: RawData, placement: str) -> StoredSet:
        """Return the poisoned set: the decoded images of `clean`, with the altered ones in their places.

        Raises:
            UserError: images were left out while decoding, so that places have moved, or sizes differ.
        """
        folder = self.origin.folder
        if len(raw.train_labels) != len(self.clean.train_labels) or len(raw.test_labels) != len(self.clean.test_labels):
            raise UserError(f"{folder}: images of the clean data set were left out: the places of all others have moved")
        shape, needed = raw.train_images.shape[1:], self.train.images.shape[1:]
        if shape != needed or raw.test_images.shape[1:] != needed:
            raise UserError(f"{folder}: altered images are {needed[1]} x {needed[0]}, clean ones {shape[1]} x {shape[0]}")
        n, m = len(raw.train_labels), len(raw.test_labels)
        train = Part(
            own_copy(raw.train_images, placement), raw.train_labels.astype(np.int64), raw.train_labels.astype(np.int64),
            np.full(n, CLEAN, np.uint8), np.arange(n),
        )  # fmt: skip
        at = self.train.indices
        train.images[at], train.labels[at], train.flags[at] = self.train.images, self.train.labels, self.train.flags
        labels = raw.test_labels.astype(np.int64)
        clean = Part(raw.test_images, labels, labels, np.full(m, CLEAN, np.uint8), np.arange(m))
        return self.origin.stored(dict(zip(PARTS, (train, clean, self.test), strict=True)))
