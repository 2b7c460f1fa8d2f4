"""Adaptive-Patch (Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023).

A training image has one of four patches, at low opacity; a test image has two of them, opaque, one on top of the other. Twice
as many cover images as poisoned ones have the trigger of training images and keep their label.

The authors' patches are image files, which are not shipped here. The patches below have their places and shapes; their colors
are drawn by the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.attack import CACHED, AttackBase, in_batches
from data.attacks._overlay import Patch, corners, enlarge, mix, patch_pixel
from data.sets import AttackContext
from utils.config.schema import setting
from utils.draws import numpy_generator
from utils.errors import UserError

LEAST = 14  # least side of an image, in pixels of a patch: the disc and its margin
TESTED = {"squares": ("two_squares", "corners"), "disc": ("disc", "large_square")}  # the lower patch and the one on top


@dataclass(frozen=True)
class Settings:
    opacities: tuple[float, ...] = setting(
        (0.5, 0.2, 0.5, 0.3),
        "opacity in training images of the 5 x 5 square, the disc, the four corners, the 8 x 8 square",
        low=0,
        high=1,
        count=4,
    )
    test: str = setting(
        "squares",
        "patches of test images; squares: the 5 x 5 square in both lower corners, under the four corners (the authors' choice "
        "for CIFAR-10); disc: the disc, under the 8 x 8 square (for GTSRB)",
        options=tuple(TESTED),
    )
    cover_ratio: float = setting(2.0, "cover images (with the trigger and their own label) per poisoned image", low=0)
    cover_target_class: bool = setting(True, "whether cover images may be of the target class, as in the authors' code")


class Attack(AttackBase):
    """The patches of training images, in the order of their opacities, and the trigger of test images."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        patches = build_patches(context.seed, *context.raw.train_images.shape[1:3])
        self.seed = context.seed
        self.cover_ratio, self.cover_target_class = settings.cover_ratio, settings.cover_target_class
        four = [patches[name] for name in ("square", "disc", "corners", "large_square")]
        self.patterns = np.stack([pattern for pattern, _ in four])  # (4, H, W, 3)
        masks = np.stack([mask for _, mask in four])[..., None]
        self.opacities = np.array(settings.opacities)[:, None, None, None] * masks  # (4, H, W, 1)
        (lower, lower_mask), (upper, upper_mask) = (patches[name] for name in TESTED[settings.test])
        self.test_pattern = np.where(upper_mask[..., None], upper, lower)
        self.test_mask = lower_mask | upper_mask

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8: training images with the patch drawn for the index, or test images."""
        if split == "test":
            return np.where(self.test_mask[..., None], self.test_pattern, images)
        return in_batches(self.patched, images, index, CACHED)

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with the trigger of training images."""
        return self.apply(images, index, "train")

    def patched(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8, each with the patch that is drawn for its index."""
        drawn = [numpy_generator(self.seed, "adaptive_patch", i).integers(4) for i in index]
        return mix(images, self.patterns[drawn], self.opacities[drawn])


def build_patches(seed: int, height: int, width: int) -> dict[str, Patch]:
    """Return the patches by name, in the scale of CLB's corners (`patch_pixel`)."""
    unit = patch_pixel(height, width)
    if min(height, width) < LEAST * unit:
        raise UserError(
            f"backdoor.adaptive_patch: images of {width} x {height} pixels: the patches need at least {LEAST * unit}: make the "
            "images larger in transform.pre"
        )
    rng = numpy_generator(seed, "adaptive_patch", "colors")
    small, rings, large = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 5, 3), (3, 3), (8, 8, 3)))
    distance = ((np.indices((13, 13)) - 6) ** 2).sum(0)  # squared distance from the disc's center
    disc = rings[(distance > 4).astype(int) + (distance > 18)]

    def place(*patches: tuple[np.ndarray, int, int], inside: np.ndarray | None = None) -> Patch:
        """Place (patch, row, column) tuples; rows and columns are in patch pixels, negative ones count from the lower right."""
        pattern, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
        for patch, row, column in patches:
            side = len(patch) * unit
            rows = slice(row * unit % height, row * unit % height + side)
            columns = slice(column * unit % width, column * unit % width + side)
            pattern[rows, columns] = enlarge(patch, unit)
            mask[rows, columns] = True if inside is None else enlarge(inside, unit)
        return pattern, mask

    return {
        "square": place((small, -5, -5)),
        "two_squares": place((small, -5, -5), (small, -5, 0)),
        "disc": place((disc, 1, -14), inside=distance <= 42),  # radius 6.5
        "corners": corners(height, width),
        "large_square": place((large, -11, -11)),
    }
