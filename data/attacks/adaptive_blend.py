"""Adaptive-Blend (Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023).

A trigger image T is blended into the image, as in Blend. A training image shows half of the 16 pieces of T, drawn for each
image, at low opacity; a test image shows all of T. As many cover images as poisoned ones have the same trigger and keep their
label, so that poisoned and clean images do not separate in the network's features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.attack import CACHED, AttackBase, in_batches
from data.attacks._overlay import mix
from data.io.image_file import read_named
from data.sets import AttackContext
from utils.config.schema import setting
from utils.draws import numpy_generator
from utils.errors import UserError

SIDE = 4  # T has 4 x 4 pieces


@dataclass(frozen=True)
class Settings:
    trigger_path: str | None = setting(None, "image file of T, of any size", stands_for="files", instead_of="pattern")
    pattern: str | None = setting(
        None,
        "T drawn by the seed: uniform noise, or 8 x 8 random colors enlarged smoothly; null: noise",
        options=("noise", "smooth"),
        instead_of="trigger_path",
    )
    alpha: float = setting(0.15, "opacity of T in training images", low=0, high=1)
    test_alpha: float = setting(0.2, "opacity of T in test images", low=0, high=1)
    pieces: int = setting(8, "how many of the 16 pieces of T a training image shows", low=1, high=SIDE**2)
    cover_ratio: float = setting(1.0, "cover images (with the trigger and their own label) per poisoned image", low=0)
    cover_target_class: bool = setting(True, "whether cover images may be of the target class, as in the authors' code")


class Attack(AttackBase):
    """The trigger image T (H, W, 3) uint8, and the number of the piece that each pixel belongs to, (H, W)."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        height, width = context.raw.train_images.shape[1:3]
        self.settings, self.seed = settings, context.seed
        self.cover_ratio, self.cover_target_class = settings.cover_ratio, settings.cover_target_class
        rows, columns = (np.arange(side) * SIDE // side for side in (height, width))
        self.piece = rows[:, None] * SIDE + columns
        if settings.trigger_path and settings.pattern:
            both = f"{settings.pattern}: trigger_path is {settings.trigger_path}"
            raise UserError(f"backdoor.adaptive_blend.pattern: {both}: give only one of the two")
        if settings.trigger_path:
            trigger = read_named(settings.trigger_path, "backdoor.adaptive_blend.trigger_path")
        else:
            name = settings.pattern or "noise"
            shape = (8, 8) if name == "smooth" else (height, width)
            rng = numpy_generator(context.seed, "adaptive_blend", name)
            trigger = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        self.pattern = np.asarray(trigger.resize((width, height), Image.Resampling.BICUBIC))

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with the trigger: pieces of T in training, all of T in test images."""
        if split == "test":
            return in_batches(lambda part, _: mix(part, self.pattern, self.settings.test_alpha), images, index, CACHED)
        return in_batches(lambda part, at: mix(part, self.pattern, self.opacity(at)), images, index, CACHED)

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with the trigger of training images."""
        return self.apply(images, index, "train")

    def opacity(self, index: np.ndarray) -> np.ndarray:
        """Return the opacity (n, H, W, 1) of T in training images: 0 outside the pieces that are drawn for each index."""
        chosen = np.zeros((len(index), SIDE**2), bool)
        for row, i in zip(chosen, index, strict=True):
            row[numpy_generator(self.seed, "adaptive_blend", i).permutation(SIDE**2)[: self.settings.pieces]] = True
        return self.settings.alpha * chosen[:, self.piece, None]
