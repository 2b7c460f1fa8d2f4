"""GTSRB (Stallkamp et al., 2012), 43 German traffic signs, in its official layout and in torchvision's.

    GTSRB/Final_Training/Images/00000/*.ppm   GT-00000.csv     (torchvision: gtsrb/GTSRB/Training/00000/...)
    GTSRB/Final_Test/Images/*.ppm             GT-final_test.csv (torchvision: gtsrb/GT-final_test.csv)

The images are not cropped to the signs, as in torchvision, and are resized to 32 x 32 unless `transform.pre` is given.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sets import Listing
from data.transforms import resize
from utils.config.schema import setting
from utils.errors import UserError, one_line
from utils.paths import exists, is_dir, is_folder, require_file, user_path, visible

FOLDER_NAMES = "gtsrb"
BACKDOORBENCH = "gtsrb"
SIDE = 32
TEST_CSV = "GT-final_test.csv"
CLASSES = (
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
    "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for trucks",
    "right of way at the next crossing", "priority road", "give way", "stop", "no vehicles", "no trucks", "no entry",
    "danger", "bend to the left", "bend to the right", "double bend", "uneven road", "slippery road",
    "road narrows on the right", "road works", "traffic lights", "pedestrians", "children", "bicycles", "ice or snow",
    "wild animals", "end of all limits", "turn right ahead", "turn left ahead", "ahead only", "ahead or right",
    "ahead or left", "keep right", "keep left", "roundabout", "end of no passing", "end of no passing for trucks",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    skip_unreadable: bool = setting(False, "leave out images that cannot be read, instead of an error that names them")


def load(settings: Settings, dataset_dir: str | None, download: bool) -> Listing:
    """List the images of both parts and check them against the CSV files."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder that contains GTSRB/Final_Training and GTSRB/Final_Test")
    root, train = find_folder(user_path(dataset_dir, "dataset_dir"), download)
    train_files, train_labels = read_train(root, train)
    test_files, test_labels = read_test(root)
    missing = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if missing:
        raise UserError(
            f"{root}: class {missing[0]:05d} is in the test set but not in the training set: unpack the data set again"
        )
    pre = (resize.Settings((SIDE, SIDE)),)
    return Listing("gtsrb", root, train_files, train_labels, test_files, test_labels, CLASSES, pre, settings.skip_unreadable)


def find_folder(folder: Path, download: bool) -> tuple[Path, Path]:
    """Return the folder GTSRB and the folder of the training classes below it; download the set if allowed.

    Raises:
        UserError: the set is missing, or cannot be downloaded.
    """
    for root in (folder, folder / "GTSRB", folder / "gtsrb" / "GTSRB"):
        for train in (root / "Final_Training" / "Images", root / "Training"):
            if is_dir(train, "dataset_dir"):
                return root, train
    if not download:
        raise UserError(
            f"dataset_dir: {folder}: does not contain GTSRB: download GTSRB_Final_Training_Images.zip, "
            "GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip from https://benchmark.ini.rub.de and unpack them there, "
            "or set download: true (--set download=true)"
        )
    from torchvision.datasets import GTSRB  # only here: it imports all of torchvision

    try:
        for split in ("train", "test"):
            GTSRB(str(folder), split, download=True)
    except Exception as error:  # the downloader passes on all exceptions of its network libraries
        raise UserError(f"dataset_dir: {folder}: the download failed ({one_line(error)}): download GTSRB yourself") from None
    return find_folder(folder, False)


def read_train(root: Path, train: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the training images by class and name, as paths relative to `root`, and their labels (N,) int64."""
    files: list[str] = []
    labels: list[int] = []
    for entry in visible(train):
        if not is_dir(Path(entry.path), "dataset_dir"):  # the data set's Readme.txt
            continue
        if not (entry.name.isascii() and entry.name.isdigit() and int(entry.name) < len(CLASSES)):
            raise UserError(f"{entry.path}: not a class of GTSRB (00000 to {len(CLASSES) - 1:05d}): move it away")
        label, folder = int(entry.name), train / entry.name
        names = image_names(folder)
        table = folder / f"GT-{entry.name}.csv"
        if exists(table, "dataset_dir"):
            class_ids = read_csv(table)
            check_complete(table, class_ids, folder, names)
            for name, class_id in class_ids.items():
                if class_id != label:
                    raise UserError(
                        f"{table}: {name}: ClassId {class_id} in the folder of class {label}: unpack the data set again"
                    )
        files += [str((folder / name).relative_to(root)) for name in names]
        labels += [label] * len(names)
    if not files:
        raise UserError(f"{train}: contains no class folder 00000 to {len(CLASSES) - 1:05d}: unpack the data set again")
    return tuple(files), np.asarray(labels, np.int64)


def read_test(root: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the test images by name, as paths relative to `root`, and their labels (M,) int64."""
    folder = root / "Final_Test" / "Images"
    if not is_dir(folder, "dataset_dir"):
        raise UserError(f"{folder}: missing: unpack GTSRB_Final_Test_Images.zip")
    places = [place / TEST_CSV for place in (folder, folder.parent, root, root.parent)]
    table = next((path for path in places if exists(path, "dataset_dir")), None)
    if table is None:
        raise UserError(f"{folder / TEST_CSV}: the test labels are missing: unpack GTSRB_Final_Test_GT.zip")
    names, class_ids = image_names(folder), read_csv(table)
    check_complete(table, class_ids, folder, names)
    return tuple(str((folder / name).relative_to(root)) for name in names), np.asarray([class_ids[n] for n in names], np.int64)


def image_names(folder: Path) -> list[str]:
    """Return the sorted names of the images in a folder: all its files except the CSV file."""
    names = [entry.name for entry in visible(folder) if not is_folder(entry) and not entry.name.lower().endswith(".csv")]
    if not names:
        raise UserError(f"{folder}: contains no images: unpack the data set again")
    return names


def read_csv(path: Path) -> dict[str, int]:
    """Return the class of each image from a GT-*.csv, whose columns Filename and ClassId are separated by semicolons."""
    try:
        require_file(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}): unpack the data set again") from None
    if not rows or not {"Filename", "ClassId"} <= rows[0].keys():
        raise UserError(f"{path}: no rows of Filename and ClassId, separated by semicolons: unpack the data set again")
    class_ids: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        name, text = str(row["Filename"]), str(row["ClassId"]).strip()
        if not (text.isascii() and text.isdigit() and int(text) < len(CLASSES)):
            raise UserError(
                f"{path}: line {line}: ClassId {text!r:.40} is not in 0..{len(CLASSES) - 1}: unpack the data set again"
            )
        if name in class_ids:
            raise UserError(f"{path}: line {line}: {name!r:.80} is listed twice: unpack the data set again")
        class_ids[name] = int(text)
    return class_ids


def check_complete(table: Path, class_ids: dict[str, int], folder: Path, names: list[str]) -> None:
    """Raise UserError unless the CSV file lists exactly the images of the folder."""
    absent, unlisted = sorted(set(class_ids) - set(names)), sorted(set(names) - set(class_ids))
    for files, what in ((absent, f"lists images that {folder} lacks"), (unlisted, f"does not list all images of {folder}")):
        if files:
            raise UserError(f"{table}: {what}: {len(files)}, first {files[0]!r:.80}: unpack the data set again")
