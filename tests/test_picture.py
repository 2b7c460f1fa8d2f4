"""Picture files as cameras, scanners and file systems give them: bit depths, orientation, damaged notes, special files."""

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

from data import tables
from data.datasets import folder
from data.picture import depth_line, read_named, read_picture, read_prepared
from data.unlabeled import Pictures
from utils.errors import UserError

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG, by its channels


def png16(levels: np.ndarray) -> bytes:
    """Write (H, W) or (H, W, C) levels as a PNG of 16 bits, by hand: Pillow writes grey ones only."""
    levels = levels.reshape(*levels.shape[:2], -1)
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def tiff(levels: np.ndarray) -> bytes:
    """Write grey levels as a TIFF of their own type."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "TIFF")
    return buffer.getvalue()


def colour_tiff16(levels: np.ndarray) -> bytes:
    """Write (H, W, 3) levels as an uncompressed little-endian TIFF of 16 bits, by hand."""
    height, width, _ = levels.shape
    data = levels.astype("<u2").tobytes()
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1), (262, 3, 1, 2),
               (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data) + 6) + data + struct.pack("<HHH", 16, 16, 16) + directory


def ramp(bits: int, *shape: int) -> np.ndarray:
    """Levels that use all of a range of so many bits."""
    return np.linspace(0, 2**bits - 1, int(np.prod(shape))).round().astype(np.uint16).reshape(shape)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "uint16 tiff", "int32 tiff", "grey alpha", "colour png", "colour tiff", "alpha png"])
def test_levels_of_any_range_keep_their_upper_8_bits(tmp_path: Path, bits: int, kind: str) -> None:
    """A file of 16 or 32 bits a level, of which it uses 8, 10, 12, 14 or 16, becomes what its upper 8 bits are; the number
    of bits is noted."""
    path, depths = tmp_path / "x", []
    colours = ramp(bits, 6, 7, 3)
    if kind in ("png", "uint16 tiff", "int32 tiff"):
        wanted = ramp(bits, 6, 7, 1)
        grey = wanted[..., 0]
        path.write_bytes(png16(grey) if kind == "png" else tiff(grey.astype(np.int32 if kind == "int32 tiff" else np.uint16)))
    elif kind == "grey alpha":
        wanted = ramp(bits, 6, 7, 1)
        path.write_bytes(png16(np.dstack([wanted, np.full_like(wanted, 65535)])))
    elif kind == "alpha png":
        wanted = colours
        path.write_bytes(png16(np.dstack([wanted, np.full((6, 7), 65535)])))
    else:
        wanted = colours
        path.write_bytes(png16(wanted) if kind == "colour png" else colour_tiff16(wanted))
    assert np.array_equal(read_picture(path, depths), np.broadcast_to(wanted >> (bits - 8), (6, 7, 3)))
    assert depths == [bits]


def test_formats_that_state_their_range_are_read_by_it(tmp_path: Path) -> None:
    """A dark picture in a PGM, which names its largest level, stays dark; 8-bit pictures are not noted."""
    levels, depths = ramp(10, 6, 7), []
    (tmp_path / "x.pgm").write_bytes(b"P5 7 6 65535\n" + levels.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(read_picture(tmp_path / "x.pgm", depths))[..., 0], levels >> 8) and depths == [16]
    Image.new("L", (7, 6), 3).save(tmp_path / "x.png")
    assert np.asarray(read_picture(tmp_path / "x.png", depths)).max() == 3 and depths == [16]


@pytest.mark.parametrize("levels", [np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)])
def test_levels_beyond_16_bits_are_refused_with_their_range(tmp_path: Path, levels: np.ndarray) -> None:
    """What has no usual range is not guessed: the reason has the levels."""
    (tmp_path / "x.tif").write_bytes(tiff(levels))
    assert str(levels[0, 0]) in str(read_prepared(tmp_path / "x.tif", ()))


def make_set(root: Path, *ranges: int) -> Path:
    """A data set of one class whose pictures use these ranges."""
    (root / "train" / "a").mkdir(parents=True)
    for i, bits in enumerate(ranges):
        (root / "train" / "a" / f"{i}.png").write_bytes(png16(ramp(bits, 6, 7)))
    return root


def test_the_assumed_ranges_are_reported_once_a_set(tmp_path: Path, said: list[str]) -> None:
    """One line counts the pictures by range, of a data set and of pictures to label; several ranges come with the remedy,
    and after it there is nothing to report."""
    root = make_set(tmp_path / "data", 12, 12, 16)
    tables.to_raw(folder.load(folder.Settings(), str(root), False), (), tmp_path / "cache", False)
    (line,) = [line for line in said if "bits" in line]
    for part in ("3 of 3", "2 of 12 bits (0..4095)", "1 of 16 bits (0..65535)", "save all of them with 8 bits"):
        assert part in line
    pictures = Pictures(root, (), (6, 7))
    list(pictures.batches(9))
    assert [text for text in pictures.remarks() if "bits" in text] == [line.partition(": ")[2]]
    for file in (root / "train" / "a").iterdir():
        read_picture(file).save(file)
    said.clear()
    tables.to_raw(folder.load(folder.Settings(), str(root), False), (), tmp_path / "cache", False)
    assert said and not [line for line in said if "bits" in line]


def test_one_range_needs_no_remedy() -> None:
    """Pictures of one camera are comparable: the line names their range only; without such pictures there is no line."""
    line = depth_line([12, 12], 5)
    assert line and "2 of 12 bits" in line and "save" not in line and depth_line([], 5) is None


# -- Orientation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_pictures_stand_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Whatever way a camera was held, the picture is the scene as it was."""
    scene = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
    laid = {  # the scene as it lies in the file: what the orientation's turn undoes
        1: scene, 2: scene[:, ::-1], 3: scene[::-1, ::-1], 4: scene[::-1], 5: scene.transpose(1, 0, 2),
        6: np.rot90(scene), 7: scene[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(scene, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(laid)).save(path, exif=exif, lossless=True)
    assert np.array_equal(read_picture(path), scene)


def test_deep_pictures_stand_upright_too(tmp_path: Path) -> None:
    """Orientation and bit depth do not exclude one another."""
    levels, exif = ramp(12, 5, 8), Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(levels).copy()).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "x.png"))[..., 0], levels >> 4)


def damaged_exif(path: Path) -> None:
    """Write a JPEG whose EXIF breaks off in the middle."""
    exif = Image.Exif()
    exif[274], exif[0x010E] = 6, "a description that is longer than what is left of it"
    Image.new("RGB", (8, 5), "red").save(path, exif=exif.tobytes()[:-30])


def test_decoders_print_no_warnings(tmp_path: Path) -> None:
    """Damaged EXIF and a picture of 95 megapixels are read without a line of the library, which would name no file."""
    damaged_exif(tmp_path / "damaged.jpg")
    (tmp_path / "odd.jpg").write_bytes((tmp_path / "damaged.jpg").read_bytes().replace(b"Exif\0\0", b"Exif\0\0xxxx", 1))
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    script = (
        "import sys; from pathlib import Path; from data.picture import read_picture\n"
        "for name in sys.argv[1:]: print(read_picture(Path(name)).size)"
    )
    names = [str(tmp_path / name) for name in ("damaged.jpg", "odd.jpg", "large.png")]
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "(10000, 9500)" and len(done.stdout.splitlines()) == 3


# -- What is no regular file -------------------------------------------------------------------------------------------


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """A pipe in a class folder, among pictures to label or as a trigger is one line with its kind; a device likewise."""
    root = make_set(tmp_path / "data", 8)
    os.mkfifo(root / "train" / "a" / "pipe.png")
    listing = folder.load(folder.Settings(), str(root), False)
    with pytest.raises(UserError, match=r"a/pipe\.png: is a named pipe"):
        tables.to_raw(listing, (), tmp_path / "cache", False)
    skipped = folder.load(folder.Settings(skip_unreadable=True), str(root), False)  # the remedy of that line
    assert tables.to_raw(skipped, (), tmp_path / "cache", False).names == ("a/0.png",)
    pictures = Pictures(root, (), (6, 7))
    assert len(list(pictures.batches(9))) == 1 and [name for name, _ in pictures.unreadable] == ["train/a/pipe.png"]
    for path in (root / "train" / "a" / "pipe.png", Path(os.devnull), root):
        with pytest.raises(UserError, match="trigger_path"):
            read_named(str(path), "backdoor.badnets.trigger_path")
