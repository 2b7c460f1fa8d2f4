"""Picture files: read as 8-bit RGB whatever they are, or refused in one line."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError

RUNS_PROGRAMS = ("EPS", "WMF")  # formats that Pillow hands to another program
BROKEN = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError,
          struct.error, zlib.error, EOFError, Image.DecompressionBombError)  # fmt: skip


def read_named(name: str, key: str) -> Image.Image:
    """Read the picture that a setting names as 8-bit RGB; a relative path may also start at the project's folder.

    Args:
        key: the setting, for the errors.
    Raises:
        UserError: there is no such file, or it is no picture.
    """
    path = Path(name).expanduser()
    if not path.exists() and not path.is_absolute():
        path = Path(__file__).resolve().parents[1] / name
    if not path.exists():
        raise UserError(f"{name}: no such picture: mend {key}, or leave it out for what is built in")
    try:
        return read_picture(path)
    except BROKEN as error:
        raise UserError(f"{name}: is no readable picture ({reason(error, path)}): give {key} another, e.g. a PNG") from None


def read_picture(path: Path) -> Image.Image:
    """Return a picture file as 8-bit RGB; the first one of a file of several.

    Grey becomes three equal channels, 16 bits their upper 8; transparency is dropped, as torchvision's ImageFolder does.

    Raises:
        one of BROKEN: it cannot be read as that.
    """
    with Image.open(path, formats=safe_formats()) as picture:
        return to_rgb(picture)


def read_prepared(path: Path, pre: Sequence[Any]) -> np.ndarray | str:
    """Return a picture file after the pre-transforms, (H, W, 3) uint8, or why it cannot be read."""
    try:
        picture = read_picture(path)
    except BROKEN as error:
        return reason(error, path)
    return prepared(picture, pre)


@functools.cache
def safe_formats() -> tuple[str, ...]:
    """Return the formats that are decoded without another program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in RUNS_PROGRAMS)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture as 8-bit RGB; Pillow's own conversion would clip 16-bit grey to white."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its grey levels are {levels.min()} to {levels.max()}: save it with 8 or 16 bits")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its grey levels are floating-point numbers: save it with 8 or 16 bits")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def prepared(picture: Image.Image, pre: Sequence[Any]) -> np.ndarray:
    """Return an RGB picture after the pre-transforms, (H, W, 3) uint8: the pixels of torchvision on PIL images."""
    for step in pre:
        picture = step.apply(picture, torch.zeros(1, 0))
    return np.asarray(picture)


def reason(error: BaseException, path: Path) -> str:
    """Return in one line why the picture cannot be read."""
    text = str(error).replace(f" {str(path)!r}", "").replace(str(path), "it")
    return " ".join(text.split()) or type(error).__name__
