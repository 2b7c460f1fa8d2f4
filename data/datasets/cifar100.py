"""CIFAR-100 (Krizhevsky, 2009) in its authors' Python layout, a folder `cifar-100-python`; with the 100 fine labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.datasets._cifar import find_folder, read_batch
from data.io.unpickle import read_pickle
from data.sets import RawData
from utils.errors import UserError
from utils.paths import user_path

FOLDER_NAMES = "cifar-?100"
FOLDER = "cifar-100-python"
BACKDOORBENCH = "cifar100"
COUNT = 100


@dataclass(frozen=True)
class Settings:
    """No settings: `dataset: cifar100`."""


def load(settings: Settings, dataset_dir: str | None, download: bool) -> RawData:
    """Read `train`, `test` and the names of the classes."""
    if dataset_dir is None:
        raise UserError(f"dataset_dir: missing: give the folder {FOLDER}")
    folder = find_folder(user_path(dataset_dir, "dataset_dir"), download, "CIFAR-100", FOLDER, ("train", "test"))
    train, test = (read_batch(folder / name, "CIFAR-100", "fine_labels", COUNT) for name in ("train", "test"))
    return RawData(*train, *test, read_names(folder / "meta"))


def read_names(path: Path) -> tuple[str, ...]:
    """Read the names of the fine classes."""
    meta = read_pickle(path)
    names = meta.get("fine_label_names") if isinstance(meta, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise UserError(f"{path}: contains no names of the fine classes: unpack the data set again")
    if len(set(names)) != COUNT or len(names) != COUNT:
        raise UserError(f"{path}: names {len(set(names))} classes instead of {COUNT}: unpack the data set again")
    return tuple(names)
