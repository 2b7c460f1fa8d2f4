"""Tiny-ImageNet-200 (Stanford CS231n, 2015): 200 classes of ImageNet, named by WordNet's numbers (wnid), at 64 x 64 pixels.

    train/<wnid>/images/*.JPEG         or train/<wnid>/*.JPEG
    val/images/*.JPEG                  and val/val_annotations.txt (per line: file, wnid, four numbers of a box; by tabs)
                                       or val/<wnid>/*.JPEG, or val/<wnid>/images/*.JPEG
    words.txt                          names of the classes (wnid, tab, names); optional

Many copies are rearranged to the forms on the right. The validation images are the test set; the folder test has no labels
and is not read. Classes are numbered by their sorted wnid, which is not the order of wnids.txt; images by class and file name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.io.image_file import SUFFIXES
from data.sets import Listing
from utils.config.schema import setting
from utils.errors import UserError, one_line
from utils.paths import exists, is_broken_link, is_dir, is_folder, require_file, user_path, visible

FOLDER_NAMES = "tiny.?imagenet"
BACKDOORBENCH = "tiny"
ANNOTATIONS, WORDS = "val_annotations.txt", "words.txt"
AGAIN = "unpack tiny-imagenet-200.zip again"


@dataclass(frozen=True)
class Settings:
    skip_unreadable: bool = setting(False, "leave out images that cannot be read, instead of an error that names them")


def load(settings: Settings, dataset_dir: str | None, download: bool) -> Listing:
    """List the images of train and val; each class has images in both."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder that holds train and val of Tiny-ImageNet-200")
    root = find_folder(user_path(dataset_dir, "dataset_dir"))
    train = by_folder(root / "train")
    # Rearranged copies often keep the annotations, which name files that are in folders of their classes now.
    original = is_dir(root / "val" / "images", "dataset_dir") and exists(root / "val" / ANNOTATIONS, "dataset_dir")
    val = annotated(root / "val") if original else by_folder(root / "val")
    unknown = sorted(set(val) - set(train))
    if unknown:
        raise UserError(f"{root / 'val'}: class {unknown[0]!r:.80}: not in {root / 'train'} ({len(unknown)} such): {AGAIN}")
    for part, found in (("train", train), ("val", val)):
        empty = [wnid for wnid in sorted(train) if not found.get(wnid)]
        if empty:
            raise UserError(f"{root / part}: class {empty[0]}: no images ({len(empty)} such classes): {AGAIN}")
    wnids = sorted(train)
    return Listing(
        "tiny_imagenet", root, *in_order(train, wnids, root), *in_order(val, wnids, root), names_of(root, wnids), (),
        settings.skip_unreadable, passed_over="images",
    )  # fmt: skip


def find_folder(folder: Path) -> Path:
    """Return the folder that holds train and val: the one named, or tiny-imagenet-200 inside it."""
    for root in (folder, folder / "tiny-imagenet-200"):
        if is_dir(root / "train", "dataset_dir") and is_dir(root / "val", "dataset_dir"):
            return root
    raise UserError(
        f"dataset_dir: {folder}: Tiny-ImageNet is not there (no folders train and val): get tiny-imagenet-200.zip from "
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it there"
    )


def by_folder(part: Path) -> dict[str, list[Path]]:
    """Return the images of each class folder of train/ or val/: those in its folder images, else those directly in it."""
    found = {}
    for entry in visible(part):
        if is_folder(entry):
            found[entry.name] = images_of_class(Path(entry.path))
        elif is_broken_link(entry, "dataset_dir"):  # without it, all labels would shift
            raise UserError(f"{entry.path}: broken link: repair or remove it")
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            raise UserError(f"{entry.path}: an image outside of the class folders: {AGAIN}")
    if part.name == "val" and list(found) == ["images"]:
        raise UserError(f"{part / ANNOTATIONS}: no such file, and the images are not in folders of their classes: {AGAIN}")
    return found


def images_of_class(folder: Path) -> list[Path]:
    """Return the images of a class folder by name: those in its folder images, or those directly in it."""
    if not is_dir(folder / "images", "dataset_dir"):
        return files_but_texts(folder)
    beside = [entry for entry in visible(folder) if entry.name != "images" and not entry.name.lower().endswith(".txt")]
    if beside:
        raise UserError(f"{beside[0].path}: only the folder images and texts belong there: {AGAIN}")
    return files_but_texts(folder / "images")


def files_but_texts(folder: Path) -> list[Path]:
    """Return the images of a folder by name; texts, as the boxes of a class, are none."""
    entries = [entry for entry in visible(folder) if not entry.name.lower().endswith(".txt")]
    for entry in entries:
        if is_folder(entry):
            raise UserError(f"{entry.path}: a folder among the images of a class: {AGAIN}")
    return [Path(entry.path) for entry in entries]


def annotated(part: Path) -> dict[str, list[Path]]:
    """Return the images of val/images by the wnid that `val_annotations.txt` gives them; each image has one line."""
    path = part / ANNOTATIONS
    there = {file.name: file for file in files_but_texts(part / "images")}
    found: dict[str, list[Path]] = {}
    for number, line in enumerate(read_lines(path), 1):
        columns = line.split("\t")
        if len(columns) < 2 or not columns[1].strip():
            raise UserError(
                f"{path}: line {number}: {line!r:.80}: expected a file name and a class, separated by tabs: {AGAIN}"
            )
        name, wnid = columns[0], columns[1].strip()
        if name not in there:
            raise UserError(f"{path}: line {number}: {name!r:.80}: not in {part / 'images'}, or listed before: {AGAIN}")
        found.setdefault(wnid, []).append(there.pop(name))
    if there:
        raise UserError(f"{path}: does not list {len(there)} images of {part / 'images'} (first: {min(there)!r:.80}): {AGAIN}")
    return found


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    try:
        require_file(path)
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}): {AGAIN}") from None


def in_order(found: dict[str, list[Path]], wnids: Iterable[str], root: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the images by class and name, paths relative to `root`, and their labels (n,) int64."""
    files: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(wnids):
        names = sorted(str(path.relative_to(root)) for path in found[wnid])
        files += names
        labels += [label] * len(names)
    return tuple(files), np.asarray(labels, np.int64)


def names_of(root: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return the classes' names as words.txt has them; the wnid where it has none or two classes share one."""
    words: dict[str, str] = {}
    if exists(root / WORDS, "dataset_dir"):
        for line in read_lines(root / WORDS):
            wnid, _, name = line.partition("\t")
            words[wnid.strip()] = name.strip()
    names = [words.get(wnid) or wnid for wnid in wnids]
    names = [name if name.isprintable() else wnid for name, wnid in zip(names, wnids, strict=True)]
    return tuple(wnid if names.count(name) > 1 else name for name, wnid in zip(names, wnids, strict=True))
