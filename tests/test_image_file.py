"""Image files from cameras, scanners and file systems: bit depths, orientation, damaged metadata, special files."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from data.datasets import folder
from data.io import tables
from data.io.image_file import depth_line, read_image, read_named, read_prepared
from data.unlabeled import ImageFiles
from utils.errors import UserError

COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG, by number of channels


def png16(levels: np.ndarray) -> bytes:
    """Return levels (H, W) or (H, W, C) as a PNG with 16 bits; Pillow can write only grey ones."""
    levels = levels.reshape(*levels.shape[:2], -1)
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", width, height, 16, COLOR_TYPES[channels], 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def tiff(levels: np.ndarray) -> bytes:
    """Return grey levels as a TIFF with the type of the array."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "TIFF")
    return buffer.getvalue()


def tiff16(
    levels: np.ndarray, rows: int = 10**6, deflate: bool = False, photometric: int | None = None, planar: int = 1
) -> bytes:
    """Return levels (H, W, C) as a little-endian TIFF with 16 bits, in strips of so many rows."""
    height, width, channels = levels.shape
    parts = [levels[start : start + rows].astype("<u2").tobytes() for start in range(0, height, rows)]
    parts = [zlib.compress(part) if deflate else part for part in parts]
    n, data = len(parts), b"".join(parts)
    sizes = [len(part) for part in parts]
    offsets = [8 + sum(sizes[:i]) for i in range(n)]
    bits_at = 8 + len(data)
    offsets_at, sizes_at = bits_at + 2 * channels, bits_at + 2 * channels + 4 * n
    color = (2 if channels == 3 else 1) if photometric is None else photometric
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, bits_at if channels > 2 else 16),
        (259, 3, 1, 8 if deflate else 1), (262, 3, 1, color), (273, 4, n, offsets_at if n > 1 else offsets[0]),
        (277, 3, 1, channels), (278, 3, 1, min(rows, height)), (279, 4, n, sizes_at if n > 1 else sizes[0]),
        (284, 3, 1, planar),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    tables = struct.pack(f"<{channels}H", *[16] * channels) + struct.pack(f"<{2 * n}I", *offsets, *sizes)
    return b"II*\0" + struct.pack("<I", sizes_at + 4 * n) + data + tables + directory


def ramp(bits: int, *shape: int) -> np.ndarray:
    """Levels from 0 to the largest of so many bits."""
    return np.linspace(0, 2**bits - 1, int(np.prod(shape))).round().astype(np.uint16).reshape(shape)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(
    "kind",
    [
        "png",
        "uint16 tiff",
        "int32 tiff",
        "grey alpha",
        "color png",
        "color tiff",
        "strips",
        "deflate",
        "deflated strips",
        "alpha png",
    ],
)
def test_levels_of_any_range_keep_their_upper_8_bits(tmp_path: Path, bits: int, kind: str) -> None:
    """A file with 16 or 32 bits per level that uses 8, 10, 12, 14 or 16 of them is reduced to the upper 8 of the used bits,
    whose number is returned."""
    path, depths = tmp_path / "x", []
    colors = ramp(bits, 6, 7, 3)
    if kind in ("png", "uint16 tiff", "int32 tiff"):
        wanted = ramp(bits, 6, 7, 1)
        grey = wanted[..., 0]
        path.write_bytes(png16(grey) if kind == "png" else tiff(grey.astype(np.int32 if kind == "int32 tiff" else np.uint16)))
    elif kind == "grey alpha":
        wanted = ramp(bits, 6, 7, 1)
        path.write_bytes(png16(np.dstack([wanted, np.full_like(wanted, 65535)])))
    elif kind == "alpha png":
        wanted = colors
        path.write_bytes(png16(np.dstack([wanted, np.full((6, 7), 65535)])))
    else:
        wanted = colors
        rows, deflate = 2 if "strips" in kind else 10, "deflate" in kind
        path.write_bytes(png16(wanted) if kind == "color png" else tiff16(wanted, rows, deflate))
    assert np.array_equal(read_image(path, depths), np.broadcast_to(wanted >> (bits - 8), (6, 7, 3)))
    assert depths == [bits]


def test_formats_that_state_their_range_are_read_by_it(tmp_path: Path) -> None:
    """A dark image in a PGM, which states its largest level, stays dark; for 8-bit images no number of bits is returned."""
    levels, depths = ramp(10, 6, 7), []
    (tmp_path / "x.pgm").write_bytes(b"P5 7 6 65535\n" + levels.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.pgm", depths))[..., 0], levels >> 8) and depths == [16]
    Image.new("L", (7, 6), 3).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png", depths)).max() == 3 and depths == [16]


@pytest.mark.parametrize("levels", [np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)])
def test_levels_beyond_16_bits_are_refused_with_their_range(tmp_path: Path, levels: np.ndarray) -> None:
    """Levels in no usual range are not scaled by a guess: the error states the levels."""
    (tmp_path / "x.tif").write_bytes(tiff(levels))
    assert str(levels[0, 0]) in str(read_prepared(tmp_path / "x.tif", ()))


def make_set(root: Path, *ranges: int) -> Path:
    """A data set of one class whose images use these numbers of bits."""
    (root / "train" / "a").mkdir(parents=True)
    for i, bits in enumerate(ranges):
        (root / "train" / "a" / f"{i}.png").write_bytes(png16(ramp(bits, 6, 7)))
    return root


def test_the_assumed_ranges_are_reported_once_per_set(tmp_path: Path, said: list[str]) -> None:
    """One line counts the images by range, in a data set and among images to label; for several ranges it names a remedy, after
    which nothing is reported."""
    root = make_set(tmp_path / "data", 12, 12, 16)
    tables.to_raw(folder.load(folder.Settings(), str(root), False), (), tmp_path / "cache", False)
    (line,) = [line for line in said if "bits" in line]
    for part in ("3 of 3", "2 of 12 bits (0..4095)", "1 of 16 bits (0..65535)", "save all of them with 8 bits"):
        assert part in line
    unlabeled = ImageFiles(root, (), (6, 7))
    list(unlabeled.batches(9))
    assert [text for text in unlabeled.remarks() if "bits" in text] == [line.partition(": ")[2]]
    for file in (root / "train" / "a").iterdir():
        read_image(file).save(file)
    said.clear()
    tables.to_raw(folder.load(folder.Settings(), str(root), False), (), tmp_path / "cache", False)
    assert said and not [line for line in said if "bits" in line]


@pytest.mark.parametrize(
    ("channels", "options", "reason"), [(3, {"planar": 2}, "one after the other"), (1, {"photometric": 0}, "white")]
)
def test_tiffs_that_pillow_decodes_into_other_levels_are_refused(
    tmp_path: Path, channels: int, options: dict[str, int], reason: str
) -> None:
    """Separate planes, and grey levels that count from white, are named as unreadable instead of giving wrong pixels."""
    (tmp_path / "x.tif").write_bytes(tiff16(ramp(16, 6, 7, channels), **options))
    found = read_prepared(tmp_path / "x.tif", ())
    assert isinstance(found, str) and reason in found and "save it with 8 bits" in found


def test_a_file_that_asks_for_absurd_memory_is_unreadable(tmp_path: Path) -> None:
    """One damaged length in a JPEG 2000 makes Pillow ask for more memory than there is: the file is named, the run goes on."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(image, "JPEG2000")
    content = bytearray(image.getvalue())
    at = content.index(b"jp2h") - 4
    content[at : at + 16] = struct.pack(">I", 1) + b"jp2h" + struct.pack(">Q", 2**56)
    (tmp_path / "x.jp2").write_bytes(content)
    assert isinstance(read_prepared(tmp_path / "x.jp2", ()), str)


def test_an_image_that_has_become_readable_is_counted_once(tmp_path: Path, said: list[str]) -> None:
    """It is decoded twice, as a trial and for the new table, but is one image."""
    root = make_set(tmp_path / "data", 12)
    (root / "train" / "a" / "1.png").write_bytes(b"damaged")
    chosen = folder.Settings(skip_unreadable=True)
    tables.to_raw(folder.load(chosen, str(root), False), (), tmp_path / "cache", False)
    (root / "train" / "a" / "1.png").write_bytes(png16(ramp(12, 6, 7)))
    said.clear()
    tables.to_raw(folder.load(chosen, str(root), False), (), tmp_path / "cache", False)
    (line,) = [line for line in said if "bits" in line]
    assert "1 of 2 images" in line or "2 of 2 images" in line


def test_one_range_needs_no_remedy() -> None:
    """Images from one camera are comparable: the line states their range only; without such images there is no line."""
    line = depth_line([12, 12], 5)
    assert line and "2 of 12 bits" in line and "save" not in line and depth_line([], 5) is None


# -- Orientation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_images_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """However the camera was held, the context is upright."""
    context = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
    stored = {  # the pixels in the file, which the orientation turns into the context
        1: context, 2: context[:, ::-1], 3: context[::-1, ::-1], 4: context[::-1], 5: context.transpose(1, 0, 2),
        6: np.rot90(context), 7: context[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(context, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, lossless=True)
    assert np.array_equal(read_image(path), context)


def test_images_of_more_than_8_bits_are_turned_upright(tmp_path: Path) -> None:
    """Orientation and bit depth are independent of each other."""
    levels, exif = ramp(12, 5, 8), Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(levels).copy()).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png"))[..., 0], levels >> 4)


def damaged_exif(path: Path) -> None:
    """Write a JPEG with truncated EXIF data."""
    exif = Image.Exif()
    exif[274], exif[0x010E] = 6, "a description that is longer than the rest of the truncated data"
    Image.new("RGB", (8, 5), "red").save(path, exif=exif.tobytes()[:-30])


def test_decoders_print_no_warnings(tmp_path: Path) -> None:
    """Damaged EXIF data and an image of 95 megapixels are read without the library's warnings, which do not name the file."""
    damaged_exif(tmp_path / "damaged.jpg")
    (tmp_path / "odd.jpg").write_bytes((tmp_path / "damaged.jpg").read_bytes().replace(b"Exif\0\0", b"Exif\0\0xxxx", 1))
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    script = (
        "import sys; from pathlib import Path; from data.io.image_file import read_image\n"
        "for name in sys.argv[1:]: print(read_image(Path(name)).size)"
    )
    names = [str(tmp_path / name) for name in ("damaged.jpg", "odd.jpg", "large.png")]
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "(10000, 9500)" and len(done.stdout.splitlines()) == 3


def test_linked_folders_are_not_followed_but_mentioned(tmp_path: Path) -> None:
    """A link could lead round in a circle; whoever expects its images to be labeled reads that they are not."""
    root = make_set(tmp_path / "data", 8, 8)
    (root / "more").symlink_to(make_set(tmp_path / "other", 8, 8, 8) / "train")
    (root / "again").symlink_to(root)
    unlabeled = ImageFiles(root, (), (6, 7))
    assert sum(len(batch) for batch in unlabeled.batches(9)) == 2
    (line,) = (text for text in unlabeled.remarks() if "links" in text)
    assert "2 links to folders" in line and "again" in line


# -- Files that are not regular ----------------------------------------------------------------------------------------


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """A pipe in a class folder, among images to label or as a trigger is one line with its kind; so is a device."""
    root = make_set(tmp_path / "data", 8)
    os.mkfifo(root / "train" / "a" / "pipe.png")
    listing = folder.load(folder.Settings(), str(root), False)
    with pytest.raises(UserError, match=r"a/pipe\.png: is a named pipe"):
        tables.to_raw(listing, (), tmp_path / "cache", False)
    skipped = folder.load(folder.Settings(skip_unreadable=True), str(root), False)  # the remedy that the error names
    assert tables.to_raw(skipped, (), tmp_path / "cache", False).names == ("a/0.png",)
    unlabeled = ImageFiles(root, (), (6, 7))
    assert len(list(unlabeled.batches(9))) == 1 and [name for name, _ in unlabeled.unreadable] == ["train/a/pipe.png"]
    for path in (root / "train" / "a" / "pipe.png", Path(os.devnull), root):
        with pytest.raises(UserError, match="trigger_path"):
            read_named(str(path), "backdoor.badnets.trigger_path")
