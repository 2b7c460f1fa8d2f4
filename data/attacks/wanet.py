"""WaNet (Nguyen and Tran, ICLR 2021): the trigger is a smooth warp of the image by fractions of a pixel.

Random shifts at k x k control points, interpolated bicubically over the image, determine where each pixel is sampled. Cover
images are sampled with an additional jitter and keep their label, so that the network learns this warp and no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.attack import CACHED, AttackBase, in_batches
from data.sets import AttackContext
from utils.config.schema import setting
from utils.draws import numpy_generator

LARGE = 128  # pixels: from this side on the defaults are those for 224 px


@dataclass(frozen=True)
class Settings:
    k: int | None = setting(None, "control points of the warp per side; null: 4, or from 128 px on 32", low=1)
    s: float | None = setting(None, "their mean shift along each axis, in half pixels; null: 0.5, or from 128 px on 1", low=0)
    cover_ratio: float = setting(0.0, "cover images (warped with a jitter) per poisoned image; the authors use 2", low=0)


class Attack(AttackBase):
    """The sampling grid (H, W, 2) float64: x and y in -1..1, where each pixel is sampled.

    The grid is not kept as an asset: computing it takes milliseconds, and it depends on seed, k, s and image size only, so
    test.py, a resumed run and another machine have the same grid without a file that could be lost.
    """

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        height, width = context.raw.train_images.shape[1:3]
        large = min(height, width) >= LARGE
        k = settings.k or (32 if large else 4)
        s = settings.s if settings.s is not None else (1.0 if large else 0.5)
        self.cover_ratio, self.seed = settings.cover_ratio, context.seed
        self.pixel = 1 / torch.tensor([width, height], dtype=torch.float64)
        shifts = torch.from_numpy(numpy_generator(context.seed, "wanet").uniform(-1, 1, (1, 2, k, k)))
        field = F.interpolate(shifts / shifts.abs().mean(), (height, width), mode="bicubic", align_corners=True)[0]
        self.grid = (identity(height, width) + s * field.permute(1, 2, 0) * self.pixel).clamp(-1, 1)

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return warped copies of images (n, H, W, 3) uint8."""
        return in_batches(lambda part, _: sample(part, self.grid.expand(len(part), -1, -1, -1)), images, index, CACHED)

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8, warped with a jitter of up to half a pixel."""
        return in_batches(lambda part, at: sample(part, self.jittered(at)), images, index, CACHED)

    def jittered(self, index: np.ndarray) -> Tensor:
        """Return the grids (n, H, W, 2) of cover images, each with a jitter that is drawn by the seed and its index."""
        shape = tuple(self.grid.shape)
        draws = [numpy_generator(self.seed, "wanet", "cover", i).uniform(-1, 1, shape) for i in index]  # 12 us each at 32 px
        return (self.grid + torch.from_numpy(np.stack(draws)) * self.pixel).clamp(-1, 1)


def identity(height: int, width: int) -> Tensor:
    """Return the grid (H, W, 2) float64 that samples every pixel at its own position."""
    y, x = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def sample(images: np.ndarray, grid: Tensor) -> np.ndarray:
    """Return images (n, H, W, 3) uint8, sampled bilinearly at the positions of a grid (n, H, W, 2).

    In float64: in float32 about one value in 20,000 is rounded to another level, and which ones depends on the machine.
    """
    pixels = torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2)  # (n, 3, H, W)
    sampled = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return sampled.round_().to(torch.uint8).permute(0, 2, 3, 1).numpy()
