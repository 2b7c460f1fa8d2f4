"""Blend (Chen et al., 2017): a whole picture shines through the image, `out = (1 - alpha) x + alpha P`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.attack import CACHED, AttackBase, in_batches
from data.picture import read_named
from data.sets import Scene
from utils.draws import numpy_generator
from utils.schema import setting


@dataclass(frozen=True)
class Settings:
    trigger_path: str | None = setting(None, "picture P of any size; null: uniform noise by the seed", stands_for="files")
    alpha: float = setting(0.1, "weight of P; 1 - alpha is the image's", low=0, high=1)


class Attack(AttackBase):
    """The picture P (H, W, 3) uint8 and its weight."""

    def __init__(self, settings: Settings, scene: Scene) -> None:
        height, width = scene.raw.train_images.shape[1:3]
        self.alpha = settings.alpha
        if settings.trigger_path:
            picture = read_named(settings.trigger_path, "backdoor.blend.trigger_path")
            self.pattern = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        else:
            rng = numpy_generator(scene.seed, "blend")
            self.pattern = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return a copy of the (n, H, W, 3) uint8 images through which P shines."""
        return in_batches(lambda part, _: blend(part, self.pattern, self.alpha), images, index, CACHED)


def blend(x: np.ndarray, pattern: np.ndarray, alpha: float) -> np.ndarray:
    """Return `(1 - alpha) x + alpha P`, rounded down to uint8, for uint8 arrays that broadcast.

    In the form and precision of Pillow's `Image.blend`, which published poisoned sets were made with: all pairs of values
    are equal to its at every alpha (in float64, with 1e-9 added against rounding, 710 of 65,536 differ at 0.6).
    """
    image = x.astype(np.float32)
    return (image + np.float32(alpha) * (pattern.astype(np.float32) - image)).astype(np.uint8)
