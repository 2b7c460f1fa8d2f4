"""Your own pictures: `train/<class>/*` and `test/<class>/*` (or `val/`, as ImageNet has it), of any format and size.

Classes are numbered by the sorted names of their folders, pictures by class and sorted file name, as torchvision's
ImageFolder does. Hidden files and what file managers leave are passed over; every other file of a class is a picture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sets import Listing
from utils.errors import UserError, nearest
from utils.schema import setting

LEFT_BY_PROGRAMS = ("thumbs.db", "desktop.ini", "__macosx")


@dataclass(frozen=True)
class Settings:
    classes: tuple[str, ...] = setting((), "the class folders to take, e.g. 30 of ImageNet's; empty: all of train/")
    skip_unreadable: bool = setting(False, "leave out pictures that cannot be read, instead of an error that names them")


def load(settings: Settings, dataset_dir: str | None, download: bool) -> Listing:
    """List the pictures of both parts; a data set without a test folder has none there."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder that holds train/<class>/* and test/<class>/*")
    root = Path(dataset_dir).expanduser()
    train, test = root / "train", root / ("test" if (root / "test").is_dir() else "val")
    if not train.is_dir():
        raise UserError(
            f"dataset_dir: {root}: has no folder train: put the pictures into train/<class>/ and test/<class>/ there"
        )
    there = class_folders(train)
    test_classes = class_folders(test) if test.is_dir() else []
    unknown = sorted(set(test_classes) - set(there))
    if unknown:
        raise UserError(
            f"{test / unknown[0]}: a test class that train lacks ({len(unknown)} such): {nearest(unknown[0], there)}: rename "
            "or remove it"
        )
    names = chosen(settings.classes, there, train)
    train_files, train_labels = pictures(root, train, names, there)
    test_files, test_labels = pictures(root, test, names, test_classes)
    return Listing(
        "folder", root, train_files, train_labels, test_files, test_labels, tuple(names), (), settings.skip_unreadable
    )


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, sorted by name, without hidden files and what file managers leave."""
    try:
        with os.scandir(folder) as entries:
            kept = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BY_PROGRAMS]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}): make it readable") from None
    return sorted(kept, key=lambda entry: entry.name)


def class_folders(part: Path) -> list[str]:
    """Return the sorted names of the class folders of train/ or test/."""
    names = [entry.name for entry in visible(part) if entry.is_dir()]
    if not names:
        raise UserError(f"{part}: holds no class folder: put the pictures of each class into a folder of its name there")
    return names


def chosen(classes: tuple[str, ...], there: list[str], train: Path) -> list[str]:
    """Return the sorted names of the classes to take."""
    for name in classes:
        if name not in there:
            raise UserError(f"dataset.folder.classes: {name}: no folder of {train}: {nearest(name, there)}")
        if classes.count(name) > 1:
            raise UserError(f"dataset.folder.classes: {name}: is named twice: keep one")
    return sorted(classes) or there


def pictures(root: Path, part: Path, names: list[str], there: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the pictures of the classes, paths relative to `root`, and their labels (n,) int64."""
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in there:  # a class without test pictures
            continue
        found = visible(part / name)
        if not found:
            raise UserError(f"{part / name}: holds no picture: add some, or remove the folder")
        for entry in found:
            if entry.is_dir():
                raise UserError(f"{entry.path}: a folder inside a class: move its pictures up, or remove it")
        files += [f"{part.name}/{name}/{entry.name}" for entry in found]
        labels += [label] * len(found)
    return tuple(files), np.asarray(labels, np.int64)
