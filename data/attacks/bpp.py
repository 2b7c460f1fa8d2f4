"""BPP (Wang, Zhai and Ma, "BppAttack", CVPR 2022): the trigger is a reduced color depth.

Every channel is quantized to `squeeze_num` levels, optionally with Floyd-Steinberg dithering. Cover images, the paper's
negative samples, have the quantization residual of another image and keep their label, so that the network does not learn
such noise as the trigger.

In the published attack the attacker trains the network and alters other images in every batch. This is its static form:
poisoned and cover images are chosen and altered once, and the victim augments them like all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.attack import CACHED, AttackBase, in_batches
from data.sets import AttackContext
from utils.config.schema import setting
from utils.draws import numpy_generator

PIXELS = 2**20  # dithered at a time (24 MB of float64): the loop takes as long for few images as for many


@dataclass(frozen=True)
class Settings:
    squeeze_num: int = setting(8, "levels of each channel; 256 would be all", low=2, below=256)
    dithering: bool = setting(False, "diffuse the quantization errors (Floyd-Steinberg)")
    cover_ratio: float = setting(1.0, "cover images (with another image's quantization residual) per poisoned image", low=0)


class Attack(AttackBase):
    """The quantization, and the training images, whose residuals are added to cover images."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        self.levels, self.dithering = settings.squeeze_num, settings.dithering
        self.cover_ratio, self.seed, self.train_images = settings.cover_ratio, context.seed, context.raw.train_images

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return quantized copies of images (n, H, W, 3) uint8."""
        if self.dithering:
            return in_batches(lambda part, _: dither(part, self.levels), images, index, PIXELS)
        return quantize(images, self.levels)

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8, each with the residual of another training image added."""
        return in_batches(self.add_residual, images, index, PIXELS if self.dithering else CACHED)

    def add_residual(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return `clip(x + q(z) - z, 0, 255)` for images x (n, H, W, 3) uint8, z being the training images of `donors`."""
        z = self.train_images[self.donors(index)]
        residual = self.apply(z, index, "train").astype(np.int16) - z
        return (images + residual).clip(0, 255).astype(np.uint8)

    def donors(self, index: np.ndarray) -> np.ndarray:
        """Return (n,) int64: for each training image the index of another one, drawn by the seed and its own index."""
        count = len(self.train_images)
        steps = [numpy_generator(self.seed, "bpp", "cover", i).integers(1, max(count, 2)) for i in index]
        return (index + np.array(steps, np.int64)) % count


def quantize(images: np.ndarray, levels: int) -> np.ndarray:
    """Map every uint8 value, in any shape, to the nearest of `levels` equidistant levels, rounded to uint8."""
    return np.rint(nearest(np.arange(256.0), levels)).astype(np.uint8)[images]


def nearest(values: np.ndarray, levels: int) -> np.ndarray:
    """Return the nearest level, a multiple of 255 / (levels - 1) in 0..255, of each float64 value."""
    return np.rint(values * (levels - 1) / 255).clip(0, levels - 1) * 255 / (levels - 1)


def dither(images: np.ndarray, levels: int) -> np.ndarray:
    """Return images (n, H, W, 3) uint8, quantized with Floyd-Steinberg error diffusion, every row from left to right.

    Of a pixel's error 7/16 goes to the next pixel of the row, and 3/16, 5/16 and 1/16 to the three below. So a pixel (y, x)
    depends only on pixels with a smaller x + 2y, and all pixels with the same x + 2y, of all images, are quantized in one
    step. A pixel receives errors in the same order as in a loop over rows and columns, so the results are equal bit for bit.
    """
    n, height, width = images.shape[:3]
    values = np.zeros(
        (height + 1, width + 2, n, 3)
    )  # one more column on each side and row below, for errors that leave the image
    values[:height, 1:-1] = images.transpose(1, 2, 0, 3)
    for t in range(width + 2 * height - 2):
        y = np.arange(max(0, (t - width + 2) // 2), min(height, t // 2 + 1))
        x = t - 2 * y + 1
        old = values[y, x]  # (k, n, 3)
        values[y, x] = nearest(old, levels)
        error = old - values[y, x]
        values[y + 1, x - 1] += error * (3 / 16)
        values[y + 1, x] += error * (5 / 16)
        values[y + 1, x + 1] += error * (1 / 16)
        values[y, x + 1] += error * (7 / 16)
    return np.rint(values[:height, 1:-1]).astype(np.uint8).transpose(2, 0, 1, 3)
