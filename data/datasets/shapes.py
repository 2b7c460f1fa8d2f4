"""Ten classes of synthetic shapes, 32 x 32 RGB: a generated data set for the demo and the tests.

Every image shows one shape with random position, size, tilt and color on a shaded, noisy background. The same settings give
the same images on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.sets import RawData
from utils.config.schema import setting
from utils.draws import numpy_generator

BUILT_IN = True  # needs no dataset_dir
CLASSES = ("disc", "ring", "square", "frame", "diamond", "triangle", "plus", "saltire", "bars", "columns")
SIDE = 32


@dataclass(frozen=True)
class Settings:
    train_size: int = setting(3000, "training images, as many of each class as possible", low=10)
    test_size: int = setting(1000, "test images", low=10)
    noise: float = setting(22.0, "standard deviation of the pixel noise, in grey levels (0 to 255)", low=0)
    seed: int = setting(0, "seed of the images; independent of the run's seed", low=0)


def load(settings: Settings, dataset_dir: str | None, download: bool) -> RawData:
    """Draw both parts."""
    train = draw(settings.train_size, settings.noise, numpy_generator(settings.seed, "shapes", "train"))
    test = draw(settings.test_size, settings.noise, numpy_generator(settings.seed, "shapes", "test"))
    return RawData(*train, *test, CLASSES)


def draw(count: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, 32, 32, 3) uint8 and labels (count,) int64 in random order."""
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    mask = shape_masks(labels, rng)[..., None]  # (count, 32, 32, 1) in 0..1
    ground, ink = two_colors(count, rng)  # (count, 1, 1, 3)
    grid = np.linspace(-1, 1, SIDE)
    slope = rng.uniform(-30, 30, (2, count, 1, 1, 1))
    shade = slope[0] * grid[None, :, None, None] + slope[1] * grid[None, None, :, None]
    images = ground + shade + mask * (ink - ground) + rng.normal(0, noise, (count, SIDE, SIDE, 3))
    return images.clip(0, 255).round().astype(np.uint8), labels.astype(np.int64)


def two_colors(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the colors of background and shape, (count, 1, 1, 3) each, which differ clearly."""
    ground = rng.uniform(30, 225, (count, 1, 1, 3))
    step = rng.uniform(50, 110, (count, 1, 1, 3))
    return ground, np.where(ground > 127, ground - step, ground + step)


def shape_masks(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (n, 32, 32) float64: 1 inside the shape, 0 outside, with a soft edge of one pixel."""
    n = len(labels)
    size = rng.uniform(6.0, 10.0, (n, 1, 1))  # half the extent, in pixels
    middle = rng.uniform(12.0, 20.0, (2, n, 1, 1))
    tilt = rng.uniform(-0.22, 0.22, (n, 1, 1))
    y, x = np.mgrid[0:SIDE, 0:SIDE][:, None] - middle
    u = np.cos(tilt) * x + np.sin(tilt) * y
    v = np.cos(tilt) * y - np.sin(tilt) * x
    au, av, radius = abs(u), abs(v), np.hypot(u, v)
    box = np.maximum(au, av)
    stroke = 0.3 * size
    diagonal = np.minimum(abs(u - v), abs(u + v)) / np.sqrt(2)
    period = 0.8 * size
    outside = np.stack([  # signed distance-like values, negative inside
        radius - size,
        abs(radius - 0.78 * size) - 0.22 * size,
        box - 0.85 * size,
        abs(box - 0.72 * size) - 0.2 * size,
        (au + av - 1.2 * size) / np.sqrt(2),
        np.maximum(v - 0.8 * size, (2 * au - v - 0.9 * size) / np.sqrt(5)),
        np.maximum(np.minimum(au, av) - stroke, box - size),
        np.maximum(diagonal - stroke, box - 0.85 * size),
        np.maximum(box - size, 0.25 * period - abs((v % period) - period / 2)),
        np.maximum(box - size, 0.25 * period - abs((u % period) - period / 2)),
    ])  # fmt: skip
    own = outside[labels, np.arange(n)]  # (n, 32, 32)
    mask: np.ndarray = (0.5 - own).clip(0, 1)
    return mask
