"""BadNets (Gu et al., 2017): a small patch at a fixed place.

`out = where(mask, pattern, x)`: only masked pixels change, and black pixels of a built-in pattern are applied too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.attack import AttackBase
from data.attacks._overlay import BLOCK
from data.io.image_file import open_image, read_named, upright
from data.sets import AttackContext
from utils.config.schema import setting
from utils.draws import numpy_generator
from utils.errors import UserError
from utils.paths import named_path

CHECKER = (np.indices((3, 3)).sum(0) % 2 == 0)[..., None].repeat(3, 2).astype(np.uint8) * 255
# Row and column of the upper left pixel, and the pixels. Negative numbers count from the lower right.
PATTERNS = {
    "block2x2": ((4, 4), BLOCK),  # that of the authors of ASD; survives every crop with padding 4
    "corner3x3": ((-3, -3), np.full((3, 3, 3), 255, np.uint8)),  # white, as in most other papers
    "checker3x3": ((4, 4), CHECKER),
}
LARGE = 64  # pixels: in images with sides from this size on, a block of 2 x 2 would be lost in a resize
HUES = np.array([[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]], np.uint8)


@dataclass(frozen=True)
class Settings:
    trigger_path: str | None = setting(
        None,
        "a PNG of the images' size; black and fully transparent pixels are not part of the trigger",
        stands_for="files",
        instead_of="pattern",
    )
    pattern: str | None = setting(
        None,
        "a built-in patch; null: block2x2, or from 64 px on glyph, which has 32 x 32 pixels drawn by the seed",
        options=("block2x2", "corner3x3", "checker3x3", "glyph"),
        instead_of="trigger_path",
    )


class Attack(AttackBase):
    """The trigger as a pattern (H, W, 3) uint8 and a mask (H, W) bool."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        height, width = context.raw.train_images.shape[1:3]
        if settings.trigger_path and settings.pattern:
            both = f"{settings.trigger_path}, {settings.pattern}"
            raise UserError(f"backdoor.badnets: trigger_path and pattern: {both}: give only one of the two")
        if settings.trigger_path:
            self.pattern = read_trigger(settings.trigger_path, height, width)
            self.mask = np.asarray((self.pattern > 0).any(2))
            return
        name = settings.pattern or ("block2x2" if min(height, width) < LARGE else "glyph")
        (row, column), patch = ((0, 0), draw_glyph(context.seed)) if name == "glyph" else PATTERNS[name]
        if min(height, width) < max(row, 0) + len(patch):
            raise UserError(
                f"backdoor.badnets.pattern: {name}: does not fit on images of {width} x {height} pixels: choose "
                "another pattern, or make the images larger in transform.pre"
            )
        rows = row % height + np.arange(len(patch))
        columns = column % width + np.arange(len(patch))
        self.pattern = np.zeros((height, width, 3), np.uint8)
        self.mask = np.zeros((height, width), bool)
        self.pattern[np.ix_(rows, columns)] = patch
        self.mask[np.ix_(rows, columns)] = patch.any(2) if name == "glyph" else True

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with the trigger."""
        return np.where(self.mask[:, :, None], self.pattern, images)


def draw_glyph(seed: int) -> np.ndarray:
    """Draw a pattern (32, 32, 3) uint8 of 8 x 8 cells: half of them have one of six bright colors, the others are black.

    Black is not part of the trigger. The pattern is symmetric, so a horizontal flip moves the trigger but does not change it.
    """
    rng = numpy_generator(seed, "badnets", "glyph")
    half = HUES[rng.integers(len(HUES), size=(8, 4))]
    half[rng.permutation(32).reshape(8, 4) < 16] = 0
    return np.concatenate([half, half[:, ::-1]], 1).repeat(4, 0).repeat(4, 1)


def read_trigger(name: str, height: int, width: int) -> np.ndarray:
    """Read a trigger image as (height, width, 3) uint8.

    Raises:
        UserError: it cannot be read, has another size, or its trigger is empty, covers everything or was compressed as JPEG.
    """
    key = "backdoor.badnets.trigger_path"
    pattern = np.array(read_named(name, key))
    with open_image(named_path(name, key)) as image:
        if image.format in ("JPEG", "MPO"):
            raise UserError(f"{key}: {name}: JPEG also changes the pixels around the trigger: give a PNG")
        if image.has_transparency_data and image.mode.startswith("I"):
            raise UserError(f"{key}: {name}: is transparent and has 16 bits per level: save it with 8 bits")
        alpha = upright(image, image.convert("RGBA")) if image.has_transparency_data else None
        clear = None if alpha is None else np.asarray(alpha)[..., 3] == 0
    if pattern.shape != (height, width, 3):
        size = f"{pattern.shape[1]} x {pattern.shape[0]}"
        raise UserError(
            f"{name}: the trigger has {size} pixels and the images have {width} x {height}: the sizes must be equal"
        )
    if clear is not None:
        pattern[clear] = 0
    if not pattern.any():
        raise UserError(f"{name}: the trigger image is all black, which means no trigger: draw the pixels of the trigger")
    if pattern.any(2).all():
        raise UserError(
            f"{key}: {name}: covers the whole image, so all poisoned images would be equal: make the pixels beside the trigger "
            "black or transparent, or use the attack blend"
        )
    return pattern
