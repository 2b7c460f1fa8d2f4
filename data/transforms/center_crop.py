"""Crop of the middle of the image, as torchvision's CenterCrop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.config.schema import setting

PLACES = ("transform.pre", "transform.train.primary", "transform.test.primary")
TO_ONE_SIZE = "{resize: {size: 256}, center_crop: {size: 224}}"


@dataclass(frozen=True)
class Settings:
    size: int | tuple[int, ...] = setting(224, "side, or [height, width], in pixels", low=1, count=2)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 0): nothing is random."""
        return torch.zeros(count, 0, dtype=torch.float64)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop uint8 (B, 3, H, W) to the size."""
        size = [self.size, self.size] if isinstance(self.size, int) else list(self.size)
        return F.center_crop(images, size)
