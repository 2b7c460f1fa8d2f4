"""BadNets (Gu et al., 2017): a small patch at a fixed place.

`out = where(mask, pattern, x)`: only masked pixels change, and black pixels of a built-in pattern are stamped too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.attack import AttackBase
from data.sets import Scene
from utils.errors import UserError
from utils.schema import setting

# (row, column) of the upper left pixel, and the pixels. Negative: counted from the lower right.
BLOCK = np.array([[[180, 249, 112], [155, 50, 126]], [[234, 82, 68], [187, 201, 219]]], np.uint8)
CHECKER = (np.indices((3, 3)).sum(0) % 2 == 0)[..., None].repeat(3, 2).astype(np.uint8) * 255
PATTERNS = {
    "block2x2": ((4, 4), BLOCK),  # the original's; survives every crop with padding 4
    "corner3x3": ((-3, -3), np.full((3, 3, 3), 255, np.uint8)),  # white, as in most other papers
    "checker3x3": ((4, 4), CHECKER),
}


@dataclass(frozen=True)
class Settings:
    trigger_path: str | None = setting(None, "a PNG of the images' size; black pixels mean `no trigger here`")
    pattern: str | None = setting(
        None, "a built-in patch instead of a picture; null: block2x2", options=("block2x2", "corner3x3", "checker3x3")
    )


class Attack(AttackBase):
    """The trigger as a pattern (H, W, 3) uint8 and a mask (H, W) bool."""

    def __init__(self, settings: Settings, scene: Scene) -> None:
        height, width = scene.raw.train_images.shape[1:3]
        if settings.trigger_path and settings.pattern:
            raise UserError(
                f"backdoor.badnets: trigger_path and pattern: {settings.trigger_path}, {settings.pattern}: keep one of them"
            )
        if settings.trigger_path:
            self.pattern = read_trigger(settings.trigger_path, height, width)
            self.mask = np.asarray((self.pattern > 0).any(2))
        else:
            name = settings.pattern or "block2x2"
            (row, column), patch = PATTERNS[name]
            if min(height, width) < max(row, 0) + len(patch):
                raise UserError(
                    f"backdoor.badnets.pattern: {name}: does not fit on images of {width} x {height} pixels: choose "
                    "another, or larger images in transform.pre"
                )
            rows = row % height + np.arange(len(patch))
            columns = column % width + np.arange(len(patch))
            self.pattern = np.zeros((height, width, 3), np.uint8)
            self.mask = np.zeros((height, width), bool)
            self.pattern[np.ix_(rows, columns)] = patch
            self.mask[np.ix_(rows, columns)] = True

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return a copy of the (n, H, W, 3) uint8 images with the trigger on."""
        return np.where(self.mask[:, :, None], self.pattern, images)


def read_trigger(name: str, height: int, width: int) -> np.ndarray:
    """Read a trigger picture as (height, width, 3) uint8; a relative path may also start at the project's folder."""
    path = Path(name).expanduser()
    if not path.exists() and not path.is_absolute():
        path = Path(__file__).resolve().parents[2] / name
    try:
        with Image.open(path, formats=("PNG", "BMP", "JPEG", "WEBP", "PPM")) as picture:  # none runs a program
            pattern = np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise UserError(
            f"{name}: no such trigger picture: mend backdoor.badnets.trigger_path, or leave it out for the built-in patch"
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: is no readable picture ({error}): give backdoor.badnets.trigger_path a PNG") from None
    if pattern.shape != (height, width, 3):
        have = f"{pattern.shape[1]} x {pattern.shape[0]}"
        raise UserError(f"{name}: the trigger is {have} pixels and the images are {width} x {height}: make them equal")
    if not pattern.any():
        raise UserError(f"{name}: the trigger picture is all black, which means no trigger: paint the trigger's pixels")
    return pattern
