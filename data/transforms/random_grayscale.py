"""Conversion to grey with probability p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.config.schema import setting

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    p: float = setting(0.1, "probability", low=0, high=1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 1): 1 where the image becomes grey."""
        return (torch.rand(count, 1, generator=generator, dtype=torch.float64) < self.p).double()

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Convert the drawn images of uint8 (B, 3, H, W) to grey, with three equal channels."""
        grey = F.rgb_to_grayscale(images, num_output_channels=3)
        return torch.where(draws[:, :, None, None] > 0, grey, images)
