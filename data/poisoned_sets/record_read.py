"""Reading a BackdoorBench record (Wu et al., NeurIPS 2022, format version 2): which images an attack altered, and how.

    attack_result.pt                                 the labels that altered images carry; left out: see `Hints`
    bd_train_dataset/<original label>/<index>.png    altered training images; index: the place in the clean data set
    bd_test_dataset/<original label>/<index>.png     triggered test images

A record holds no clean images: they come from the clean data set. It is untrusted input: nothing in it runs, and the paths
in it are not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.choice import label_after
from data.io.image_file import BROKEN, open_image, reason
from data.poisoned_sets.record_pickle import read_attack_result
from data.sets import MOST_CLASSES, Part
from utils.config.schema import Named
from utils.config.settings import Backdoor
from utils.errors import UserError
from utils.kinds import COVER, POISONED
from utils.paths import exists, is_dir, is_folder, require_file, visible

RESULT, TRAIN, TEST = "attack_result.pt", "bd_train_dataset", "bd_test_dataset"
KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")
BLOCK = 128  # the batch size in which attacks with cover images write their images
LARGEST = 4096  # pixels of a side


@dataclass(frozen=True)
class Hints:
    """User-supplied information that a record lacks, in general or without `attack_result.pt`."""

    attack: str  # the attack's name
    unchanged: str = "poisoned"  # what altered images with an unchanged label are: poisoned, cover, or by `blocks`
    target_label: int | None = None  # for a record without attack_result.pt
    poison_ratio: float | None = None  # for blocks


@dataclass(frozen=True)
class Entries:
    """The altered images of one part of a data set, by ascending index."""

    indices: np.ndarray  # (n,) int64
    original: np.ndarray  # (n,) int64
    carried: np.ndarray  # (n,) int64; -1: not known


@dataclass(frozen=True)
class Record:
    """A record that was read and checked against the labels of the clean data set."""

    train: Part  # altered training images alone
    test: Part  # triggered test images
    backdoor: Backdoor
    num_classes: int
    source: str  # the file or folder that says which images are altered


def read_record(folder: Path, hints: Hints, labels: tuple[np.ndarray, np.ndarray], classes: int) -> Record:
    """Read a record.

    Args:
        labels: of the clean training and test images, (N,) and (M,) int64.
        classes: how many the clean data set has.
    Raises:
        UserError: one line with the file and what is wrong.
    """
    path = folder / RESULT
    if exists(path, "record"):
        result = checked_result(path)
        source, size, classes = path, result["img_size"], result["num_classes"]
        train, test = (
            entries_of(result[key], len(of_part), f"{path}: {key}")
            for key, of_part in zip(("bd_train", "bd_test"), labels, strict=True)
        )
    else:
        source, size = folder / TRAIN, None
        train, test = (scan(folder / part) for part in (TRAIN, TEST))
    for entries, of_part, part in ((train, labels[0], TRAIN), (test, labels[1], TEST)):
        check_entries(entries, of_part, classes, folder / part)
    if source != path:
        target = target_of_hints(hints, classes, folder)
        train, test = guess(train, len(labels[0]), target, hints, folder), replace_carried(test, target)
    label, shift = target_of(train, test, classes, source)
    if hints.target_label not in (None, label):
        found = f"class {label}" if shift is None else f"labels shifted by {shift}"
        raise UserError(f"target_label: {hints.target_label}: poisoned images of {source} carry {found}: leave it out")
    flags = flags_of(train, len(labels[0]), label_after(train.original, label, shift, classes), hints, source)
    train_images = read_images(folder / TRAIN, train, size)
    test_images = read_images(folder / TEST, test, train_images.shape[1:3])
    backdoor = described(hints.attack, train, flags, labels[0], (label, shift))
    return Record(
        Part(train_images, train.carried, train.original, flags, train.indices),
        Part(test_images, test.carried, test.original, np.full(len(test.indices), POISONED, np.uint8), test.indices),
        backdoor, classes, source.name,
    )  # fmt: skip


# -- Which images, and their labels ------------------------------------------------------------------------------------


def checked_result(path: Path) -> Mapping[str, Any]:
    """Return the contents of `attack_result.pt` with the keys and types that are read."""
    result = read_attack_result(path)
    lacking = [key for key in KEYS if key not in result] if isinstance(result, dict) else KEYS
    if lacking:
        raise UserError(f"{path}: {lacking[0]}: missing: it is not an attack result of BackdoorBench")
    size, classes = result["img_size"], result["num_classes"]
    sides = [side for side in size if type(side) is int] if isinstance(size, (tuple, list)) else []
    if len(sides) != 3 or sides[2] != 3 or not all(0 < side <= LARGEST for side in sides):
        raise UserError(f"{path}: img_size: {brief(size)}: expected height, width and 3")
    if type(classes) is not int or not 1 < classes <= MOST_CLASSES:
        raise UserError(f"{path}: num_classes: {brief(classes)}: expected a number of classes")
    return result | {"img_size": tuple(sides[:2])}


def entries_of(state: Any, count: int, where: str) -> Entries:
    """Return the altered images of `bd_train` or `bd_test`.

    Args:
        count: of all images of that part of the clean data set.
    """
    if state is None:
        raise UserError(f"{where}: None: the record has no such images, e.g. because the attack poisons while it trains")
    if isinstance(state, dict) and "x" in state:
        raise UserError(f"{where}: holds the images themselves: a record of BackdoorBench's first version is not supported")
    try:
        items, indicator = state["bd_data_container"]["data_dict"].items(), state["poison_indicator"]
        pairs = [(index, value["other_info"]) for index, value in items]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{where}: has no data_dict with other_info, or no poison_indicator") from None
    wrong = [index for index, labels in pairs if not (is_pair(labels) and is_small(index))]
    if wrong:
        raise UserError(f"{where}: data_dict: {brief(wrong[0])}: expected an index with the label carried and the original one")
    if not pairs:
        raise UserError(f"{where}: data_dict: is empty: no image was altered")
    if not isinstance(indicator, np.ndarray) or indicator.ndim != 1:
        raise UserError(f"{where}: poison_indicator: {brief(indicator)}: expected an array of 0 and 1")
    rows = [(index, *labels) for index, labels in pairs]
    if len(indicator) != count:
        raise UserError(f"{where}: poison_indicator: is of {len(indicator)} images: the clean data set has {count}")
    table = np.asarray(sorted(rows), np.int64).reshape(-1, 3)
    if not np.array_equal(np.flatnonzero(indicator), table[:, 0]):
        raise UserError(f"{where}: poison_indicator: does not name the images of data_dict")
    return Entries(table[:, 0].copy(), table[:, 2].copy(), table[:, 1].copy())


def is_small(value: Any) -> bool:
    """Return whether a value is a number that fits 64 bits."""
    return type(value) is int and abs(value) < 2**62


def is_pair(value: Any) -> bool:
    """Return whether a value is a list of two such numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_small, value))


def brief(value: Any) -> str:
    """Return a value of the file as an error may show it: short, and without walking through what may be nested deeply."""
    return repr(value)[:40] if is_small(value) or isinstance(value, (float, str)) else type(value).__name__


def scan(folder: Path) -> Entries:
    """Return the altered images of a folder of PNG files; the labels that they carry are not known."""
    if not is_dir(folder, "record"):
        raise UserError(f"{folder}: no such folder, and no {RESULT} beside it: give the folder of a BackdoorBench record")
    rows: dict[int, int] = {}
    for entry in visible(folder):
        if not is_folder(entry) or not is_number(entry.name):
            raise UserError(f"{entry.path}: expected a folder named after a label")
        for file in visible(Path(entry.path)):
            stem, _, ending = file.name.rpartition(".")
            if not is_number(stem) or ending != "png":
                raise UserError(f"{file.path}: expected a file named <index>.png")
            if int(stem) in rows:
                raise UserError(f"{file.path}: image {stem} is in the folder {rows[int(stem)]} too")
            rows[int(stem)] = int(entry.name)
    if not rows:
        raise UserError(f"{folder}: holds no images")
    table = np.asarray(sorted(rows.items()), np.int64).reshape(-1, 2)
    return Entries(table[:, 0].copy(), table[:, 1].copy(), np.full(len(table), -1, np.int64))


def is_number(text: str) -> bool:
    """Return whether a text is a plain number that fits 64 bits."""
    return text.isascii() and text.isdecimal() and len(text) < 18 and str(int(text)) == text


def check_entries(entries: Entries, labels: np.ndarray, classes: int, folder: Path) -> None:
    """Refuse images that the clean data set does not have, or has under another label."""
    n = len(labels)
    if labels.max(initial=0) >= classes:
        raise UserError(f"{folder}: the record has {classes} classes and the clean data set the label {labels.max()}")
    outside = entries.indices[(entries.indices < 0) | (entries.indices >= n)]
    if len(outside):
        raise UserError(f"{folder}: image {outside[0]}: must be in 0..{n - 1}: the clean data set has {n} images")
    other = np.flatnonzero(entries.original != labels[entries.indices])
    if len(other):
        i = other[0]
        raise UserError(
            f"{folder}: image {entries.indices[i]}: original label {entries.original[i]}, in the clean data set "
            f"{labels[entries.indices[i]]} ({len(other)} such): give the data set that was poisoned, with its images in the "
            "same order"
        )
    wrong = np.flatnonzero((entries.carried < -1) | (entries.carried >= classes))
    if len(wrong):
        index, label = entries.indices[wrong[0]], entries.carried[wrong[0]]
        raise UserError(f"{folder}: image {index}: carries label {label}: must be in 0..{classes - 1}")


# -- What was done to them ---------------------------------------------------------------------------------------------


def target_of_hints(hints: Hints, classes: int, folder: Path) -> int:
    """Return the target class, which a record without `attack_result.pt` does not contain."""
    if hints.target_label is None:
        raise UserError(f"{folder / RESULT}: no such file: give target_label, the label that poisoned images carry")
    if hints.target_label >= classes:
        raise UserError(f"target_label: {hints.target_label}: must be in 0..{classes - 1}")
    return hints.target_label


def replace_carried(entries: Entries, label: int) -> Entries:
    """Return the entries with one label carried by all."""
    return Entries(entries.indices, entries.original, np.full(len(entries.indices), label, np.int64))


def guess(entries: Entries, count: int, target: int, hints: Hints, folder: Path) -> Entries:
    """Return the training entries with inferred labels, for records without `attack_result.pt`.

    Args:
        count: of all training images.
    """
    poisoned = replace_carried(entries, target)
    if hints.unchanged == "poisoned":
        return poisoned
    if hints.unchanged == "cover" or hints.poison_ratio is None:
        raise UserError(
            f"{folder / RESULT}: no such file: it is needed to tell cover images from poisoned ones; with unchanged: blocks "
            "poison_ratio will do"
        )
    position, size = positions(entries.indices, count)
    inside = position < (hints.poison_ratio * size).astype(np.int64)
    return Entries(entries.indices, entries.original, np.where(inside, poisoned.carried, entries.original))


def positions(indices: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each image is in its block, (n,), and how large the block is, (n,); the last one may be smaller."""
    return indices % BLOCK, np.minimum(BLOCK, count - indices // BLOCK * BLOCK)


def target_of(train: Entries, test: Entries, classes: int, source: Path) -> tuple[int | None, int | None]:
    """Return the one class that relabeled images carry, or else by how much their labels are shifted (all-to-all)."""
    original, carried = (np.concatenate([getattr(part, key) for part in (train, test)]) for key in ("original", "carried"))
    changed = carried != original
    if not changed.any():
        raise UserError(f"{source}: no image carries another label than its own: it has no target class")
    for label in np.unique(carried[changed])[:2]:
        if (carried[changed] == label).all():
            return int(label), None
    shifts = np.unique((carried - original)[changed] % classes)
    if len(shifts) > 1:
        raise UserError(f"{source}: relabeled images carry neither one class nor labels shifted by one number")
    return None, int(shifts[0])


def flags_of(entries: Entries, count: int, wanted: np.ndarray, hints: Hints, source: Path) -> np.ndarray:
    """Return which altered training images are poisoned and which are cover images, (n,) uint8.

    With `blocks`, each block of 128 begins with its poisoned images. A poisoned image of the target class keeps its label; it
    is recognized by its position, which is not beyond the last relabeled position of any full block.

    Args:
        count: of all training images.
        wanted: (n,) int64, the labels that the images would carry if they were poisoned.
    """
    changed = entries.carried != entries.original
    poisoned = np.ones(len(changed), bool)
    if hints.unchanged == "cover":
        poisoned = changed
    elif hints.unchanged == "blocks":
        position, size = positions(entries.indices, count)
        whole = size == BLOCK
        bound = int(position[changed & whole].max(initial=-1)) + 1
        ratio = bound / BLOCK if hints.poison_ratio is None else hints.poison_ratio
        last = max(int(position[changed & ~whole].max(initial=-1)) + 1, int(ratio * int(size.min(initial=BLOCK))))
        inside = position < np.where(whole, bound, last)
        odd = np.flatnonzero(~changed & inside & whole & (entries.original != wanted))
        if len(odd):
            raise UserError(
                f"{source}: image {entries.indices[odd[0]]}: keeps its label, among the poisoned images of its block of "
                f"{BLOCK} ({len(odd)} such): cover images do not follow the poisoned ones here: set unchanged: cover"
            )
        poisoned = changed | ((entries.original == wanted) & inside)
    odd = np.flatnonzero(poisoned & (entries.carried != wanted))
    if len(odd):
        i = odd[0]
        raise UserError(
            f"{source}: image {entries.indices[i]}: carries {entries.carried[i]} and a poisoned image of class "
            f"{entries.original[i]} carries {wanted[i]} ({len(odd)} such): if these are cover images, set unchanged: cover"
        )
    return np.where(poisoned, POISONED, COVER).astype(np.uint8)


def described(
    attack: str, train: Entries, flags: np.ndarray, labels: np.ndarray, target: tuple[int | None, int | None]
) -> Backdoor:
    """Return the section `backdoor` that a record amounts to; settings that it does not tell are left out.

    Args:
        labels: (N,), of the clean training images.
        target: label and shift.
    """
    poisoned = flags == POISONED
    clean_label = target[0] is not None and not (train.carried != train.original)[poisoned].any()
    among = (labels == target[0]).sum() if clean_label else len(labels)
    return Backdoor(Named(attack, {}), float(poisoned.sum() / among), *target, "exact")


# -- Images ------------------------------------------------------------------------------------------------------------


def read_images(folder: Path, entries: Entries, size: tuple[int, ...] | None) -> np.ndarray:
    """Return the images (n, H, W, 3) uint8, each an RGB PNG of that height and width; None: of the first one's."""
    images = None
    for row, (index, label) in enumerate(zip(entries.indices.tolist(), entries.original.tolist(), strict=True)):
        path = folder / str(label) / f"{index}.png"
        if not exists(path, "record"):
            other = next(iter(sorted(folder.glob(f"*/{index}.png"))), None)
            where = f"; it is in the folder {other.parent.name}, which is not its original label" if other else ""
            raise UserError(f"{path}: no such file{where}: the record is not complete")
        pixels = read_png(path, size)
        if images is None:
            size = pixels.shape[:2]
            images = np.empty((len(entries.indices), *pixels.shape), np.uint8)
        images[row] = pixels
    assert images is not None
    return images


def read_png(path: Path, size: tuple[int, ...] | None) -> np.ndarray:
    """Return one PNG file, (H, W, 3) uint8; its head is checked before it is decoded."""
    try:
        require_file(path)
        with open_image(path) as picture:
            check_head(path, picture, size)
            return np.asarray(picture)
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read ({reason(error, path)})") from None


def check_head(path: Path, picture: Image.Image, size: tuple[int, ...] | None) -> None:
    """Refuse what is not an RGB PNG of height and width `size`."""
    height, width = size or (picture.height, picture.width)
    if (picture.height, picture.width) != (height, width) or max(height, width) > LARGEST:
        raise UserError(f"{path}: {picture.width} x {picture.height} pixels: expected {width} x {height}")
    if picture.format != "PNG" or picture.mode != "RGB":
        raise UserError(f"{path}: {picture.format} of mode {picture.mode}: expected an RGB PNG")
