"""CIFAR-100 (Krizhevsky, 2009) in its authors' python layout, a folder `cifar-100-python`; the 100 fine labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.datasets.cifar10 import read_batch
from data.sets import RawData
from data.unpickle import read_pickle
from utils.errors import UserError

FOLDER = "cifar-100-python"
COUNT = 100


@dataclass(frozen=True)
class Settings:
    """No settings: `dataset: cifar100`."""


def load(settings: Settings, dataset_dir: str | None, download: bool) -> RawData:
    """Read `train`, `test` and the names of the classes."""
    if dataset_dir is None:
        raise UserError(f"dataset_dir: missing: give the folder of {FOLDER}")
    folder = find_folder(Path(dataset_dir).expanduser(), download)
    train, test = (read_batch(folder / name, "CIFAR-100", "fine_labels", COUNT) for name in ("train", "test"))
    return RawData(*train, *test, read_names(folder / "meta"))


def find_folder(folder: Path, download: bool) -> Path:
    """Return the folder of the files: the one named or the one inside it; fetch it where that is allowed."""
    for candidate in (folder, folder / FOLDER):
        if (candidate / "train").is_file() or (candidate / "test").is_file():
            return candidate
    if not download:
        raise UserError(
            f"dataset_dir: {folder}: CIFAR-100 is not there: get cifar-100-python.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there, or set download: true (--set download=true)"
        )
    from torchvision.datasets import CIFAR100  # only here: it brings in all of torchvision

    parent = folder.parent if folder.name == FOLDER else folder
    try:
        CIFAR100(str(parent), download=True)
    except Exception as error:  # the downloader raises whatever its network stack does
        what = " ".join(str(error).split())
        raise UserError(f"dataset_dir: {folder}: the download failed ({what}): fetch CIFAR-100 by hand") from None
    return parent / FOLDER


def read_names(path: Path) -> tuple[str, ...]:
    """Read the names of the fine classes."""
    meta = read_pickle(path)
    names = meta.get("fine_label_names") if isinstance(meta, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise UserError(f"{path}: holds no names of the fine classes: unpack the data set again")
    if len(set(names)) != COUNT or len(names) != COUNT:
        raise UserError(f"{path}: names {len(set(names))} classes and not {COUNT}: unpack the data set again")
    return tuple(names)
