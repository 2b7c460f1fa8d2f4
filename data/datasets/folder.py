"""Your own pictures: `train/<class>/*` and `test/<class>/*` (or `val/`, as ImageNet has it), of any format and size.

Classes are numbered by the sorted names of their folders, pictures by class and sorted file name, as torchvision's
ImageFolder does. Hidden files and what file systems and file managers leave are passed over; every other file of a class
is a picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sets import Listing
from utils.errors import UserError, nearest
from utils.names import Names
from utils.paths import exists, is_dir, is_folder, user_path, visible
from utils.schema import setting

FOLDER_NAMES = "^(?!.*tiny.?imagenet).*(imagenet|vggface2?)"


@dataclass(frozen=True)
class Settings:
    classes: tuple[str, ...] = setting((), "the class folders to take, e.g. 30 of ImageNet's; empty: all of train/")
    skip_unreadable: bool = setting(False, "leave out pictures that cannot be read, instead of an error that names them")


def load(settings: Settings, dataset_dir: str | None, download: bool) -> Listing:
    """List the pictures of both parts; a data set without a test folder has none there."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder that holds train/<class>/* and test/<class>/*")
    root = user_path(dataset_dir, "dataset_dir")
    train, test = root / "train", root / ("test" if is_dir(root / "test", "dataset_dir") else "val")
    if not is_dir(train, "dataset_dir"):
        raise UserError(
            f"dataset_dir: {root}: has no folder train: put the pictures into train/<class>/ and test/<class>/ there"
        )
    there = class_folders(train)
    known = Names(there)
    test_folders = by_class(class_folders(test), known, test) if is_dir(test, "dataset_dir") else {}
    names = chosen(settings.classes, known, train)
    train_files, train_labels = pictures(root, train, names, {name: name for name in names})
    test_files, test_labels = pictures(root, test, names, test_folders)
    return Listing(
        "folder", root, train_files, train_labels, test_files, test_labels, tuple(names), (), settings.skip_unreadable
    )


def class_folders(part: Path) -> list[str]:
    """Return the sorted names of the class folders of train/ or test/."""
    names = []
    for entry in visible(part):
        if is_dir(Path(entry.path), "dataset_dir"):
            names.append(entry.name)
        elif entry.is_symlink() and not exists(Path(entry.path), "dataset_dir"):  # perhaps a class on a disk that is not there
            raise UserError(f"{entry.path}: a link to nowhere: mend or remove it")
    if not names:
        raise UserError(f"{part}: holds no class folder: put the pictures of each class into a folder of its name there")
    return names


def by_class(folders: Iterable[str], known: Names, test: Path) -> dict[str, str]:
    """Return the folders of test/ by the name of their class in train/.

    Raises:
        UserError: train has no such class, or another folder is it already.
    """
    out: dict[str, str] = {}
    unknown = []
    for folder in sorted(folders, key=lambda name: name not in known.names):  # those of the very name first
        name = known.find(folder)
        if name is None or name in out:
            unknown.append(folder)
        else:
            out[name] = folder
    if unknown:
        raise UserError(
            f"{test / unknown[0]}: a test class that train lacks ({len(unknown)} such): {nearest(unknown[0], known.names)}: "
            "rename or remove it"
        )
    return out


def chosen(classes: tuple[str, ...], known: Names, train: Path) -> list[str]:
    """Return the sorted names of the classes to take, as their folders have them."""
    out: list[str] = []
    for given in classes:
        name = known.find(given)
        if name is None:
            raise UserError(f"dataset.folder.classes: {given}: no folder of {train}: {nearest(given, known.names)}")
        if name in out:
            raise UserError(f"dataset.folder.classes: {given}: is named twice: keep one")
        out.append(name)
    return sorted(out or known.names)


def pictures(root: Path, part: Path, names: list[str], folders: dict[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the pictures of the classes, paths relative to `root`, and their labels (n,) int64.

    Args:
        folders: the folder of each class; a class may have none in test/, or an empty one.
    """
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in folders:
            continue
        folder = part / folders[name]
        found = visible(folder)
        if not found and part.name == "train":
            raise UserError(
                f"{folder}: holds no picture: add some, remove the folder, or list the other classes in dataset.folder.classes"
            )
        for entry in found:
            if is_folder(entry):
                raise UserError(f"{entry.path}: a folder inside a class: move its pictures up, or remove it")
        files += [f"{part.name}/{folder.name}/{entry.name}" for entry in found]
        labels += [label] * len(found)
    return tuple(files), np.asarray(labels, np.int64)
