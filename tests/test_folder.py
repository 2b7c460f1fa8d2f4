"""Picture folders: which pictures, classes and sizes they give, and what is said of those that are wrong."""

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
from test_picture import png16
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize

from data import digests, tables
from data import picture as picture_files
from data.datasets import folder
from data.sets import Listing, RawData
from data.transforms import center_crop, resize
from utils import files
from utils.errors import UserError

PRE = (resize.Settings(24), center_crop.Settings(20))


def picture(seed: int, width: int = 31, height: int = 27, channels: int = 3) -> Image.Image:
    """A smooth random picture, so that JPEG keeps it apart from others."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, channels), np.uint8)
    return Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def write_tree(root: Path, files: dict[str, Any]) -> Path:
    """Write pictures or bytes under relative paths."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content)
    return root


def small_tree(root: Path, test: str = "test") -> Path:
    """Two classes of pictures of different formats and sizes."""
    files = {
        f"{part}/{name}/{i}{suffix}": picture(seed + i, 30 + i, 70 - i)
        for part, seed in (("train", 0), (test, 50))
        for name, offset in (("dog", 0), ("cat", 20))
        for i, suffix in ((offset + 2, ".jpg"), (offset + 10, ".png"), (offset, ".bmp"), (offset + 1, ".webp"))
    }
    return write_tree(root, files)


def read(root: Path, cache: Path, pre: Any = PRE, **settings: Any) -> RawData:
    """Load and decode as a run does."""
    return tables.to_raw(folder.load(folder.Settings(**settings), str(root), False), pre, cache, False)


def refusal(root: Path, cache: Path, pre: Any = PRE, **settings: Any) -> str:
    """The one-line error."""
    with pytest.raises(UserError) as caught:
        read(root, cache, pre, **settings)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600
    return text


# -- good folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val"])
def test_pictures_equal_torchvisions_image_folder(tmp_path: Path, test: str) -> None:
    """Order, labels, class names and every pixel are those of ImageFolder with Resize and CenterCrop, whatever the format."""
    root = small_tree(tmp_path / "data", test)
    raw = read(root, tmp_path / "cache")
    for part, images, labels in (("train", raw.train_images, raw.train_labels), (test, raw.test_images, raw.test_labels)):
        theirs = ImageFolder(str(root / part), Compose([Resize(24), CenterCrop(20)]))
        assert list(raw.class_names) == theirs.classes == ["cat", "dog"]
        assert images.dtype == np.uint8 and images.shape == (8, 20, 20, 3) and labels.dtype == np.int64
        for image, label, (wanted, their_label) in zip(images, labels, theirs, strict=True):
            assert label == their_label and np.array_equal(image, np.asarray(wanted))
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


def test_a_subset_of_the_classes_is_numbered_by_itself(tmp_path: Path) -> None:
    """`classes` takes the named folders only, numbered by sorted name whatever the order in the YAML."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/ant/a.png": picture(9), "test/ant/b.png": picture(8)})
    whole, some = read(root, tmp_path / "cache"), read(root, tmp_path / "cache", classes=("dog", "ant"))
    assert whole.class_names == ("ant", "cat", "dog") and some.class_names == ("ant", "dog")
    assert some.train_labels.tolist() == [0, 1, 1, 1, 1] and some.test_labels.tolist() == [0, 1, 1, 1, 1]
    assert np.array_equal(some.train_images, whole.train_images[whole.train_labels != 1])


def test_what_file_managers_leave_is_no_picture(tmp_path: Path) -> None:
    """Hidden files, thumbnails of the system and a read-me beside the classes do not disturb."""
    root = small_tree(tmp_path / "data")
    before = read(root, tmp_path / "cache")
    write_tree(root, {"train/cat/.DS_Store": b"x", "train/cat/Thumbs.db": b"x", "train/readme.txt": b"x", "train/.git/x": b"x"})
    assert np.array_equal(read(root, tmp_path / "cache2").train_images, before.train_images)


def test_a_data_set_without_test_pictures_has_none(tmp_path: Path) -> None:
    """A folder of training pictures alone is read; its test part is empty."""
    root = write_tree(tmp_path / "data", {"train/a/1.png": picture(1), "train/b/1.png": picture(2)})
    raw = read(root, tmp_path / "cache")
    assert len(raw.train_images) == 2 and len(raw.test_images) == len(raw.test_labels) == 0


def test_a_class_without_test_pictures_is_allowed(tmp_path: Path) -> None:
    """The test part may lack a class; labels stay those of training."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/ant/a.png": picture(9)})
    assert read(root, tmp_path / "cache").test_labels.tolist() == [1] * 4 + [2] * 4


# -- kinds of pictures -------------------------------------------------------------------------------------------------


def test_grey_transparent_palette_and_16_bit_pictures_become_rgb(tmp_path: Path) -> None:
    """Grey gives three equal channels, 16 bits their upper 8, transparency is dropped, a palette is looked up."""
    grey, colour = picture(1, channels=1), picture(2)
    alpha = Image.merge("RGBA", (*colour.split(), grey))
    palette = colour.quantize(16)
    levels = np.random.default_rng(0).integers(0, 65536, (27, 31))
    root = write_tree(
        tmp_path / "data",
        {
            "train/a/1 grey.png": grey, "train/a/2 alpha.png": alpha, "train/a/3 palette.png": palette,
            "train/a/4 deep.png": png16(levels), "train/a/5 grey alpha.png": Image.merge("LA", (grey, grey)),
            "train/a/6 bits.png": grey.convert("1"), "train/b/x.png": colour,
        },
    )  # fmt: skip
    images = read(root, tmp_path / "cache", ()).train_images
    wanted = [
        np.asarray(grey)[..., None],
        colour,
        palette.convert("RGB"),
        (levels // 256)[..., None],
        np.asarray(grey)[..., None],
    ]
    for image, expected in zip(images, wanted, strict=False):
        assert np.array_equal(image, np.broadcast_to(np.asarray(expected), (27, 31, 3)))
    assert set(np.unique(images[5])) <= {0, 255}


def broken_files() -> dict[str, bytes]:
    """Files that are no pictures, by name."""
    whole = picture(3)
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


def test_pictures_that_cannot_be_read_are_all_named(tmp_path: Path, said: list[str]) -> None:
    """Truncated, empty and foreign files are each named with a reason, and the error says how to leave them out."""
    root = small_tree(tmp_path / "data")
    broken = broken_files()
    write_tree(root, {f"train/cat/{name}": content for name, content in broken.items()})
    (root / "test/dog/link.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"9 of 25 pictures cannot be read .*skip_unreadable=true"):
        read(root, tmp_path / "cache")
    told = [line for line in said if line.startswith("cannot be read: ")]
    assert sorted(line.split(": ")[1] for line in told) == sorted([*(f"train/cat/{n}" for n in broken), "test/dog/link.png"])
    assert all(len(line.split(": ", 2)[2]) > 3 and "\n" not in line for line in told)


def test_unreadable_pictures_are_left_out_on_request(tmp_path: Path) -> None:
    """`skip_unreadable: true` gives exactly the set without them, labels and names in step, also from the kept table."""
    clean = read(small_tree(tmp_path / "data"), tmp_path / "cache")
    write_tree(tmp_path / "data", {f"train/cat/{name}": content for name, content in broken_files().items()})
    for _ in range(2):
        raw = read(tmp_path / "data", tmp_path / "cache", skip_unreadable=True)
        assert np.array_equal(raw.train_images, clean.train_images) and np.array_equal(raw.train_labels, clean.train_labels)
        assert raw.names == clean.names
    refusal(tmp_path / "data", tmp_path / "cache")  # the kept table does not make them good


def test_a_class_of_unreadable_pictures_is_refused(tmp_path: Path) -> None:
    """Leaving pictures out may not leave a class empty."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/ant/1.png": b"no picture"})
    assert "class ant" in refusal(root, tmp_path / "cache", skip_unreadable=True)


@pytest.mark.parametrize("place", ["train/dog/zz.png", "test/cat/zz.png"])
def test_pictures_of_several_sizes_are_named(tmp_path: Path, place: str) -> None:
    """Without a common size the error names two pictures with their sizes and the transforms that would mend it."""
    root = tmp_path / "data"
    for part in ("train", "test"):
        write_tree(root, {f"{part}/{name}/1.png": picture(1, 30, 40) for name in ("cat", "dog")})
    write_tree(root, {place: picture(2, 33, 50)})
    text = refusal(root, tmp_path / "cache", ())
    assert place in text and "30 x 40" in text and "33 x 50" in text and "center_crop" in text
    assert "24 x 32" in refusal(root, tmp_path / "cache", (resize.Settings(24),))  # the shorter side alone is not enough


# -- folders that are wrong --------------------------------------------------------------------------------------------


def test_wrong_trees_are_named_with_the_remedy(tmp_path: Path) -> None:
    """A missing train folder, no classes, empty classes, folders in classes, foreign test classes: one line each."""
    cache = tmp_path / "cache"
    (tmp_path / "a").mkdir()
    assert "no folder train" in refusal(tmp_path / "a", cache)
    (tmp_path / "a" / "train").mkdir()
    assert "holds no class folder" in refusal(tmp_path / "a", cache)
    root = small_tree(tmp_path / "b")
    (root / "train" / "empty").mkdir()
    assert str(root / "train" / "empty") in refusal(root, cache)
    root = small_tree(tmp_path / "c")
    write_tree(root, {"test/dgo/1.png": picture(1)})
    text = refusal(root, cache)
    assert str(root / "test" / "dgo") in text and "did you mean dog?" in text
    root = small_tree(tmp_path / "d")
    write_tree(root, {"train/cat/more/1.png": picture(1)})
    assert str(root / "train" / "cat" / "more") in refusal(root, cache)
    with pytest.raises(UserError, match="dataset_dir: missing"):
        folder.load(folder.Settings(), None, False)


def test_wrong_classes_are_named(tmp_path: Path) -> None:
    """A class that is no folder, or is named twice, is an error with the nearest folder's name."""
    root = small_tree(tmp_path / "data")
    assert "did you mean cat?" in refusal(root, tmp_path / "cache", classes=("cta", "dog"))
    assert "twice" in refusal(root, tmp_path / "cache", classes=("dog", "dog"))


@pytest.mark.parametrize("name", ["lost+found", "@eaDir", "#recycle", "System Volume Information"])
def test_what_file_systems_and_network_storage_leave_is_no_class(tmp_path: Path, name: str) -> None:
    """Folders that nobody made or can remove, beside the classes and inside of one, do not disturb."""
    root = small_tree(tmp_path / "data")
    for place in ("train", "test", "train/cat"):
        (root / place / name).mkdir()
    assert read(root, tmp_path / "cache").class_names == ("cat", "dog")


def test_an_empty_class_folder_can_stay(tmp_path: Path) -> None:
    """The remedy for an empty folder of train/ that cannot be removed works; in test/ it is a class without test pictures."""
    root = small_tree(tmp_path / "data")
    (root / "train" / "empty").mkdir()
    (root / "test" / "empty").mkdir()
    assert "dataset.folder.classes" in refusal(root, tmp_path / "cache")
    assert read(root, tmp_path / "cache", classes=("cat", "dog")).class_names == ("cat", "dog")
    write_tree(root, {"train/empty/1.png": picture(1)})
    raw = read(root, tmp_path / "cache")
    assert raw.class_names == ("cat", "dog", "empty") and set(raw.test_labels.tolist()) == {0, 1}


def test_a_class_that_is_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    """A class on a disk that is not there is not left out silently; after the remedy the rest is read."""
    root = small_tree(tmp_path / "data")
    (root / "train" / "ant").symlink_to(tmp_path / "unmounted")
    assert str(root / "train" / "ant") in refusal(root, tmp_path / "cache")
    (root / "train" / "ant").unlink()
    assert read(root, tmp_path / "cache").class_names == ("cat", "dog")


COMPOSED, DECOMPOSED = "b\u00e9e", "be\u0301e"  # the same letters, as Linux and as a Mac writes them


def test_names_match_in_either_unicode_form(tmp_path: Path) -> None:
    """A test folder, and a name in `classes`, may be composed where the training folder is decomposed, or the reverse."""
    for train, test in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        root = write_tree(tmp_path / ascii(train), {f"train/{train}/1.png": picture(1), "train/z/1.png": picture(2)})
        write_tree(root, {f"test/{test}/1.png": picture(3)})
        raw = read(root, tmp_path / "cache", classes=(test,))
        assert raw.class_names == (train,) and raw.names == (f"{train}/1.png",) and raw.test_labels.tolist() == [0]
    write_tree(root, {f"test/{train}/2.png": picture(4)})  # now both forms are there: which is the class?
    assert "rename" in refusal(root, tmp_path / "cache")
    (root / "test" / test / "1.png").unlink()
    (root / "test" / test).rmdir()
    assert len(read(root, tmp_path / "cache").test_images) == 1


def test_two_classes_that_look_alike_are_told_apart_by_their_very_names(tmp_path: Path) -> None:
    """Where both forms are classes, each name means the one that is written so."""
    root = write_tree(
        tmp_path / "data", {f"{p}/{n}/1.png": picture(1) for p in ("train", "test") for n in (COMPOSED, DECOMPOSED)}
    )
    assert set(read(root, tmp_path / "cache").class_names) == {COMPOSED, DECOMPOSED}
    assert read(root, tmp_path / "cache", classes=(DECOMPOSED,)).class_names == (DECOMPOSED,)


def test_odd_names_cannot_forge_a_line(tmp_path: Path, said: list[str]) -> None:
    """A file name with a line break or terminal codes is shown quoted."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/cat/x\n\x1b[2Jall is well.png": b""})
    with pytest.raises(UserError) as caught:
        read(root, tmp_path / "cache")
    assert str(caught.value).isprintable() and all(line.isprintable() for line in said)


# -- the kept table ----------------------------------------------------------------------------------------------------


def test_a_second_run_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """The decoded table is used again, and the line says so; pictures are not opened."""
    root = small_tree(tmp_path / "data")
    first = read(root, tmp_path / "cache")
    said.clear()
    monkeypatch.setattr(picture_files, "read_picture", None)
    again = read(root, tmp_path / "cache")
    assert np.array_equal(again.train_images, first.train_images) and np.array_equal(again.test_images, first.test_images)
    assert len(said) == 2 and all("decoded before" in line for line in said)


@pytest.mark.parametrize("change", ["picture", "added", "removed", "pre", "size"])
def test_what_changed_is_decoded_again(tmp_path: Path, change: str) -> None:
    """Another picture under the same name, one more, one less or another pre-transform never gives the old table."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    pre: Any = PRE
    if change == "picture":
        picture(77, 50, 50).save(root / "train/cat/20.bmp")
    elif change == "added":
        picture(77, 50, 50).save(root / "train/cat/7.bmp")
    elif change == "removed":
        (root / "train/cat/20.bmp").unlink()
    else:
        pre = (resize.Settings(24), center_crop.Settings(18)) if change == "size" else (resize.Settings((20, 20)),)
    assert_fresh(read(root, tmp_path / "cache", pre), read(root, tmp_path / "fresh", pre))


def assert_fresh(raw: RawData, fresh: RawData) -> None:
    """Compare with what was decoded into an empty cache."""
    assert np.array_equal(raw.train_images, fresh.train_images) and np.array_equal(raw.train_labels, fresh.train_labels)
    assert raw.names == fresh.names


@pytest.mark.parametrize("damage", ["byte", "cut", "longer", "emptied", "json", "json gone", "half json", "json label"])
def test_a_damaged_table_is_noticed_and_made_again(tmp_path: Path, damage: str, said: list[str]) -> None:
    """Whatever happens to one of the two files, the images are right and a line says that the table was damaged."""
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


def test_a_damaged_note_of_what_was_left_out_shifts_no_label(tmp_path: Path) -> None:
    """If the note of unreadable pictures names another one, labels and names still belong to their images."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/cat/99.png": b"no picture"})
    good = read(root, tmp_path / "cache", skip_unreadable=True)
    (path,) = (tmp_path / "cache").glob("folder-train-*.json")
    assert '"unreadable": [[4, ' in path.read_text()
    path.write_text(path.read_text().replace('"unreadable": [[4, ', '"unreadable": [[3, '))
    assert read(root, tmp_path / "cache", skip_unreadable=True).names == good.names


def test_a_block_that_rots_is_found_where_it_is_read(tmp_path: Path) -> None:
    """Damage that leaves size and time alone is found by the blocks' checksums: always in the first and the last block."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1024, 1024, 3), np.uint8)[:, ::1]
    listed = RawData(images, np.zeros(40, np.int64), images[:1], np.zeros(1, np.int64), ("a",))
    tables.to_raw(listed, (), tmp_path, True)
    (path,) = tmp_path.glob("array-train-*.u8")
    described = tables.read_description(path)
    assert described is not None and tables.rows_per_block((1024, 1024, 3)) == 1 and tables.SAMPLE < 40
    status = path.stat()
    for place in (5, path.stat().st_size - 5):
        flip(path, place, status.st_mtime_ns)
        assert all(tables.open_table(path, described) is None for _ in range(8))
        flip(path, place, status.st_mtime_ns)
        assert tables.open_table(path, described) is not None
    flip(path, path.stat().st_size // 2, None)  # the time of change tells: every block is read
    assert tables.open_table(path, described) is None


def flip(path: Path, place: int, mtime: int | None) -> None:
    """Change one byte of a file, and set its time of change back."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    if mtime is not None:
        os.utime(path, ns=(mtime, mtime))


def test_a_copied_table_is_checked_whole_and_then_trusted(tmp_path: Path, said: list[str]) -> None:
    """A table whose time of change differs, as a copy's does, is used once every block was found right."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    os.utime(path, ns=(1, 1))
    said.clear()
    read(root, tmp_path / "cache")
    assert all("decoded before" in line for line in said)
    described = tables.read_description(path)
    assert described is not None and described["mtime_ns"] == 1


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """A part of a table from a process that is gone does not stay on the disk; one being written now does."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    path.unlink()
    dead = path.with_name(f".folder-train-other.u8.{files.boot()}-0123456789ab.part")  # of pictures that were changed since
    dead.write_bytes(b"x")
    with files.temporary(path) as (alive, _):
        read(root, tmp_path / "cache")
        assert alive.exists() and path.exists()
        assert files.boot() == files.UNKNOWN or not dead.exists()


def test_what_is_written_to_a_table_never_reaches_the_file(tmp_path: Path) -> None:
    """Poisoning changes the mapped images of this run only: the file, other maps and the raw images stay."""
    root = small_tree(tmp_path / "data")
    raw = read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    before, content = np.array(raw.train_images), path.read_bytes()
    for placement in ("device", "host", "disk"):
        own = tables.own_copy(raw.train_images, placement)
        assert np.array_equal(own, before)
        own[:] = 7
        assert np.array_equal(raw.train_images, before) and path.read_bytes() == content


def test_decoding_is_the_same_with_one_or_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order and the pixels do not depend on how many threads decode or how many pictures a window has."""
    root = small_tree(tmp_path / "data")
    found = []
    for cores, window in ((1, 256), (5, 3)):
        monkeypatch.setattr(tables, "cores", lambda n=cores: n)
        monkeypatch.setattr(tables, "WINDOW", window)
        found.append(read(root, tmp_path / f"cache{cores}").train_images)
    assert np.array_equal(*found)


def test_the_listing_is_cut_before_anything_is_decoded(tmp_path: Path) -> None:
    """data.train_limit takes pictures spread evenly over the list, so that every class has its share, and opens no other."""
    root = small_tree(tmp_path / "data")
    listing = folder.load(folder.Settings(), str(root), False)
    assert isinstance(listing, Listing)
    count, step = len(listing.train_files), 2  # two classes of four pictures
    for i, file in enumerate(listing.train_files):
        if i % step:
            (root / file).write_bytes(b"no picture")
    cut = listing.cut(-(-count // step), 2)
    assert cut.train_files == listing.train_files[::step] and len(cut.test_files) == 2
    raw = tables.to_raw(cut, PRE, tmp_path / "cache", False)
    assert raw.train_labels.tolist() == listing.train_labels[::step].tolist() and len(raw.test_images) == 2
    assert set(raw.train_labels.tolist()) == set(listing.train_labels.tolist())
    for limit in (None, count, 9 * count):
        assert listing.cut(limit, limit).train_files == listing.train_files


# -- what a table is of ------------------------------------------------------------------------------------------------


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the path of each picture file that is decoded from here on."""
    opened: list[str] = []
    decode = picture_files.read_picture

    def counted(path: Path, *rest: Any) -> Image.Image:
        opened.append(str(path))
        return decode(path, *rest)

    monkeypatch.setattr(picture_files, "read_picture", counted)
    return opened


def bitmaps(root: Path, seed: int) -> Path:
    """Write uncompressed pictures: equal names and sizes whatever their pixels; all times as reproducible archives have."""
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
    """Two sets that only their pixels tell apart never share a table, and neither takes the other's away."""
    one, other = bitmaps(tmp_path / "one", 1), bitmaps(tmp_path / "other", 2)
    for root in (one, other):
        assert_fresh(read(root, tmp_path / "cache", ()), read(root, tmp_path / f"fresh {root.name}", ()))
    opened = count_decoded(monkeypatch)
    read(one, tmp_path / "cache", ())
    read(other, tmp_path / "cache", ())
    assert not opened


def test_a_set_put_in_the_place_of_another_has_its_own_pixels(tmp_path: Path) -> None:
    """As above, where the second set takes the first one's very path."""
    root = bitmaps(tmp_path / "set", 1)
    read(root, tmp_path / "cache", ())
    root.rename(tmp_path / "before")
    bitmaps(root, 2)
    assert_fresh(read(root, tmp_path / "cache", ()), read(root, tmp_path / "fresh", ()))


def test_marks_alone_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that keeps no true times and inodes, files of every start's sample are compared by content."""
    monkeypatch.setattr(tables, "mark_of", lambda path: f"{path.stat().st_size} 0 0 0")
    root = bitmaps(tmp_path / "set", 1)
    read(root, tmp_path / "cache", ())
    bitmaps(root, 2)
    assert_fresh(read(root, tmp_path / "cache", ()), read(root, tmp_path / "fresh", ()))


@pytest.mark.parametrize("how", ["moved", "copied", "touched"])
def test_equal_pictures_elsewhere_are_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: list[str]
) -> None:
    """A set that was moved, copied with or without its times, or touched uses the table that there is."""
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
    assert not opened and all("decoded before" in line for line in said)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == kept


def test_small_changes_replace_the_table_and_decode_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures added, removed and altered leave one table a part, and only new contents are decoded."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    opened = count_decoded(monkeypatch)
    picture(77, 50, 50).save(root / "train/cat/7.bmp")
    read(root, tmp_path / "cache")
    (root / "train/dog/0.bmp").unlink()
    read(root, tmp_path / "cache")
    picture(78, 50, 50).save(root / "train/cat/20.bmp")
    raw = read(root, tmp_path / "cache")
    assert [Path(path).name for path in opened] == ["7.bmp", "20.bmp"]
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 2
    assert_fresh(raw, read(root, tmp_path / "fresh"))


def test_runs_on_parts_of_a_set_keep_their_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on other classes, limits or sizes of one set do not replace one another's tables."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/ant/a.png": picture(9), "test/ant/b.png": picture(8)})
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
    """Rows are copied from an earlier table only if they are as they were written."""
    root = small_tree(tmp_path / "data")
    read(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("folder-train-*.u8")
    opened = tables.open_table(path, tables.read_description(path) or {})
    assert opened is not None and opened.pixels(3) is not None
    flip(path, 3 * 20 * 20 * 3 + 5, path.stat().st_mtime_ns)
    assert opened.pixels(3) is None and opened.pixels(2) is not None


def failing_reads(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let files of that name fail to be read, as from a network disk that is away or without permission."""
    decode = picture_files.read_picture

    def fail(path: Path, *rest: Any) -> Image.Image:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return decode(path, *rest)

    patch.setattr(picture_files, "read_picture", fail)


@pytest.mark.parametrize("skip", [False, True])
def test_a_failure_to_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool) -> None:
    """A picture that could not be read is tried again at the next start, though nothing about its file has changed; the
    others are not decoded again."""
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


def test_one_that_stays_unreadable_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """A picture that is still broken is the only one that is opened at the next start, and the table is not made again."""
    root = small_tree(tmp_path / "data")
    write_tree(root, {"train/cat/99.png": b"no picture"})
    read(root, tmp_path / "cache", skip_unreadable=True)
    opened = count_decoded(monkeypatch)
    said.clear()
    read(root, tmp_path / "cache", skip_unreadable=True)
    assert {Path(path).name for path in opened} == {"99.png"} and not any("made" in line for line in said)


def test_a_read_only_folder_of_tables_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """An intact table in a folder that may not be written to serves, also copied and for pictures at another place: what
    would be noted in it for speed is left out."""
    wanted = np.array(read(small_tree(tmp_path / "set"), tmp_path / "cache").train_images)
    shutil.copytree(tmp_path / "cache", tmp_path / "shared", copy_function=shutil.copyfile)
    shutil.copytree(tmp_path / "set", tmp_path / "mine")

    def refuse(path: Path, _: object) -> None:
        raise UserError(f"{path}: cannot be written")

    monkeypatch.setattr(tables, "write_text", refuse)
    monkeypatch.setattr(tables, "write_atomically", refuse)
    said.clear()
    for _ in range(2):
        raw = read(tmp_path / "mine", tmp_path / "shared")
        assert np.array_equal(raw.train_images, wanted)
    assert len(said) == 4 and all("decoded before" in line for line in said)


def test_a_table_that_another_process_replaces_stays_what_it_was(tmp_path: Path) -> None:
    """A run that has opened a table keeps its pixels, in every placement, when a run on altered pictures replaces the file."""
    root = small_tree(tmp_path / "data")
    raw = read(root, tmp_path / "cache")
    before = np.array(raw.train_images)
    picture(78, 50, 50).save(root / "train/cat/20.bmp")
    (root / "train/dog/0.bmp").unlink()
    assert len(read(root, tmp_path / "cache").train_images) == 7
    for placement in ("device", "host", "disk"):
        assert np.array_equal(tables.own_copy(raw.train_images, placement), before)
    assert np.array_equal(tables.read_table(raw.train_images), before)


def test_the_digests_of_a_table_are_those_of_its_images(tmp_path: Path) -> None:
    """What a run knows its images by comes from the table and is what the pixels themselves give, also after a cut."""
    raw = read(small_tree(tmp_path / "data"), tmp_path / "cache")
    assert raw.train_digests == digests.pixel_digests(raw.train_images)
    assert raw.test_digests == digests.pixel_digests(raw.test_images)
    assert raw.test_names is not None and raw.test_names[0] == "cat/20.bmp"
    cut = raw.cut(3, 2)
    assert cut.train_digests == digests.pixel_digests(cut.train_images) and len(cut.test_names or ()) == 2


def test_remedies_for_pictures_work(tmp_path: Path) -> None:
    """Pictures of several sizes become one by the transforms that the error names; unreadable ones are left out by the
    setting that it names, and read again once repaired."""
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
