"""A poisoned data set that another program may use too: its parts, and the check that they are consistent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.choice import label_after
from data.sets import Part, RawData
from utils.config.settings import Backdoor
from utils.errors import UserError
from utils.kinds import CLEAN, COVER, POISONED
from utils.run_files import STORED_SET

PARTS = ("train", "clean_test", "backdoor_test")
FILES = {name: f"{name}.npz" for name in PARTS}
ARRAYS = {"images": "uint8", "labels": "int64", "original_labels": "int64", "flags": "uint8", "indices": "int64"}


@dataclass(frozen=True)
class StoredSet:
    """A poisoned data set that was read from its folder, with the contents of `set.json`."""

    train: Part
    clean_test: Part
    # Triggered test images of other classes than the target, with the label that the attacker wants; may be empty if no
    # training image is poisoned.
    backdoor_test: Part
    backdoor: Backdoor
    num_classes: int
    class_names: tuple[str, ...]
    transform_pre: dict[str, Any]
    folder: Path
    description: str  # the text of set.json
    described_by: str = STORED_SET  # the file in the folder that says what the set is

    def cut(self, train: int | None, test: int | None) -> StoredSet:
        """Return the images that come from the data set's first `train` and `test` images (None: all); nothing is copied.

        Raises:
            UserError: a limit leaves none of the training, clean test or triggered test images.
        """

        def kept(part: Part, key: str, limit: int | None, kind: str) -> Part:
            few = part.first(limit)
            if len(part) and not len(few):
                least = part.indices[0] + 1
                raise UserError(f"data.{key}: {limit}: keeps no {kind} image of {self.folder}: must be at least {least}")
            return few

        return replace(
            self,
            train=kept(self.train, "train_limit", train, "training"),
            clean_test=kept(self.clean_test, "test_limit", test, "clean test"),
            backdoor_test=kept(self.backdoor_test, "test_limit", test, "triggered test"),
        )

    def raw(self) -> RawData:
        """Return the training images as the attacker left them, and the clean test images."""
        train, test = self.train, self.clean_test
        return RawData(train.images, train.labels, test.images, test.labels, self.class_names)


def contradiction(
    parts: Mapping[str, Part], backdoor: Backdoor, num_classes: int, called: Mapping[str, str] = FILES
) -> str | None:
    """Return what makes the arrays inconsistent, or None: checksums that match do not mean that the contents make sense.

    Args:
        called: what the parts are called in messages.
    """
    sides = {part.images.shape[1:] for part in parts.values()}
    attacked = (parts["train"].flags == POISONED).any()
    for key, part in parts.items():
        name = called[key]
        n = part.images.shape[0] if part.images.ndim == 4 and part.images.shape[3] == 3 else -1
        least = 0 if key == "backdoor_test" and not attacked else 1
        if n < least or len(sides) > 1:
            return f"{name}: images {part.images.shape}: must be (n, H, W, 3), n >= {least}, with one size in all parts"
        if any(getattr(part, key).shape != (n,) for key in ARRAYS if key != "images"):
            return f"{name}: not every array has one entry for each of the {n} images"
        if n == 0:
            continue
        if (np.diff(part.indices) <= 0).any() or part.indices[0] < 0:
            return f"{name}: indices: must ascend and not be negative"
        for array in ("labels", "original_labels"):
            labels = getattr(part, array)
            if labels.min() < 0 or labels.max() >= num_classes:
                return f"{name}: {array}: {labels.min()} to {labels.max()}: there are {num_classes} classes"
        if part.flags.max() > COVER:
            return f"{name}: flags: {part.flags.max()}: must be 0 clean, 1 poisoned or 2 cover"
        wanted = label_after(part.original_labels, backdoor.target_label, backdoor.target_shift, num_classes)
        if (part.labels != np.where(part.flags == POISONED, wanted, part.original_labels)).any():
            target = backdoor.target_text(())
            return f"{name}: labels: poisoned images do not carry class {target}, or others lack their original label"
    clean, triggered = parts["clean_test"], parts["backdoor_test"]
    if (clean.flags != CLEAN).any():
        return f"{called['clean_test']}: flags: contains images that are not clean"
    if (triggered.flags != POISONED).any() or (triggered.labels == triggered.original_labels).any():
        what = "contains images without the trigger or of the target class, which the ASR must not count"
        return f"{called['backdoor_test']}: {what}"
    if not np.isin(triggered.indices, clean.indices).all():
        return f"{called['backdoor_test']}: indices: some are not in {called['clean_test']}"
    if (triggered.original_labels != clean.original_labels[np.searchsorted(clean.indices, triggered.indices)]).any():
        return f"{called['backdoor_test']}: original_labels: not those of the same images in {called['clean_test']}"
    return None


def examples_of(stored: StoredSet, most: int) -> tuple[np.ndarray, str]:
    """Return up to `most` test images before and after the attack, (2, n, H, W, 3) uint8, and their caption.

    Training images cannot be shown: a stored set lacks their originals.
    """
    clean, backdoor = stored.clean_test, stored.backdoor_test
    some = backdoor.indices[:most]
    before = clean.images[np.searchsorted(clean.indices, some)]
    label = stored.backdoor.target_text(stored.class_names)
    caption = f"{stored.backdoor.attack.name}: triggered test images, labeled {label}"
    return np.stack([before, backdoor.images[: len(some)]]), caption
