"""Pictures that the user names as triggers: read, or refused in one line."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from utils.errors import UserError

FORMATS = ("PNG", "BMP", "JPEG", "WEBP", "PPM")  # none runs a program


def read_picture(name: str, key: str) -> Image.Image:
    """Read a picture as RGB of 8 bits; a relative path may also start at the project's folder.

    Args:
        key: the setting that names it, for the errors.
    Raises:
        UserError: there is no such file, or it is no picture of 8 bits.
    """
    path = Path(name).expanduser()
    if not path.exists() and not path.is_absolute():
        path = Path(__file__).resolve().parents[1] / name
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.mode.startswith(("I", "F")):  # Pillow would cut 16 bits off at 255, most of it white
                raise ValueError("more than 8 bits a channel")
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{name}: no such trigger picture: mend {key}, or leave it out for the built-in trigger") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{name}: is no readable picture ({what}): give {key} a PNG") from None
