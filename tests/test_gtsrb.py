"""GTSRB in its official layout and in torchvision's: images, labels, and inconsistent CSV files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
import yaml
from conftest import TINY
from PIL import Image
from torchvision.transforms import Resize

from data.datasets import gtsrb
from data.io import tables
from data.seeds import choose_seed_samples
from data.sets import RawData
from data.sources import prepare
from utils import config
from utils.errors import UserError

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
TRAIN = {0: [(33, 29), (15, 15)], 7: [(40, 50)], 42: [(60, 32), (20, 31), (33, 33)]}  # sizes of the images of each class
TEST = [(25, 31, 42), (32, 32, 0), (48, 20, 7), (19, 23, 42)]  # width, height, class


def sign(seed: int, width: int, height: int) -> Image.Image:
    """A random image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write_official(base: Path, train: str = "Final_Training/Images", csv_at: str = "Final_Test/Images") -> Path:
    """Write a small GTSRB below `base`; return `base`."""
    for label, sizes in TRAIN.items():
        folder = base / train / f"{label:05d}"
        folder.mkdir(parents=True)
        rows = [HEADER]
        for i, (width, height) in enumerate(sizes):
            sign(100 * label + i, width, height).save(folder / f"{i:05d}_00000.ppm")
            rows.append(f"{i:05d}_00000.ppm;{width};{height};5;6;9;9;{label}")
        (folder / f"GT-{label:05d}.csv").write_text("\r\n".join(rows) + "\r\n")
    images = base / "Final_Test/Images"
    images.mkdir(parents=True)
    rows = [HEADER]
    for i, (width, height, label) in enumerate(TEST):
        sign(9000 + i, width, height).save(images / f"{i:05d}.ppm")
        rows.append(f"{i:05d}.ppm;{width};{height};5;6;9;9;{label}")
    (base / csv_at).mkdir(parents=True, exist_ok=True)
    (base / csv_at / "GT-final_test.csv").write_text("\r\n".join(rows) + "\r\n")
    return base


def read(folder: Path, cache: Path, pre: tuple[object, ...] = (), download: bool = False) -> RawData:
    """Load and decode as a run does."""
    return tables.to_raw(gtsrb.load(gtsrb.Settings(), str(folder), download), pre, cache, False)


def assert_right(raw: RawData) -> None:
    """Compare every image with torchvision's Resize of the original."""
    drawn = [(sign(100 * c + i, *size), c) for c, sizes in TRAIN.items() for i, size in enumerate(sizes)]
    tested = [(sign(9000 + i, width, height), c) for i, (width, height, c) in enumerate(TEST)]
    for images, labels, wanted in (
        (raw.train_images, raw.train_labels, drawn),
        (raw.test_images, raw.test_labels, tested),
    ):
        assert images.shape == (len(wanted), 32, 32, 3) and images.dtype == np.uint8
        assert labels.tolist() == [c for _, c in wanted]
        for image, (original, _) in zip(images, wanted, strict=True):
            assert np.array_equal(image, np.asarray(Resize((32, 32))(original)))


def test_csv_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As spreadsheet programs write them."""
    write_official(tmp_path / "GTSRB")
    for path in (tmp_path / "GTSRB").rglob("*.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_right(read(tmp_path / "GTSRB", tmp_path / "cache"))


def test_copies_of_training_images_are_seed_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of known clean images holds files of the data set: they are compared after the resize that the set itself has,
    and another image is refused."""
    monkeypatch.setattr(sys.modules[__name__], "TRAIN", {label: [(33, 29), (30, 31)] for label in range(43)})
    root = write_official(tmp_path / "GTSRB")
    for label in TRAIN:
        (tmp_path / f"clean/{label:05d}").mkdir(parents=True)
        shutil.copy(root / f"Final_Training/Images/{label:05d}/00000_00000.ppm", tmp_path / f"clean/{label:05d}")
    raw = TINY | {
        "dataset": "gtsrb", "dataset_dir": str(root), "num_classes": 43, "seed_samples": str(tmp_path / "clean"),
        "saved_dir": str(tmp_path / "saved"), "backdoor": {"poison_ratio": 0, "badnets": {}},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    loaded = config.load(tmp_path / "own.yaml")
    data = prepare(loaded, tmp_path / "run")
    chosen = choose_seed_samples(loaded, data, tmp_path / "run")
    assert data.names is not None and [data.names[i] for i in chosen] == [f"{c:05d}/00000_00000.ppm" for c in TRAIN]
    sign(1, 33, 29).save(tmp_path / "clean/00000/00000_00000.ppm")
    with pytest.raises(UserError, match="is not the training image"):
        choose_seed_samples(loaded, data, tmp_path / "run")


@pytest.mark.parametrize("named", [".", "GTSRB"])
@pytest.mark.parametrize("csv_at", ["Final_Test/Images", "Final_Test", ".", ".."])
def test_the_official_layout_is_read(tmp_path: Path, named: str, csv_at: str) -> None:
    """Every image has 32 x 32 pixels and its class, wherever the test labels were unpacked and whichever folder is named."""
    write_official(tmp_path / "GTSRB", csv_at=csv_at)
    raw = read(tmp_path / named, tmp_path / "cache")
    assert_right(raw)
    assert len(raw.class_names) == len(set(raw.class_names)) == 43
    known = {0: "speed limit 20", 8: "speed limit 120", 12: "priority road", 13: "give way", 14: "stop", 17: "no entry",
             33: "turn right ahead", 34: "turn left ahead", 38: "keep right", 39: "keep left", 40: "roundabout"}  # fmt: skip
    assert {number: raw.class_names[number] for number in known} == known


def test_torchvisions_layout_is_read(tmp_path: Path) -> None:
    """The layout that torchvision's download creates gives the same images, with torchvision's labels."""
    write_official(tmp_path / "gtsrb/GTSRB", "Training", "..")
    for folder in (tmp_path, tmp_path / "gtsrb", tmp_path / "gtsrb/GTSRB"):
        assert_right(read(folder, tmp_path / "cache"))
    theirs = torchvision.datasets.GTSRB(str(tmp_path), "test")
    assert [label for _, label in theirs] == [c for *_, c in TEST]


def test_a_pre_transform_replaces_the_32_pixels(tmp_path: Path) -> None:
    """If `transform.pre` is given, it determines the size."""
    from data.transforms import resize

    write_official(tmp_path)
    assert read(tmp_path, tmp_path / "cache", (resize.Settings((40, 48)),)).train_images.shape == (6, 40, 48, 3)


def test_torchvision_downloads_a_missing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`download: true` downloads both parts if the set is missing, and nothing if it exists."""
    calls: list[tuple[str, str]] = []

    def fake(root: str, split: str, download: bool) -> None:
        calls.append((root, split))
        if split == "test":
            write_official(Path(root) / "gtsrb/GTSRB", "Training", "..")

    monkeypatch.setattr(torchvision.datasets, "GTSRB", fake)
    assert_right(read(tmp_path / "new", tmp_path / "cache", download=True))
    assert_right(read(tmp_path / "new", tmp_path / "cache", download=True))
    assert calls == [(str(tmp_path / "new"), "train"), (str(tmp_path / "new"), "test")]


# -- Inconsistent files ------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    """Return the error of loading, one line."""
    with pytest.raises(UserError) as caught:
        gtsrb.load(gtsrb.Settings(), str(folder), False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_the_error_for_a_missing_set_names_its_source(tmp_path: Path) -> None:
    """The error names the folder, the files to download and the setting that downloads them."""
    text = refusal(tmp_path)
    assert text.startswith(f"dataset_dir: {tmp_path}") and "GTSRB_Final_Test_GT.zip" in text and "download: true" in text
    with pytest.raises(UserError, match="dataset_dir: missing"):
        gtsrb.load(gtsrb.Settings(), None, False)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("00000{}.ppm;", "00009{}.ppm;", "lacks"),
        (";42\r\n", ";43\r\n", "is not in 0..42"),
        (";42\r\n", ";-1\r\n", "is not in 0..42"),
        (";42\r\n", ";\r\n", "is not in 0..42"),
        (";42\r\n", "\r\n", "is not in 0..42"),
        ("ClassId", "Class", "no rows of Filename and ClassId"),
        (";", ",", "no rows of Filename and ClassId"),
        ("00001{}.ppm;", "00000{}.ppm;", "twice"),
    ],
)
def test_an_inconsistent_csv_file_is_refused(tmp_path: Path, part: str, old: str, new: str, complaint: str) -> None:
    """A CSV file with missing images, wrong classes, wrong columns or a repeated image is an error with its name."""
    write_official(tmp_path)
    path = tmp_path / ("Final_Training/Images/00042/GT-00042.csv" if part == "train" else "Final_Test/Images/GT-final_test.csv")
    middle = "_00000" if part == "train" else ""
    text = path.read_bytes().decode()
    assert old.format(middle) in text
    path.write_bytes(text.replace(old.format(middle), new.format(middle)).encode())
    line = refusal(tmp_path)
    assert line.startswith(f"{path}: ") and complaint in line and "unpack" in line


def test_images_that_no_csv_file_lists_are_named(tmp_path: Path) -> None:
    """An image that is not in the CSV file is an error, in the training set and in the test set."""
    write_official(tmp_path)
    for folder in ("Final_Training/Images/00007", "Final_Test/Images"):
        extra = tmp_path / folder / "99999.ppm"
        sign(0, 9, 9).save(extra)
        assert "does not list" in refusal(tmp_path) and "99999.ppm" in refusal(tmp_path)
        extra.unlink()
    gtsrb.load(gtsrb.Settings(), str(tmp_path), False)


def test_other_errors_in_the_tree_are_named(tmp_path: Path) -> None:
    """A class in the wrong folder, a missing test part, missing test labels, a test class without training images, an unknown
    class and an empty class are errors that name the file or folder."""

    def fresh(name: str) -> Path:
        return write_official(tmp_path / name)

    root = fresh("a")
    shutil.move(str(root / "Final_Training/Images/00007"), str(root / "Final_Training/Images/00008"))
    (root / "Final_Training/Images/00008/GT-00007.csv").rename(root / "Final_Training/Images/00008/GT-00008.csv")
    assert "ClassId 7 in the folder of class 8" in refusal(root)
    root = fresh("b")
    shutil.rmtree(root / "Final_Training/Images/00042")
    assert "class 00042 is in the test set but not in the training set" in refusal(root)
    root = fresh("c")
    (root / "Final_Test/Images/GT-final_test.csv").rename(root / "Final_Test/Images/GT-final_test.test.csv")
    assert "GTSRB_Final_Test_GT.zip" in refusal(root)
    root = fresh("d")
    shutil.rmtree(root / "Final_Test")
    assert "GTSRB_Final_Test_Images.zip" in refusal(root)
    root = fresh("e")
    (root / "Final_Training/Images/00043").mkdir()
    assert "not a class of GTSRB" in refusal(root)
    root = fresh("f")
    (root / "Final_Training/Images/00011").mkdir()
    assert "contains no images" in refusal(root)
