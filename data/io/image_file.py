"""Image files: read as 8-bit RGB whatever their format, or refused in one line."""

from __future__ import annotations

import functools
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError
from utils.paths import named_path, require_file, visible

# Pillow's warnings do not name the file, and what they warn of does not change the pixels: damaged EXIF, 90 to 179 megapixels
# (more is an error). `catch_warnings` around each read would not be thread-safe, and images are read in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

RUNS_PROGRAMS = ("EPS", "WMF")  # formats that Pillow hands to another program
BROKEN = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError,
          struct.error, zlib.error, EOFError, MemoryError, Image.DecompressionBombError)  # fmt: skip

DEPTHS = (8, 10, 12, 14, 16)  # bits per level that cameras and programs use in files of 16 or 32 bits per level
SCALED = ("PPM", "JPEG2000")  # formats that state their range, by which Pillow scales them to 16 bits
TURNS = {  # the transposition that turns an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION = 274  # the EXIF tag
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANAR = 258, 262, 284  # tags
GREY_ALPHA = "LA;16B"  # Pillow's name for 16-bit grey with alpha, which it opens as RGBA
NATIVE_OTHER = ";16B" if sys.byteorder == "little" else ";16L"
OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": NATIVE_OTHER}
SUFFIXES = (
    ".png", ".bmp", ".jpg", ".jpeg", ".jfif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".gif", ".jp2", ".j2k",
    ".tga", ".avif", ".ico",
)  # fmt: skip  # of files that are taken for images where other files may lie too
LISTED = 100  # unreadable files that the log lists by name


def read_named(name: str, key: str) -> Image.Image:
    """Read the image file that a setting names as 8-bit RGB; a relative path may also start at the project's folder.

    Args:
        key: the setting, for error messages.
    Raises:
        UserError: the file does not exist or cannot be read as an image.
    """
    path = named_path(name, key)
    try:
        return read_image(path)
    except BROKEN as error:
        raise UserError(
            f"{name}: not a readable image ({reason(error, path)}): set {key} to another file, e.g. a PNG"
        ) from None


def image_files(folder: Path) -> list[Path]:
    """Return the image files directly in a folder, by their `SUFFIXES`, sorted by name."""
    return [path for path in map(Path, visible(folder)) if path.suffix.lower() in SUFFIXES]


def read_image(path: Path, depths: list[int] | None = None) -> Image.Image:
    """Return an image file as 8-bit RGB, upright; of a file with several images, the first.

    Grey becomes three equal channels; transparency is dropped, as torchvision's ImageFolder does. Unlike in ImageFolder, the
    EXIF orientation is applied; an orientation that cannot be read counts as upright.

    Levels of more than 8 bits are scaled by a power of two, from the smallest of `DEPTHS` that holds all levels of the file:
    a 16-bit file may hold 0..255, or a 12-bit sensor's 0..4095, and rarely states which (the significant bits of a PNG, sBIT,
    do not reveal whether its levels were scaled up). A dark image may therefore come out brighter than a bright one from the
    same camera. Images whose brightness must be comparable have to be saved with 8 bits.

    Args:
        depths: the number of bits is appended if the file has levels of more than 8 bits.
    Raises:
        one of BROKEN: the file is not a regular file or cannot be decoded, or its levels are below 0, above 65535 or of
            floating point.
    """
    require_file(path)
    with open_image(path) as image:
        deep = deep_levels(image, path)
        if deep is None:
            return upright(image, to_rgb(image))
        bits = 16 if image.format in SCALED else next(bits for bits in DEPTHS if deep.max() < 2**bits)
        if depths is not None:
            depths.append(bits)
        return upright(image, Image.fromarray((deep >> (bits - 8)).astype(np.uint8)).convert("RGB"))


def read_prepared(path: Path, pre: Sequence[Any], depths: list[int] | None = None) -> np.ndarray | str:
    """Return an image file after the pre-transforms, (H, W, 3) uint8, or the reason why it cannot be read.

    Args:
        pre: settings of the transforms of `transform.pre`.
        depths: as in `read_image`.
    """
    try:
        return prepared(read_image(path, depths), pre)
    except BROKEN as error:
        return reason(error, path)


def open_image(path: Path) -> Image.Image:
    """Open an image file in one of the formats that Pillow decodes by itself."""
    return Image.open(path, formats=safe_formats())


@functools.cache
def safe_formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes without calling another program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in RUNS_PROGRAMS)


def deep_levels(image: Image.Image, path: Path) -> np.ndarray | None:
    """Return the levels of an image of more than 8 bits, (H, W) or (H, W, 3) in 0..65535; None if it has 8 bits.

    Args:
        path: the image's file. Of 16-bit colors Pillow keeps the upper byte; if that is small, the lower byte is read as well.
    """
    refuse_ambiguous(image)
    low_tiles = [with_decoder(tile, low_byte(tile[3])) for tile in getattr(image, "tile", ())]
    image.load()
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its grey levels are {levels.min()} to {levels.max()}: save it with 8 or 16 bits")
        return levels
    if not low_tiles or any(tile[3] is None for tile in low_tiles):
        return None
    levels = np.asarray(image)[..., :3].astype(np.uint16) << 8
    if levels.max() < 2 ** DEPTHS[-2]:
        with open_image(path) as again:
            grey = again.tile[0][3] == GREY_ALPHA
            again.tile = low_tiles
            again.load()
            low = np.asarray(again)
        levels |= low[..., 1:2] if grey else low[..., :3]
    return levels


def refuse_ambiguous(image: Image.Image) -> None:
    """Raise `ValueError` for the kinds of 16-bit TIFF that Pillow decodes into other levels."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TIFF_BITS, 8)
    if max(bits if isinstance(bits, tuple) else (bits,)) <= 8:
        return
    if tags.get(TIFF_PLANAR) == 2:
        raise ValueError("its channels are stored one after the other, with more than 8 bits: save it with 8 bits")
    if tags.get(TIFF_PHOTOMETRIC) == 0:
        raise ValueError("0 means white in it, with more than 8 bits: save it with 8 bits")


def with_decoder(tile: Any, arguments: Any) -> Any:
    """Return one of Pillow's descriptions of encoded pixels (since Pillow 11 a named tuple) with other decoder arguments."""
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def low_byte(decoder: Any) -> Any:
    """Return a decoder's arguments, changed so that it gives the lower byte of 16-bit colors; None if it decodes no such."""
    mode, *rest = (decoder,) if isinstance(decoder, str) else decoder if isinstance(decoder, tuple) and decoder else (None,)
    if mode == GREY_ALPHA:
        return "RGBA"  # all four bytes: upper and lower grey, upper and lower alpha
    if not isinstance(mode, str) or mode[:-4] not in ("RGB", "RGBA", "RGBX") or mode[-4:] not in OTHER_BYTE:
        return None
    other = mode[:-4] + OTHER_BYTE[mode[-4:]]
    return other if isinstance(decoder, str) else (other, *rest)


def upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """Turn `rgb`, which was made from the loaded image, by that image's EXIF orientation; Pillow has turned TIFF already."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except (*BROKEN, AssertionError):
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of at most 8 bits as 8-bit RGB."""
    if image.mode == "F":
        raise ValueError("its grey levels are floating-point numbers: save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def prepared(image: Image.Image, pre: Sequence[Any]) -> np.ndarray:
    """Return an RGB image after the pre-transforms, (H, W, 3) uint8: the pixels that torchvision gives on PIL images."""
    for step in pre:
        image = step.apply(image, torch.zeros(1, 0))
    return np.asarray(image)


# -- Messages ----------------------------------------------------------------------------------------------------------


def reason(error: BaseException, path: Path) -> str:
    """Return in one line why an image file cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).replace(f" {str(path)!r}", "").replace(str(path), "it")
    return " ".join(text.split()) or type(error).__name__


def depth_line(depths: Sequence[int], count: int) -> str | None:
    """Return one line on the ranges that were assumed for some of `count` images, or None if all have 8 bits.

    Args:
        depths: the numbers of bits that `read_image` appended.
    """
    if not depths:
        return None
    kinds = [f"{n} of {bits} bits (0..{2**bits - 1})" for bits, n in sorted(Counter(depths).items())]
    line = f"{len(depths)} of {count} images are not stored with 8 bits and were scaled to 8 bits: {', '.join(kinds)}"
    if len(kinds) > 1:
        line += "; this scales their brightness differently: to keep it comparable, save all of them with 8 bits"
    return line


def unreadable_lines(unreadable: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a log line for each of the first `LISTED` unreadable files, given as (name, reason), and one for the rest."""
    for file, why in unreadable[:LISTED]:
        yield f"cannot be read: {printable(file)}: {printable(why)}"
    if len(unreadable) > LISTED:
        yield f"cannot be read: {len(unreadable) - LISTED} more"


def printable(text: str) -> str:
    """Return a file name or other text without line breaks and control characters, so that it fits into a line."""
    return text if text.isprintable() else ascii(text)
