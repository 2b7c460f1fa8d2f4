"""GTSRB (Stallkamp et al., 2012), 43 German traffic signs, in its official layout and in torchvision's.

    GTSRB/Final_Training/Images/00000/*.ppm   GT-00000.csv     (torchvision: gtsrb/GTSRB/Training/00000/...)
    GTSRB/Final_Test/Images/*.ppm             GT-final_test.csv (torchvision: gtsrb/GT-final_test.csv)

The pictures are used whole, as torchvision does, and are resized to 32 x 32 unless `transform.pre` says otherwise.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sets import Listing
from data.transforms import resize
from utils.errors import UserError
from utils.paths import exists, is_dir, is_folder, require_file, user_path, visible
from utils.schema import setting

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
    skip_unreadable: bool = setting(False, "leave out pictures that cannot be read, instead of an error that names them")


def load(settings: Settings, dataset_dir: str | None, download: bool) -> Listing:
    """List the pictures of both parts and check them against the CSV files."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder that holds GTSRB/Final_Training and GTSRB/Final_Test")
    root, train = find_folder(user_path(dataset_dir, "dataset_dir"), download)
    train_files, train_labels = read_train(root, train)
    test_files, test_labels = read_test(root)
    lacking = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if lacking:
        raise UserError(f"{root}: class {lacking[0]:05d} is in the test set and not in training: unpack the data set again")
    pre = (resize.Settings((SIDE, SIDE)),)
    return Listing("gtsrb", root, train_files, train_labels, test_files, test_labels, CLASSES, pre, settings.skip_unreadable)


def find_folder(folder: Path, download: bool) -> tuple[Path, Path]:
    """Return the folder GTSRB and, below it, that of the training classes; fetch them where that is allowed."""
    for root in (folder, folder / "GTSRB", folder / "gtsrb" / "GTSRB"):
        for train in (root / "Final_Training" / "Images", root / "Training"):
            if is_dir(train, "dataset_dir"):
                return root, train
    if not download:
        raise UserError(
            f"dataset_dir: {folder}: GTSRB is not there: get GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and "
            "GTSRB_Final_Test_GT.zip from https://benchmark.ini.rub.de and unpack them there, or set download: true (--set "
            "download=true)"
        )
    from torchvision.datasets import GTSRB  # only here: it brings in all of torchvision

    try:
        for split in ("train", "test"):
            GTSRB(str(folder), split, download=True)
    except Exception as error:  # the downloader raises whatever its network stack does
        what = " ".join(str(error).split())
        raise UserError(f"dataset_dir: {folder}: the download failed ({what}): fetch GTSRB by hand") from None
    return find_folder(folder, False)


def read_train(root: Path, train: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the training pictures, paths relative to `root`, by class and name, and their labels (N,) int64."""
    files: list[str] = []
    labels: list[int] = []
    for entry in visible(train):
        if not is_dir(Path(entry.path), "dataset_dir"):  # the data set's read-me
            continue
        if not (entry.name.isascii() and entry.name.isdigit() and int(entry.name) < len(CLASSES)):
            raise UserError(f"{entry.path}: is no class of GTSRB (00000 to {len(CLASSES) - 1:05d}): move it away")
        label, folder = int(entry.name), train / entry.name
        names = picture_names(folder)
        table = folder / f"GT-{entry.name}.csv"
        if exists(table, "dataset_dir"):
            told = read_csv(table)
            compare(table, told, folder, names)
            for name, said in told.items():
                if said != label:
                    raise UserError(
                        f"{table}: {name}: ClassId {said} in the folder of class {label}: unpack the data set again"
                    )
        files += [str((folder / name).relative_to(root)) for name in names]
        labels += [label] * len(names)
    if not files:
        raise UserError(f"{train}: holds no class folder 00000 to {len(CLASSES) - 1:05d}: unpack the data set again")
    return tuple(files), np.asarray(labels, np.int64)


def read_test(root: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the test pictures, paths relative to `root`, by name, and their labels (M,) int64."""
    folder = root / "Final_Test" / "Images"
    if not is_dir(folder, "dataset_dir"):
        raise UserError(f"{folder}: is missing: unpack GTSRB_Final_Test_Images.zip")
    places = [place / TEST_CSV for place in (folder, folder.parent, root, root.parent)]
    table = next((path for path in places if exists(path, "dataset_dir")), None)
    if table is None:
        raise UserError(f"{folder / TEST_CSV}: the test labels are missing: unpack GTSRB_Final_Test_GT.zip")
    names, told = picture_names(folder), read_csv(table)
    compare(table, told, folder, names)
    return tuple(str((folder / name).relative_to(root)) for name in names), np.asarray([told[n] for n in names], np.int64)


def picture_names(folder: Path) -> list[str]:
    """Return the sorted names of a folder's pictures: all its files but the CSV."""
    names = [entry.name for entry in visible(folder) if not is_folder(entry) and not entry.name.lower().endswith(".csv")]
    if not names:
        raise UserError(f"{folder}: holds no picture: unpack the data set again")
    return names


def read_csv(path: Path) -> dict[str, int]:
    """Return each picture's class as a GT-*.csv has it: columns by semicolons, among them Filename and ClassId."""
    try:
        require_file(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}): unpack the data set again") from None
    if not rows or not {"Filename", "ClassId"} <= rows[0].keys():
        raise UserError(f"{path}: has no rows of Filename and ClassId parted by semicolons: unpack the data set again")
    told: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        name, said = str(row["Filename"]), str(row["ClassId"]).strip()
        if not (said.isascii() and said.isdigit() and int(said) < len(CLASSES)):
            raise UserError(
                f"{path}: line {line}: ClassId {said!r:.40} is not in 0..{len(CLASSES) - 1}: unpack the data set again"
            )
        if name in told:
            raise UserError(f"{path}: line {line}: {name!r:.80} stands there twice: unpack the data set again")
        told[name] = int(said)
    return told


def compare(table: Path, told: dict[str, int], folder: Path, names: list[str]) -> None:
    """Refuse a CSV that does not list the very pictures of the folder."""
    absent, unlisted = sorted(set(told) - set(names)), sorted(set(names) - set(told))
    for some, what in ((absent, f"lists pictures that {folder} lacks"), (unlisted, f"does not list pictures of {folder}")):
        if some:
            raise UserError(f"{table}: {what}: {len(some)}, the first {some[0]!r:.80}: unpack the data set again")
