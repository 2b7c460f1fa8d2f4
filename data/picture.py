"""Picture files: read as 8-bit RGB whatever they are, or refused in one line."""

from __future__ import annotations

import functools
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError
from utils.paths import exists, require_file, user_path

# Pillow's warnings name no file, and the pixels are the same without what they warn of: damaged EXIF, 90 to 179 megapixels
# (more are an error). Not `catch_warnings` around each read: it is not thread-safe, and pictures are read in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

RUNS_PROGRAMS = ("EPS", "WMF")  # formats that Pillow hands to another program
BROKEN = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError,
          struct.error, zlib.error, EOFError, Image.DecompressionBombError)  # fmt: skip

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and programs use, in files that have 16 or 32 for each level
SCALED = ("PPM", "JPEG2000")  # formats that say which range they use, and that Pillow scales to 16 bits by it
TURNS = {  # what shows a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION = 274  # the EXIF tag
GREY_ALPHA = "LA;16B"  # Pillow's name of 16-bit grey with alpha; it opens them as RGBA
NATIVE_OTHER = ";16B" if sys.byteorder == "little" else ";16L"
OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": NATIVE_OTHER}


def read_named(name: str, key: str) -> Image.Image:
    """Read the picture that a setting names as 8-bit RGB; a relative path may also start at the project's folder.

    Args:
        key: the setting, for the errors.
    Raises:
        UserError: there is no such file, or it is no picture.
    """
    path = user_path(name, key)
    if not exists(path, key) and not path.is_absolute():
        path = Path(__file__).resolve().parents[1] / name
    if not exists(path, key):
        raise UserError(f"{name}: no such picture: mend {key}, or leave it out for what is built in")
    try:
        return read_picture(path)
    except BROKEN as error:
        raise UserError(f"{name}: is no readable picture ({reason(error, path)}): give {key} another, e.g. a PNG") from None


def read_picture(path: Path, depths: list[int] | None = None) -> Image.Image:
    """Return a picture file as 8-bit RGB, upright; the first one of a file of several.

    Grey becomes three equal channels; transparency is dropped, as torchvision's ImageFolder does. The EXIF orientation is
    honoured, which ImageFolder does not do; one that cannot be read counts as upright.

    Levels of more than 8 bits are scaled by a power of two, from the smallest of `DEPTHS` that holds all levels of the file:
    a 16-bit file may hold 0..255, or a 12-bit sensor's 0..4095, and rarely says so (the significant bits of a PNG, sBIT, do
    not tell whether its levels were scaled up). A dark picture may therefore come out brighter than a bright one of the same
    camera. Pictures whose brightness must be comparable have to be saved with 8 bits.

    Args:
        depths: the number of bits is appended if the file has levels of more than 8 bits.
    Raises:
        one of BROKEN: it cannot be read as that; not a regular file; levels below 0, above 65535 or of floating point.
    """
    require_file(path)
    with open_picture(path) as picture:
        deep = deep_levels(picture, path)
        if deep is None:
            return upright(picture, to_rgb(picture))
        bits = 16 if picture.format in SCALED else next(bits for bits in DEPTHS if deep.max() < 2**bits)
        if depths is not None:
            depths.append(bits)
        return upright(picture, Image.fromarray((deep >> (bits - 8)).astype(np.uint8)).convert("RGB"))


def read_prepared(path: Path, pre: Sequence[Any], depths: list[int] | None = None) -> np.ndarray | str:
    """Return a picture file after the pre-transforms, (H, W, 3) uint8, or why it cannot be read; `depths` as above."""
    try:
        picture = read_picture(path, depths)
    except BROKEN as error:
        return reason(error, path)
    return prepared(picture, pre)


def open_picture(path: Path) -> Image.Image:
    """Open a picture file in a format that is decoded without another program."""
    return Image.open(path, formats=safe_formats())


@functools.cache
def safe_formats() -> tuple[str, ...]:
    """Return the formats that are decoded without another program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in RUNS_PROGRAMS)


def deep_levels(picture: Image.Image, path: Path) -> np.ndarray | None:
    """Return the levels of a picture of more than 8 bits, (H, W) or (H, W, 3) of 0..65535; None: it has 8 bits.

    Args:
        path: of its file. Of 16-bit colours Pillow keeps the upper byte; where that is small, the lower one is read as well.
    """
    low_tiles = [(*tile[:3], low_byte(tile[3])) for tile in getattr(picture, "tile", ())]
    picture.load()
    if picture.mode.startswith("I"):
        levels = np.asarray(picture)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its grey levels are {levels.min()} to {levels.max()}: save it with 8 or 16 bits")
        return levels
    if not low_tiles or any(tile[3] is None for tile in low_tiles):
        return None
    levels = np.asarray(picture)[..., :3].astype(np.uint16) << 8
    if levels.max() < 2 ** DEPTHS[-2]:
        with open_picture(path) as again:
            grey = again.tile[0][3] == GREY_ALPHA
            again.tile = low_tiles  # type: ignore[assignment]
            low = np.asarray(again)
        levels |= low[..., 1:2] if grey else low[..., :3]
    return levels


def low_byte(decoder: Any) -> Any:
    """Return a decoder's arguments changed to give the lower byte of 16-bit colours as 8-bit ones; None: it has no such."""
    mode, *rest = (decoder,) if isinstance(decoder, str) else decoder if isinstance(decoder, tuple) and decoder else (None,)
    if mode == GREY_ALPHA:
        return "RGBA"  # all four bytes: upper and lower grey, upper and lower alpha
    if not isinstance(mode, str) or mode[:-4] not in ("RGB", "RGBA", "RGBX") or mode[-4:] not in OTHER_BYTE:
        return None
    other = mode[:-4] + OTHER_BYTE[mode[-4:]]
    return other if isinstance(decoder, str) else (other, *rest)


def upright(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    """Return what was made of a loaded picture as its EXIF orientation says; Pillow has turned TIFF already."""
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except (*BROKEN, AssertionError):
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of at most 8 bits as 8-bit RGB."""
    if picture.mode == "F":
        raise ValueError("its grey levels are floating-point numbers: save it with 8 or 16 bits")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def depth_line(depths: Sequence[int], count: int) -> str | None:
    """Return which ranges were assumed of `count` pictures, in a line, or None where all have 8 bits.

    Args:
        depths: what `read_picture` appended.
    """
    if not depths:
        return None
    kinds = [f"{n} of {bits} bits (0..{2**bits - 1})" for bits, n in sorted(Counter(depths).items())]
    line = f"{len(depths)} of {count} pictures are not stored with 8 bits: scaled to that from {', '.join(kinds)}"
    if len(kinds) > 1:
        line += "; their brightness differs by these factors: if it must not, save all of them with 8 bits"
    return line


def prepared(picture: Image.Image, pre: Sequence[Any]) -> np.ndarray:
    """Return an RGB picture after the pre-transforms, (H, W, 3) uint8: the pixels of torchvision on PIL images."""
    for step in pre:
        picture = step.apply(picture, torch.zeros(1, 0))
    return np.asarray(picture)


def reason(error: BaseException, path: Path) -> str:
    """Return in one line why the picture cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).replace(f" {str(path)!r}", "").replace(str(path), "it")
    return " ".join(text.split()) or type(error).__name__
