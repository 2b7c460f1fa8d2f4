"""Tiny-ImageNet-200 in its original layout and as other programs rearrange it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import loading
from data.datasets import tiny_imagenet
from data.io import tables
from data.sets import RawData
from utils.errors import UserError

WNIDS = ("n02099601", "n01443537", "n03100240")  # as wnids.txt may have them: not sorted
SORTED = sorted(WNIDS)
TRAIN = ("_10.JPEG", "_2.JPEG", "_0.JPEG")  # as text _10 is before _2
VAL = (("val_3.JPEG", 2), ("val_10.JPEG", 0), ("val_0.JPEG", 1), ("val_2.JPEG", 0))  # name, place in SORTED


def drawn(seed: int, mode: str = "RGB") -> Image.Image:
    """A random image of 64 x 64."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).convert(mode)


def write(root: Path) -> Path:
    """Write the original layout; return the folder."""
    for label, wnid in enumerate(SORTED):
        place = root / "train" / wnid / "images"
        place.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        for i, end in enumerate(TRAIN):
            drawn(10 * label + i, "L" if i == 1 else "RGB").save(place / f"{wnid}{end}")
    (root / "val/images").mkdir(parents=True)
    for i, (name, _) in enumerate(VAL):
        drawn(100 + i).save(root / "val/images" / name)
    lines = [f"{name}\t{SORTED[label]}\t0\t32\t44\t62\n" for name, label in VAL]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "test/images").mkdir(parents=True)
    drawn(1).save(root / "test/images/test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn02099601\tgolden retriever\nn99999999\tcat\n")
    return root


def flat_train(root: Path) -> None:
    """Move the training images out of the folders `images`."""
    for wnid in SORTED:
        for file in (root / "train" / wnid / "images").iterdir():
            shutil.move(file, root / "train" / wnid / file.name)
        (root / "train" / wnid / "images").rmdir()


def sort_val(root: Path, inside: str = ".") -> None:
    """Move the validation images into folders of their classes and delete the annotations."""
    for name, label in VAL:
        place = root / "val" / SORTED[label] / inside
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(root / "val/images" / name, place / name)
    (root / "val/images").rmdir()
    (root / "val/val_annotations.txt").unlink()


def keep_annotations(root: Path) -> None:
    """Rearrange as scripts do that leave the annotations where they were."""
    text = (root / "val/val_annotations.txt").read_text()
    sort_val(root)
    (root / "val/val_annotations.txt").write_text(text)


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "original": lambda root: None,
    "flat train": flat_train,
    "sorted val": sort_val,
    "sorted val with images": lambda root: sort_val(root, "images"),
    "both": lambda root: (flat_train(root), sort_val(root)),
    "sorted val, annotations left": lambda root: keep_annotations(root),
}


def read(folder: Path, cache: Path) -> RawData:
    """Load and decode as a run does."""
    return tables.to_raw(tiny_imagenet.load(tiny_imagenet.Settings(), str(folder), False), (), cache, False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [".", "tiny-imagenet-200"])
def test_every_layout_gives_the_same_set(tmp_path: Path, layout: str, named: str) -> None:
    """Classes by sorted wnid, images of both parts by class and file name as text, grey ones as RGB, whatever the layout."""
    root = write(tmp_path / "tiny-imagenet-200")
    LAYOUTS[layout](root)
    raw = read(tmp_path / named, tmp_path / "cache")
    train = [(label, end) for label in range(3) for end in sorted(TRAIN)]
    val = sorted((label, name, 100 + i) for i, (name, label) in enumerate(VAL))
    assert raw.train_labels.tolist() == [label for label, _ in train] and raw.test_labels.tolist() == [0, 0, 1, 2]
    assert raw.train_images.shape == (9, 64, 64, 3) and raw.test_images.shape == (4, 64, 64, 3)
    for image, (label, end) in zip(raw.train_images, train, strict=True):
        (file,) = root.rglob(f"{SORTED[label]}{end}")
        with Image.open(file) as opened:
            assert np.array_equal(image, np.asarray(opened.convert("RGB")))
    for image, (label, name, _) in zip(raw.test_images, val, strict=True):
        (file,) = root.rglob(name)
        with Image.open(file) as opened:
            assert np.array_equal(image, np.asarray(opened.convert("RGB"))), label
    assert raw.class_names == ("goldfish, Carassius auratus", "golden retriever", "n03100240")
    assert raw.names == tuple(f"{SORTED[label]}/{SORTED[label]}{end}" for label, end in train)


def test_classes_of_one_name_keep_their_numbers(tmp_path: Path) -> None:
    """Two classes that words.txt calls alike, or without words.txt all of them, are named by their wnid."""
    root = write(tmp_path / "set")
    (root / "words.txt").write_text("n01443537\tcrane\nn02099601\tcrane\nn03100240\tconvertible\n")
    assert read(root, tmp_path / "cache").class_names == (*SORTED[:2], "convertible")
    (root / "words.txt").unlink()
    assert read(root, tmp_path / "cache").class_names == tuple(SORTED)


def test_the_folders_name_is_enough() -> None:
    """A dataset_dir named as its authors pack it is this data set; other folders of ImageNet are not."""
    assert loading.name_of_folder("/data/tiny-imagenet-200") == "tiny_imagenet"
    assert loading.name_of_folder("/data/TinyImageNet") == "tiny_imagenet"
    assert loading.name_of_folder("/data/imagenet") == "folder"


def test_text_files_of_other_programs_are_read(tmp_path: Path) -> None:
    """A byte order mark, and texts beside the images, change nothing."""
    root = write(tmp_path / "set")
    wanted = read(root, tmp_path / "cache")
    for path in (root / "wnids.txt", root / "words.txt", root / "val/val_annotations.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (root / f"train/{SORTED[0]}/images/NOTES.TXT").write_text("hello")
    found = read(root, tmp_path / "other cache")
    assert found.names == wanted.names and found.class_names == wanted.class_names
    assert np.array_equal(found.train_images, wanted.train_images) and np.array_equal(found.test_labels, wanted.test_labels)


def annotate(change: Callable[[str], str]) -> Callable[[Path], object]:
    """Return what changes the text of the annotations."""
    return lambda root: (path := root / "val/val_annotations.txt").write_text(change(path.read_text()))


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no train": (lambda root: shutil.rmtree(root / "train"), ("dataset_dir", "tiny-imagenet-200.zip")),
    "an unknown class": (annotate(lambda text: text.replace("n02099601", "n00000001")), ("val", "n00000001", "not in")),
    "a missing image": (lambda root: (root / "val/images/val_10.JPEG").unlink(), ("line 2", "val_10.JPEG", "not in")),
    "an image listed twice": (annotate(lambda text: text + text.splitlines()[0]), ("line 5", "val_3.JPEG")),
    "an image without a line": (annotate(lambda text: text.partition("\n")[2]), ("1 images", "val_3.JPEG")),
    "no tabs": (annotate(lambda text: text.replace("\t", " ")), ("line 1", "tabs")),
    "no text": (lambda root: (root / "val/val_annotations.txt").write_bytes(b"\xff\xfe\x00"), ("val_annotations.txt", "read")),
    "no annotations": (lambda root: (root / "val/val_annotations.txt").unlink(), ("val_annotations.txt", "no such file")),
    "a class without training images": (
        lambda root: shutil.rmtree(root / f"train/{SORTED[1]}/images"),
        ("train", SORTED[1], "no images"),
    ),
    "a class on a disk that is not mounted": (
        lambda root: (root / "train/n00000001").symlink_to(root / "nowhere"),
        ("train", "n00000001", "broken link", "repair"),
    ),
    "an image outside of the classes": (lambda root: drawn(1).save(root / "train/a.JPEG"), ("train", "a.JPEG", "outside")),
    "an image beside the folder images": (
        lambda root: drawn(1).save(root / f"train/{SORTED[0]}/a.JPEG"),
        (SORTED[0], "a.JPEG", "only the folder images"),
    ),
    "a folder among the images": (
        lambda root: (root / f"train/{SORTED[0]}/images/more").mkdir(),
        (SORTED[0], "more", "a folder among the images"),
    ),
    "a class without validation images": (
        lambda root: shutil.copytree(root / f"train/{SORTED[0]}", root / "train/n09999999"),
        ("val", "n09999999", "no images"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    """A copy that is not whole is one line with the file, what is wrong and the remedy."""
    root = write(tmp_path / "set")
    do, parts = DAMAGES[damage]
    do(root)
    with pytest.raises(UserError) as caught:
        read(root, tmp_path / "cache")
    line = str(caught.value)
    assert "\n" not in line and ("unpack" in line or "repair" in line)
    for part in (str(root), *parts):
        assert part in line, line
