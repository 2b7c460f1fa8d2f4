"""Image folders: the images, classes and sizes that they give, errors in them, and the tables of decoded images."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from test_image_file import png16
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize

from data import digests
from data.datasets import folder
from data.io import image_file, table_file, tables, threads
from data.sets import Listing, RawData
from data.transforms import center_crop, resize
from utils import files
from utils.errors import UserError

PRE = (resize.Settings(24), center_crop.Settings(20))


def image(seed: int, width: int = 31, height: int = 27, channels: int = 3) -> Image.Image:
    """A smooth random image, which JPEG keeps distinct from others."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, channels), np.uint8)
    return Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def write_tree(root: Path, files: dict[str, Any]) -> Path:
    """Write images or bytes under relative paths."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content)
    return root


def small_tree(root: Path, test: str = "test") -> Path:
    """Two classes of images of different formats and sizes."""
    files = {
        f"{part}/{name}/{i}{suffix}": image(seed + i, 30 + i, 70 - i)
        for part, seed in (("train", 0), (test, 50))
        for name, offset in (("dog", 0), ("cat", 20))
        for i, suffix in ((offset + 2, ".jpg"), (offset + 10, ".png"), (offset, ".bmp"), (offset + 1, ".webp"))
    }
    return write_tree(root, files)


def read(root: Path, cache: Path, pre: Any = PRE, **settings: Any) -> RawData:
    """Load and decode as a run does."""
    return tables.to_raw(folder.load(folder.Settings(**settings), str(root), False), pre, cache, False)


def refusal(root: Path, cache: Path, pre: Any = PRE, **settings: Any) -> str:
    """Return the error of reading, one line."""
    with pytest.raises(UserError) as caught:
        read(root, cache, pre, **settings)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600
    return text


# -- Valid folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val"])
def test_images_equal_torchvisions_image_folder(tmp_path: Path, test: str) -> None:
    """Order, labels, class names and pixels are those of ImageFolder with Resize and CenterCrop, for every file format."""
    root = small_tree(tmp_path / "data", test)
    raw = read(root, tmp_path / "cache")
    for part, images, labels in (("train", raw.train_images, raw.train_labels), (test, raw.test_images, raw.test_labels)):
        theirs = ImageFolder(str(root / part), Compose([Resize(24), CenterCrop(20)]))
        assert list(raw.class_names) == theirs.classes == ["cat", "dog"]
        assert images.dtype == np.uint8 and images.shape == (8, 20, 20, 3) and labels.dtype == np.int64
        for pixels, label, (wanted, their_label) in zip(images, labels, theirs, strict=True):
            assert label == their_label and np.array_equal(pixels, np.asarray(wanted))
    assert raw.names == (
        "cat/20.bmp",
        "cat/21.webp",
        "cat/22.jpg",
        "cat/30.png",
        "dog/0.bmp",
        "dog/1.webp",
        "dog/10.png",
        "dog/2.jpg",
    )


def test_a_subset_of_the_classes_is_numbered_from_0(tmp_path: Path) -> None:
    """`classes` selects folders, which are numbered in the order of their names, not in that of the YAML."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/ant/a.png": image(9), "test/ant/b.png": image(8)})
    whole, some = read(root, tmp_path / "cache"), read(root, tmp_path / "cache", classes=("dog", "ant"))
    assert whole.class_names == ("ant", "cat", "dog") and some.class_names == ("ant", "dog")
    assert some.train_labels.tolist() == [0, 1, 1, 1, 1] and some.test_labels.tolist() == [0, 1, 1, 1, 1]
    assert np.array_equal(some.train_images, whole.train_images[whole.train_labels != 1])


def test_files_of_file_managers_are_ignored(tmp_path: Path) -> None:
    """Hidden files, thumbnails of the system and a readme next to the class folders do not count as images or classes."""
    root = small_tree(tmp_path / "data")
    before = read(root, tmp_path / "cache")
    write_tree(root, {"train/cat/.DS_Store": b"x", "train/cat/Thumbs.db": b"x", "train/readme.txt": b"x", "train/.git/x": b"x"})
    assert np.array_equal(read(root, tmp_path / "cache2").train_images, before.train_images)


def test_a_data_set_may_have_no_test_images(tmp_path: Path) -> None:
    """A folder with training images only can be read; its test part is empty."""
    root = write_tree(tmp_path / "data", {"train/a/1.png": image(1), "train/b/1.png": image(2)})
    raw = read(root, tmp_path / "cache")
    assert len(raw.train_images) == 2 and len(raw.test_images) == len(raw.test_labels) == 0


def test_a_class_may_have_no_test_images(tmp_path: Path, said: list[str]) -> None:
    """The test part may lack a class, which is logged; its labels are those of the training part."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    assert not any("classes" in line for line in said)
    write_tree(root, {"train/ant/a.png": image(9)})
    (root / "test" / "ant").mkdir()
    assert read(root, tmp_path / "cache").test_labels.tolist() == [1] * 4 + [2] * 4
    (line,) = (line for line in said if "classes" in line)
    assert str(root / "test") in line and "1 of 3" in line and "ant" in line
    shutil.rmtree(root / "test")
    read(root, tmp_path / "cache")  # without any test images there is no ACC
    assert sum("classes" in line for line in said) == 1


# -- Kinds of images ---------------------------------------------------------------------------------------------------


def test_grey_transparent_palette_and_16_bit_images_become_rgb(tmp_path: Path) -> None:
    """Grey becomes three equal channels, 16 bits become their upper 8, transparency is dropped, palettes are resolved."""
    grey, color = image(1, channels=1), image(2)
    alpha = Image.merge("RGBA", (*color.split(), grey))
    palette = color.quantize(16)
    levels = np.random.default_rng(0).integers(0, 65536, (27, 31))
    root = write_tree(
        tmp_path / "data",
        {
            "train/a/1 grey.png": grey, "train/a/2 alpha.png": alpha, "train/a/3 palette.png": palette,
            "train/a/4 deep.png": png16(levels), "train/a/5 grey alpha.png": Image.merge("LA", (grey, grey)),
            "train/a/6 bits.png": grey.convert("1"), "train/b/x.png": color,
        },
    )  # fmt: skip
    images = read(root, tmp_path / "cache", ()).train_images
    wanted = [
        np.asarray(grey)[..., None],
        color,
        palette.convert("RGB"),
        (levels // 256)[..., None],
        np.asarray(grey)[..., None],
    ]
    for pixels, expected in zip(images, wanted, strict=False):
        assert np.array_equal(pixels, np.broadcast_to(np.asarray(expected), (27, 31, 3)))
    assert set(np.unique(images[5])) <= {0, 255}


def broken_files() -> dict[str, bytes]:
    """Files that cannot be read as images, by name."""
    whole = image(3)
    out: dict[str, bytes] = {
        "empty.png": b"",
        "text.jpg": b"hello",
        "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    for name, kind in (("cut.jpg", "JPEG"), ("cut.png", "PNG"), ("cut.ppm", "PPM")):
        buffer = io.BytesIO()
        whole.save(buffer, kind)
        out[name] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    buffer = io.BytesIO()
    Image.fromarray(np.full((27, 31), 0.5, np.float32)).save(buffer, "TIFF")
    out["float.tif"] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(np.full((27, 31), 70_000, np.int32)).save(buffer, "TIFF")
    out["wide.tif"] = buffer.getvalue()
    return out


def test_all_unreadable_images_are_named(tmp_path: Path, said: list[str]) -> None:
    """Truncated files, empty files and files of other kinds are each named with a reason; the error names the setting that
    leaves them out."""
    root = small_tree(tmp_path / "data")
    broken = broken_files()
    write_tree(root, {f"train/cat/{name}": content for name, content in broken.items()})
    (root / "test/dog/link.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"9 of 25 images cannot be read .*skip_unreadable=true"):
        read(root, tmp_path / "cache")
    lines = [line for line in said if line.startswith("cannot be read: ")]
    assert sorted(line.split(": ")[1] for line in lines) == sorted([*(f"train/cat/{n}" for n in broken), "test/dog/link.png"])
    assert all(len(line.split(": ", 2)[2]) > 3 and "\n" not in line for line in lines)


def test_unreadable_images_are_left_out_on_request(tmp_path: Path) -> None:
    """`skip_unreadable: true` gives exactly the set without them, with the right labels and names, also from a cached table."""
    clean = read(small_tree(tmp_path / "data"), tmp_path / "cache")
    write_tree(tmp_path / "data", {f"train/cat/{name}": content for name, content in broken_files().items()})
    for _ in range(2):
        raw = read(tmp_path / "data", tmp_path / "cache", skip_unreadable=True)
        assert np.array_equal(raw.train_images, clean.train_images) and np.array_equal(raw.train_labels, clean.train_labels)
        assert raw.names == clean.names
        assert (raw.left_out, clean.left_out) == (len(broken_files()), 0)
    refusal(tmp_path / "data", tmp_path / "cache")  # without the setting, the cached table does not hide the error


def test_a_class_with_unreadable_images_only_is_refused(tmp_path: Path) -> None:
    """Leaving out images must not make a class empty."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/ant/1.png": b"not an image"})
    assert "class ant" in refusal(root, tmp_path / "cache", skip_unreadable=True)


def test_a_set_without_a_readable_training_image_has_another_remedy(tmp_path: Path) -> None:
    """The remedy is not to set what is set already."""
    root = write_tree(tmp_path / "data", {"train/a/1.png": b"", "train/b/1.png": b"", "test/a/1.png": image(1)})
    line = refusal(root, tmp_path / "cache", skip_unreadable=True)
    assert "none of the training images" in line and "skip_unreadable" not in line


@pytest.mark.parametrize("place", ["train/dog/zz.png", "test/cat/zz.png"])
def test_images_of_several_sizes_are_named(tmp_path: Path, place: str) -> None:
    """Without a common size the error names two images with their sizes, and transforms that give a common size."""
    root = tmp_path / "data"
    for part in ("train", "test"):
        write_tree(root, {f"{part}/{name}/1.png": image(1, 30, 40) for name in ("cat", "dog")})
    write_tree(root, {place: image(2, 33, 50)})
    text = refusal(root, tmp_path / "cache", ())
    assert place in text and "30 x 40" in text and "33 x 50" in text and "center_crop" in text
    assert "24 x 32" in refusal(root, tmp_path / "cache", (resize.Settings(24),))  # the shorter side alone is not enough


# -- Invalid folders ---------------------------------------------------------------------------------------------------


def test_each_error_in_a_tree_names_the_folder(tmp_path: Path) -> None:
    """A missing train folder, no classes, an empty class, a folder in a class and an unknown test class are one line each."""
    cache = tmp_path / "cache"
    (tmp_path / "a").mkdir()
    assert "no folder train" in refusal(tmp_path / "a", cache)
    (tmp_path / "a" / "train").mkdir()
    assert "contains no class folders" in refusal(tmp_path / "a", cache)
    (tmp_path / "a/train/cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a/train/cat/1.png")
    (tmp_path / "a/train/readme.txt").write_text("no image")
    read(tmp_path / "a", cache)
    Image.new("RGB", (4, 4)).save(tmp_path / "a/train/2.PNG")
    assert "2.PNG: an image outside of the class folders: move it" in refusal(tmp_path / "a", cache)
    root = small_tree(tmp_path / "b")
    (root / "train" / "empty").mkdir()
    assert str(root / "train" / "empty") in refusal(root, cache)
    root = small_tree(tmp_path / "c")
    write_tree(root, {"test/dgo/1.png": image(1)})
    text = refusal(root, cache)
    assert str(root / "test" / "dgo") in text and "did you mean dog?" in text
    root = small_tree(tmp_path / "d")
    write_tree(root, {"train/cat/more/1.png": image(1)})
    assert str(root / "train" / "cat" / "more") in refusal(root, cache)
    with pytest.raises(UserError, match="dataset_dir: missing"):
        folder.load(folder.Settings(), None, False)


def test_wrong_classes_are_named(tmp_path: Path) -> None:
    """A class without a folder is an error with the name of the most similar folder; so is a class that is named twice."""
    root = small_tree(tmp_path / "data")
    assert "did you mean cat?" in refusal(root, tmp_path / "cache", classes=("cta", "dog"))
    assert "twice" in refusal(root, tmp_path / "cache", classes=("dog", "dog"))


@pytest.mark.parametrize("name", ["lost+found", "@eaDir", "#recycle", "System Volume Information"])
def test_folders_of_file_systems_and_network_storage_are_ignored(tmp_path: Path, name: str) -> None:
    """Folders that a system creates, next to the class folders or inside of one, do not count as classes."""
    root = small_tree(tmp_path / "data")
    for place in ("train", "test", "train/cat"):
        (root / place / name).mkdir()
    assert read(root, tmp_path / "cache").class_names == ("cat", "dog")


def test_an_empty_class_folder_can_stay(tmp_path: Path) -> None:
    """An empty folder in train/ that cannot be removed can be excluded by `classes`; in test/ its class has no test images."""
    root = small_tree(tmp_path / "data")
    (root / "train" / "empty").mkdir()
    (root / "test" / "empty").mkdir()
    assert "dataset.folder.classes" in refusal(root, tmp_path / "cache")
    assert read(root, tmp_path / "cache", classes=("cat", "dog")).class_names == ("cat", "dog")
    write_tree(root, {"train/empty/1.png": image(1)})
    raw = read(root, tmp_path / "cache")
    assert raw.class_names == ("cat", "dog", "empty") and set(raw.test_labels.tolist()) == {0, 1}


def test_a_class_that_is_a_broken_link_is_named(tmp_path: Path) -> None:
    """A class on a disk that is not mounted is not left out silently; once the link is removed, the other classes are read."""
    root = small_tree(tmp_path / "data")
    (root / "train" / "ant").symlink_to(tmp_path / "unmounted")
    assert str(root / "train" / "ant") in refusal(root, tmp_path / "cache")
    (root / "train" / "ant").unlink()
    assert read(root, tmp_path / "cache").class_names == ("cat", "dog")


COMPOSED, DECOMPOSED = "b\u00e9e", "be\u0301e"  # the same letters in the forms that Linux and macOS use


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_test_folder_that_cannot_be_read_is_named(tmp_path: Path, part: str, kind: str) -> None:
    """A broken link, perhaps to a disk that is not mounted, or a file in its place does not count as a data set without test
    images, nor is val used instead."""
    root = write_tree(tmp_path / "data", {"train/cat/a.png": image(1), "train/dog/b.png": image(2)})
    if part == "test":
        write_tree(root, {"val/cat/c.png": image(3)})
    if kind == "link":
        (root / part).symlink_to(tmp_path / "not-mounted")
    else:
        (root / part).write_text("")
    line = refusal(root, tmp_path / "cache")
    assert line.startswith(f"{root / part}: a file or a broken link")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".gif", ".jp2"])
def test_images_outside_of_the_class_folders_are_named(tmp_path: Path, suffix: str) -> None:
    """They belong to no class, whatever their format; other files there are ignored."""
    root = write_tree(tmp_path / "data", {"train/cat/a.png": image(1), "train/dog/b.png": image(2), "train/labels.txt": b"x"})
    read(root, tmp_path / "cache")
    write_tree(root, {f"train/stray{suffix}": b""})
    assert "an image outside of the class folders" in refusal(root, tmp_path / "cache")


def test_names_match_in_either_unicode_form(tmp_path: Path) -> None:
    """The name of a test folder or in `classes` may be composed if that of the training folder is decomposed, or vice versa."""
    for train, test in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        root = write_tree(tmp_path / ascii(train), {f"train/{train}/1.png": image(1), "train/z/1.png": image(2)})
        write_tree(root, {f"test/{test}/1.png": image(3)})
        raw = read(root, tmp_path / "cache", classes=(test,))
        assert raw.class_names == (train,) and raw.names == (f"{train}/1.png",) and raw.test_labels.tolist() == [0]
        write_tree(root, {f"test/{train}/2.png": image(4)})  # now both forms exist: the one that train has too is right
        line = refusal(root, tmp_path / "cache")
        assert "rename" in line and f"{root / 'test' / test}: no such class" in line
        (root / "test" / test / "1.png").unlink()
        (root / "test" / test).rmdir()
        assert len(read(root, tmp_path / "cache").test_images) == 1


def test_a_set_is_the_same_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to the folder of a data set, as on clusters, is not another set: nothing is decoded again."""
    root = small_tree(tmp_path / "data")
    first = read(root, tmp_path / "cache")
    (tmp_path / "link").symlink_to(root)
    opened = count_decoded(monkeypatch)
    assert np.array_equal(read(tmp_path / "link", tmp_path / "cache").train_images, first.train_images) and not opened
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 2


def test_two_classes_that_differ_in_unicode_form_only_are_distinguished(tmp_path: Path) -> None:
    """If both forms are classes, each name means the class with exactly this form."""
    root = write_tree(
        tmp_path / "data", {f"{p}/{n}/1.png": image(1) for p in ("train", "test") for n in (COMPOSED, DECOMPOSED)}
    )
    assert set(read(root, tmp_path / "cache").class_names) == {COMPOSED, DECOMPOSED}
    assert read(root, tmp_path / "cache", classes=(DECOMPOSED,)).class_names == (DECOMPOSED,)


def test_odd_names_cannot_forge_a_line(tmp_path: Path, said: list[str]) -> None:
    """A file name with a line break or terminal codes is quoted in log lines and errors."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/cat/x\n\x1b[2Jall is well.png": b""})
    with pytest.raises(UserError) as caught:
        read(root, tmp_path / "cache")
    assert str(caught.value).isprintable() and all(line.isprintable() for line in said)


# -- The cached table --------------------------------------------------------------------------------------------------


def test_a_second_run_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """The table of decoded images is used again, which the log states; no image is decoded."""
    root = small_tree(tmp_path / "data")
    first = read(root, tmp_path / "cache")
    said.clear()
    monkeypatch.setattr(image_file, "read_image", None)
    again = read(root, tmp_path / "cache")
    assert np.array_equal(again.train_images, first.train_images) and np.array_equal(again.test_images, first.test_images)
    assert len(said) == 2 and all("decoded earlier" in line for line in said)


@pytest.mark.parametrize("change", ["replaced", "added", "removed", "pre", "size"])
def test_changed_data_are_decoded_again(tmp_path: Path, change: str) -> None:
    """A replaced, added or removed image, and another pre-transform, never give the old table."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    pre: Any = PRE
    if change == "replaced":
        image(77, 50, 50).save(root / "train/cat/20.bmp")
    elif change == "added":
        image(77, 50, 50).save(root / "train/cat/7.bmp")
    elif change == "removed":
        (root / "train/cat/20.bmp").unlink()
    else:
        pre = (resize.Settings(24), center_crop.Settings(18)) if change == "size" else (resize.Settings((20, 20)),)
    assert_fresh(read(root, tmp_path / "cache", pre), read(root, tmp_path / "fresh", pre))


def assert_fresh(raw: RawData, fresh: RawData) -> None:
    """Compare with the data set decoded into an empty cache."""
    assert np.array_equal(raw.train_images, fresh.train_images) and np.array_equal(raw.train_labels, fresh.train_labels)
    assert raw.names == fresh.names


@pytest.mark.parametrize("damage", ["byte", "cut", "longer", "emptied", "json", "json gone", "half json", "json label"])
def test_a_damaged_table_is_detected_and_made_again(tmp_path: Path, damage: str, said: list[str]) -> None:
    """Whichever of the two files is damaged, the images are right, and the log states that the table was damaged."""
    root = small_tree(tmp_path / "data")
    good = read(root, tmp_path / "cache")
    said.clear()
    wanted = np.array(good.train_images)
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    content, side = bytearray(path.read_bytes()), path.with_suffix(".json")
    if damage == "byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage in ("cut", "longer", "emptied"):
        path.write_bytes({"cut": content[:-1], "longer": content + b"x", "emptied": b""}[damage])
    elif damage == "json gone":
        side.unlink()
    elif damage == "half json":
        side.write_text(side.read_text()[:50])
    else:
        side.write_text(
            side.read_text().replace('"unreadable": []', '"unreadable": [[0, "x"]]') if damage == "json label" else "{}"
        )
    assert np.array_equal(read(root, tmp_path / "cache").train_images, wanted)
    assert damage == "json gone" or any("damaged" in line for line in said)
    assert any("made" in line for line in said)


def test_a_damaged_list_of_unreadable_images_shifts_no_label(tmp_path: Path) -> None:
    """If the list of unreadable images in the table's description is altered, images still have their own labels and names."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/cat/99.png": b"not an image"})
    good = read(root, tmp_path / "cache", skip_unreadable=True)
    (path,) = (tmp_path / "cache").glob("folder-train-*.json")
    assert '"unreadable": [[4, ' in path.read_text()
    path.write_text(path.read_text().replace('"unreadable": [[4, ', '"unreadable": [[3, '))
    assert read(root, tmp_path / "cache", skip_unreadable=True).names == good.names


def test_damage_in_a_block_that_is_read_is_detected(tmp_path: Path) -> None:
    """Damage that changes neither size nor time is detected by the blocks' checksums, always in the first and last block."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1024, 1024, 3), np.uint8)[:, ::1]
    listed = RawData(images, np.zeros(40, np.int64), images[:1], np.zeros(1, np.int64), ("a",))
    tables.to_raw(listed, (), tmp_path, True)
    (path,) = tmp_path.glob("array-train-*.u8")
    described = table_file.read_description(path)
    assert described is not None and table_file.rows_per_block((1024, 1024, 3)) == 1 and table_file.SAMPLE < 40
    status = path.stat()
    for place in (5, path.stat().st_size - 5):
        flip(path, place, status.st_mtime_ns)
        assert all(table_file.open_table(path, described) is None for _ in range(8))
        flip(path, place, status.st_mtime_ns)
        assert table_file.open_table(path, described) is not None
    flip(path, path.stat().st_size // 2, None)  # another modification time: every block is read
    assert table_file.open_table(path, described) is None


def flip(path: Path, place: int, mtime: int | None) -> None:
    """Change one byte of a file, and restore its modification time `mtime` unless it is None."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    if mtime is not None:
        os.utime(path, ns=(mtime, mtime))


def test_a_copied_table_is_verified_completely_and_then_trusted(tmp_path: Path, said: list[str]) -> None:
    """A table with another modification time, e.g. a copy, is used after every block has been verified."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    os.utime(path, ns=(1, 1))
    said.clear()
    read(root, tmp_path / "cache")
    assert all("decoded earlier" in line for line in said)
    described = table_file.read_description(path)
    assert described is not None and described["mtime_ns"] == 1


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    """An incomplete table of a process that has ended is removed from the disk; one that is being written is not."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    path.unlink()
    dead = path.with_name(f".folder-train-other.u8.{files.boot()}-0123456789ab.part")  # of images that have changed since
    dead.write_bytes(b"x")
    with files.temporary(path) as (alive, _):
        read(root, tmp_path / "cache")
        assert alive.exists() and path.exists()
        assert files.boot() == files.UNKNOWN or not dead.exists()


def test_writing_to_a_mapped_table_never_changes_the_file(tmp_path: Path) -> None:
    """Poisoning changes this run's copy of the images only: not the file, other maps or the raw images."""
    root = small_tree(tmp_path / "data")
    raw = read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    before, content = np.array(raw.train_images), path.read_bytes()
    for placement in ("device", "host", "disk"):
        own = table_file.own_copy(raw.train_images, placement)
        assert np.array_equal(own, before)
        own[:] = 7
        assert np.array_equal(raw.train_images, before) and path.read_bytes() == content


def test_decoding_is_the_same_with_one_or_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order and pixels depend neither on the number of threads nor on the number of images that are decoded ahead."""
    root = small_tree(tmp_path / "data")
    found = []
    for cores, window in ((1, 256), (5, 3)):
        monkeypatch.setattr(threads, "cores", lambda n=cores: n)
        monkeypatch.setattr(threads, "WINDOW", window)
        found.append(read(root, tmp_path / f"cache{cores}").train_images)
    assert np.array_equal(*found)


def test_limits_apply_before_images_are_decoded(tmp_path: Path) -> None:
    """data.train_limit selects images spread evenly over the list, so that every class has its share; no other is opened."""
    root = small_tree(tmp_path / "data")
    listing = folder.load(folder.Settings(), str(root), False)
    assert isinstance(listing, Listing)
    count, step = len(listing.train_files), 2  # two classes of four images
    for i, file in enumerate(listing.train_files):
        if i % step:
            (root / file).write_bytes(b"not an image")
    cut = listing.cut(-(-count // step), 2)
    assert cut.train_files == listing.train_files[::step] and len(cut.test_files) == 2
    raw = tables.to_raw(cut, PRE, tmp_path / "cache", False)
    assert raw.train_labels.tolist() == listing.train_labels[::step].tolist() and len(raw.test_images) == 2
    assert set(raw.train_labels.tolist()) == set(listing.train_labels.tolist())
    for limit in (None, count, 9 * count):
        assert listing.cut(limit, limit).train_files == listing.train_files


# -- When a table is used again ----------------------------------------------------------------------------------------


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the path of each image file is appended that is decoded from now on."""
    opened: list[str] = []
    decode = image_file.read_image

    def counted(path: Path, *rest: Any) -> Image.Image:
        opened.append(str(path))
        return decode(path, *rest)

    monkeypatch.setattr(image_file, "read_image", counted)
    return opened


def bitmaps(root: Path, seed: int) -> Path:
    """Write uncompressed images, whose names, sizes and modification times do not depend on the seed."""
    rng = np.random.default_rng(seed)
    write_tree(
        root,
        {
            f"{part}/{name}/{i}.bmp": Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
            for part in ("train", "test")
            for name in ("ant", "bee")
            for i in range(6)
        },
    )
    for path in root.rglob("*.bmp"):
        os.utime(path, (0, 0))
    return root


def test_sets_of_equal_names_sizes_and_times_have_their_own_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets that differ in their pixels only never share a table, and neither replaces the other's."""
    one, other = bitmaps(tmp_path / "one", 1), bitmaps(tmp_path / "other", 2)
    for root in (one, other):
        assert_fresh(read(root, tmp_path / "cache", ()), read(root, tmp_path / f"fresh {root.name}", ()))
    opened = count_decoded(monkeypatch)
    read(one, tmp_path / "cache", ())
    read(other, tmp_path / "cache", ())
    assert not opened


def test_a_set_that_replaces_another_has_its_own_pixels(tmp_path: Path) -> None:
    """The same holds if the second set has the path of the first one."""
    root = bitmaps(tmp_path / "set", 1)
    read(root, tmp_path / "cache", ())
    root.rename(tmp_path / "before")
    bitmaps(root, 2)
    assert_fresh(read(root, tmp_path / "cache", ()), read(root, tmp_path / "fresh", ()))


def test_marks_alone_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without reliable times and inodes, a sample of the files is compared by content at every start."""
    monkeypatch.setattr(tables, "mark_of", lambda path: f"{path.stat().st_size} 0 0 0")
    root = bitmaps(tmp_path / "set", 1)
    read(root, tmp_path / "cache", ())
    bitmaps(root, 2)
    assert_fresh(read(root, tmp_path / "cache", ()), read(root, tmp_path / "fresh", ()))


@pytest.mark.parametrize("how", ["moved", "copied", "touched"])
def test_equal_images_elsewhere_are_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: list[str]
) -> None:
    """A set that was moved, copied or touched uses the existing table."""
    root = small_tree(tmp_path / "set")
    wanted = np.array(read(root, tmp_path / "cache").train_images)
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    opened = count_decoded(monkeypatch)
    said.clear()
    if how == "touched":
        for path in root.rglob("*.*"):
            os.utime(path, (5, 5))
    else:
        (shutil.move if how == "moved" else shutil.copytree)(root, tmp_path / how)
        root = tmp_path / how
    assert np.array_equal(read(root, tmp_path / "cache").train_images, wanted)
    assert not opened and all("decoded earlier" in line for line in said)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == kept


def test_changes_replace_the_table_and_only_changed_images_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After images were added, removed and altered there is still one table per part, and only new contents were decoded."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    opened = count_decoded(monkeypatch)
    image(77, 50, 50).save(root / "train/cat/7.bmp")
    read(root, tmp_path / "cache")
    (root / "train/dog/0.bmp").unlink()
    read(root, tmp_path / "cache")
    image(78, 50, 50).save(root / "train/cat/20.bmp")
    raw = read(root, tmp_path / "cache")
    assert [Path(path).name for path in opened] == ["7.bmp", "20.bmp"]
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 2
    assert_fresh(raw, read(root, tmp_path / "fresh"))


def test_runs_on_parts_of_a_set_keep_their_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on other classes, limits or sizes of one set do not replace each other's tables."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/ant/a.png": image(9), "test/ant/b.png": image(8)})
    listing = folder.load(folder.Settings(), str(root), False)

    def all_runs() -> None:
        read(root, tmp_path / "cache")
        read(root, tmp_path / "cache", classes=("cat", "ant"))
        read(root, tmp_path / "cache", (resize.Settings((20, 20)),))
        tables.to_raw(listing.cut(5, 2), PRE, tmp_path / "cache", False)

    all_runs()
    opened = count_decoded(monkeypatch)
    all_runs()
    assert not opened


def test_a_damaged_row_of_the_earlier_table_is_decoded(tmp_path: Path) -> None:
    """Rows are copied from an earlier table only if they are undamaged."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    opened = table_file.open_table(path, table_file.read_description(path) or {})
    assert opened is not None and opened.pixels(3) is not None
    flip(path, 3 * 20 * 20 * 3 + 5, path.stat().st_mtime_ns)
    assert opened.pixels(3) is None and opened.pixels(2) is not None


def failing_reads(patch: pytest.MonkeyPatch, name: str) -> None:
    """Make files of that name fail to be read, as on an unavailable network disk or without permission."""
    decode = image_file.read_image

    def fail(path: Path, *rest: Any) -> Image.Image:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return decode(path, *rest)

    patch.setattr(image_file, "read_image", fail)


@pytest.mark.parametrize("skip", [False, True])
def test_a_failure_to_read_is_not_permanent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool) -> None:
    """An image that could not be read is tried again at the next start, even if its file has not changed; the others are not
    decoded again."""
    root = small_tree(tmp_path / "data")
    with monkeypatch.context() as patch:
        failing_reads(patch, "21.webp")
        for _ in range(2):
            if skip:
                assert len(read(root, tmp_path / "cache", skip_unreadable=True).train_images) == 7
            else:
                assert "cat/21.webp" in refusal(root, tmp_path / "cache")
    opened = count_decoded(monkeypatch)
    raw = read(root, tmp_path / "cache", skip_unreadable=skip)
    assert {Path(path).name for path in opened} == {"21.webp"}
    assert_fresh(raw, read(root, tmp_path / "fresh"))


def test_only_unreadable_images_are_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """At the next start only an image that is still broken is opened, and the table is not made again."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/cat/99.png": b"not an image"})
    read(root, tmp_path / "cache", skip_unreadable=True)
    opened = count_decoded(monkeypatch)
    said.clear()
    read(root, tmp_path / "cache", skip_unreadable=True)
    assert {Path(path).name for path in opened} == {"99.png"} and not any("made" in line for line in said)


def test_a_read_only_folder_of_tables_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """An intact table in a folder without write permission is used, even if it is a copy and the images are elsewhere; new
    marks, which would only save time, are not recorded."""
    wanted = np.array(read(small_tree(tmp_path / "set"), tmp_path / "cache").train_images)
    shutil.copytree(tmp_path / "cache", tmp_path / "shared", copy_function=shutil.copyfile)
    shutil.copytree(tmp_path / "set", tmp_path / "mine")

    def refuse(path: Path, _: object) -> None:
        raise UserError(f"{path}: cannot be written")

    monkeypatch.setattr(table_file, "write_text", refuse)
    monkeypatch.setattr(tables, "write_atomically", refuse)
    said.clear()
    for _ in range(2):
        raw = read(tmp_path / "mine", tmp_path / "shared")
        assert np.array_equal(raw.train_images, wanted)
    assert len(said) == 4 and all("decoded earlier" in line for line in said)


def test_an_open_table_survives_its_replacement(tmp_path: Path) -> None:
    """A run that has opened a table keeps its pixels, in every placement, when a run on altered images replaces the file."""
    root = small_tree(tmp_path / "data")
    raw = read(root, tmp_path / "cache")
    before = np.array(raw.train_images)
    image(78, 50, 50).save(root / "train/cat/20.bmp")
    (root / "train/dog/0.bmp").unlink()
    assert len(read(root, tmp_path / "cache").train_images) == 7
    for placement in ("device", "host", "disk"):
        assert np.array_equal(table_file.own_copy(raw.train_images, placement), before)
    assert np.array_equal(table_file.read_table(raw.train_images), before)


def test_the_digests_of_a_table_are_those_of_its_images(tmp_path: Path) -> None:
    """The digests in a table are those of the pixels, also after limits are applied."""
    raw = read(small_tree(tmp_path / "data"), tmp_path / "cache")
    assert raw.train_digests == digests.pixel_digests(raw.train_images)
    assert raw.test_digests == digests.pixel_digests(raw.test_images)
    assert raw.test_names is not None and raw.test_names[0] == "cat/20.bmp"
    cut = raw.cut(3, 2)
    assert cut.train_digests == digests.pixel_digests(cut.train_images) and len(cut.test_names or ()) == 2


def test_the_remedies_in_errors_work(tmp_path: Path) -> None:
    """The transforms that the error about sizes names give one size; the setting that the error about unreadable images names
    leaves them out, and once repaired they are read again."""
    root = small_tree(tmp_path / "data")
    text = refusal(root, tmp_path / "cache", ())
    pre = yaml.safe_load(text.partition("transform.pre, e.g. ")[2])
    steps = tuple({"resize": resize, "center_crop": center_crop}[name].Settings(**keys) for name, keys in pre.items())
    assert read(root, tmp_path / "cache", steps).train_images.shape == (8, 224, 224, 3)
    good = (root / "train/cat/30.png").read_bytes()
    (root / "train/cat/30.png").write_bytes(good[:50])
    text = refusal(root, tmp_path / "cache")
    assert (
        len(read(root, tmp_path / "cache", **{text.partition("dataset.folder.")[2].partition("=")[0]: True}).names or ()) == 7
    )
    (root / "train/cat/30.png").write_bytes(good)
    assert len(read(root, tmp_path / "cache").names or ()) == 8
