"""Your own images: `train/<class>/*` and `test/<class>/*` (or `val/`, as in ImageNet), of any format and size.

Classes are numbered in the order of their folders' names, images by class and file name, as in torchvision's ImageFolder.
Hidden files and files that file systems and file managers create are ignored; every other file of a class counts as an image.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.io.image_file import SUFFIXES
from data.sets import Listing
from utils.config.schema import setting
from utils.errors import UserError, nearest, printable
from utils.names import Names
from utils.paths import is_broken_link, is_dir, is_folder, user_path, visible

logger = logging.getLogger(__name__)
FOLDER_NAMES = "^(?!.*tiny.?imagenet).*(imagenet|vggface2?)"


@dataclass(frozen=True)
class Settings:
    classes: tuple[str, ...] = setting((), "the class folders to use, e.g. 30 of ImageNet's; empty: all in train/")
    skip_unreadable: bool = setting(False, "leave out images that cannot be read, instead of an error that names them")


def load(settings: Settings, dataset_dir: str | None, download: bool) -> Listing:
    """List the images of both parts; without a test folder, there are no test images."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder that contains train/<class>/* and test/<class>/*")
    root = user_path(dataset_dir, "dataset_dir")
    train, test = root / "train", root / ("test" if has_folder(root / "test") else "val")
    if not has_folder(train):
        raise UserError(f"dataset_dir: {root}: has no folder train: put the images into train/<class>/ and test/<class>/ there")
    known = Names(class_folders(train))
    test_folders = by_class(class_folders(test), known, test) if has_folder(test) else {}
    names = chosen(settings.classes, known, train)
    train_files, train_labels = labeled_files(root, train, names, {name: name for name in names})
    test_files, test_labels = labeled_files(root, test, names, test_folders)
    untested = [name for label, name in enumerate(names) if label not in test_labels]
    if untested and test_files:
        logger.info(
            f"{test}: no images of {len(untested)} of {len(names)} classes (the first: {printable(untested[0])}): the ACC is "
            "that of the other classes"
        )
    return Listing(
        "folder", root, train_files, train_labels, test_files, test_labels, tuple(names), (), settings.skip_unreadable
    )


def has_folder(path: Path) -> bool:
    """Return whether there is a folder; refuse a file or a broken link of that name, perhaps to a disk that is not mounted."""
    if is_dir(path, "dataset_dir"):
        return True
    if os.path.lexists(path):
        raise UserError(f"{path}: a file or a broken link instead of a folder: repair or remove it")
    return False


def class_folders(part: Path) -> list[str]:
    """Return the sorted names of the class folders of train/ or test/."""
    names = []
    for entry in visible(part):
        if is_dir(Path(entry.path), "dataset_dir"):
            names.append(entry.name)
        elif is_broken_link(entry, "dataset_dir"):  # perhaps a class on a disk that is not mounted
            raise UserError(f"{entry.path}: broken link: repair or remove it")
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            raise UserError(f"{entry.path}: an image outside of the class folders: move it into one of them, or remove it")
    if not names:
        raise UserError(f"{part}: contains no class folders: put the images of each class into a folder with its name there")
    return names


def by_class(folders: Iterable[str], known: Names, test: Path) -> dict[str, str]:
    """Return the folders of test/ by the name of their class in train/.

    Raises:
        UserError: train/ has no such class, or two folders match one class.
    """
    out: dict[str, str] = {}
    unknown = []
    for folder in sorted(folders, key=lambda name: name not in known.names):  # exact matches first
        name = known.find(folder)
        if name is None or name in out:
            unknown.append(folder)
        else:
            out[name] = folder
    if unknown:
        raise UserError(
            f"{test / unknown[0]}: no such class in train (the first of {len(unknown)}): {nearest(unknown[0], known.names)}: "
            "rename or remove it"
        )
    return out


def chosen(classes: tuple[str, ...], known: Names, train: Path) -> list[str]:
    """Return the sorted names of the classes to use, in the form of their folders' names; none given: all."""
    out: list[str] = []
    for given in classes:
        name = known.find(given)
        if name is None:
            raise UserError(f"dataset.folder.classes: {given}: no such folder in {train}: {nearest(given, known.names)}")
        if name in out:
            raise UserError(f"dataset.folder.classes: {given}: named twice: keep one")
        out.append(name)
    return sorted(out or known.names)


def labeled_files(root: Path, part: Path, names: list[str], folders: dict[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the image files of the classes, as paths relative to `root`, and their labels (n,) int64.

    Args:
        folders: the folder of each class; in test/ it may be missing or empty.
    """
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in folders:
            continue
        folder = part / folders[name]
        found = visible(folder)
        if not found and part.name == "train":
            remedy = "add some, remove the folder, or list the other classes in dataset.folder.classes"
            raise UserError(f"{folder}: contains no images: {remedy}")
        for entry in found:
            if is_folder(entry):
                raise UserError(f"{entry.path}: a folder inside a class folder: move its images up, or remove it")
        files += [f"{part.name}/{folder.name}/{entry.name}" for entry in found]
        labels += [label] * len(found)
    return tuple(files), np.asarray(labels, np.int64)
