"""Gaussian blur of a random width with probability p (SimCLR's augmentation)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.schema import setting


@dataclass(frozen=True)
class Settings:
    sigma: tuple[float, ...] = setting((0.1, 2.0), "least and greatest width in pixels", above=0)
    p: float = setting(0.5, "probability", low=0, high=1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 2): whether to act, and sigma in pixels."""
        unit = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        sigma = self.sigma[0] + unit[:, 1] * (self.sigma[-1] - self.sigma[0])
        return torch.stack([(unit[:, 0] < self.p).double(), sigma], 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Blur the chosen ones of uint8 (B, 3, H, W)."""
        widest = (min(images.shape[-2:]) - 1) // 2  # reflection at the border allows no more
        out = []
        for image, (act, sigma) in zip(images, draws.tolist(), strict=True):
            kernel = 2 * min(math.ceil(3 * sigma), widest) + 1
            out.append(F.gaussian_blur(image, [kernel, kernel], [sigma, sigma]) if act else image)
        return torch.stack(out)
