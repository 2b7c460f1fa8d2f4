"""Resize to a length of the shorter side, or to a height and width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.config.schema import setting

LONGEST = 2**15  # pixels of a side, also of the longer one, which follows: a strip of 1 x 65,000 pixels would fill the memory
PLACES = ("transform.pre", "transform.train.primary", "transform.test.primary")


@dataclass(frozen=True)
class Settings:
    size: int | tuple[int, ...] = setting(256, "shorter side, or [height, width], in pixels", low=1, high=LONGEST, count=2)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 0): nothing is random."""
        return torch.zeros(count, 0, dtype=torch.float64)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Resize uint8 (B, 3, H, W), bilinear with antialiasing as on PIL images."""
        size = [self.size] if isinstance(self.size, int) else list(self.size)
        height, width = F.get_size(images)
        if isinstance(self.size, int) and max(height, width) * self.size // min(height, width) > LONGEST:
            raise ValueError(f"{width} x {height} pixels: with a shorter side of {self.size} the other one is over {LONGEST}")
        return F.resize(images, size, antialias=True)
