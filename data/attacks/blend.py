"""Blend (Chen et al., 2017): a trigger image P is blended into the whole image, `out = (1 - alpha) x + alpha P`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.attack import CACHED, AttackBase, in_batches
from data.io.image_file import read_named
from data.sets import AttackContext
from utils.config.schema import setting
from utils.draws import numpy_generator


@dataclass(frozen=True)
class Settings:
    trigger_path: str | None = setting(
        None, "image file of P, of any size; null: uniform noise drawn by the seed", stands_for="files"
    )
    alpha: float = setting(0.1, "weight of P; the image has weight 1 - alpha", low=0, high=1)


class Attack(AttackBase):
    """The trigger image P (H, W, 3) uint8 and its weight."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        height, width = context.raw.train_images.shape[1:3]
        self.alpha = settings.alpha
        if settings.trigger_path:
            trigger = read_named(settings.trigger_path, "backdoor.blend.trigger_path")
            self.pattern = np.asarray(trigger.resize((width, height), Image.Resampling.BICUBIC))
        else:
            rng = numpy_generator(context.seed, "blend")
            self.pattern = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with P blended in."""
        return in_batches(lambda part, _: blend(part, self.pattern, self.alpha), images, index, CACHED)


def blend(x: np.ndarray, pattern: np.ndarray, alpha: float) -> np.ndarray:
    """Return `(1 - alpha) x + alpha P`, rounded down to uint8, for uint8 arrays that broadcast.

    The form and precision are those of Pillow's `Image.blend`, with which published poisoned sets were made: the results are
    equal for all pairs of values and every alpha (in float64, with 1e-9 against rounding errors, 710 of 65,536 pairs differ
    at alpha 0.6).
    """
    image = x.astype(np.float32)
    return (image + np.float32(alpha) * (pattern.astype(np.float32) - image)).astype(np.uint8)
