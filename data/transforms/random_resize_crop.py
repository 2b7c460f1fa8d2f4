"""A crop of random area and shape, resized: torchvision's RandomResizedCrop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.schema import setting

ATTEMPTS = 10  # then the whole image, its shape bounded, as in torchvision


@dataclass(frozen=True)
class Settings:
    size: int = setting(224, "side of the result in pixels", low=1)
    scale: tuple[float, ...] = setting((0.08, 1.0), "least and greatest share of the area", above=0, high=1)
    ratio: tuple[float, ...] = setting((0.75, 4 / 3), "least and greatest width / height", above=0)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 4): top, left, height and width of each crop in pixels."""
        unit = torch.rand(4, count, ATTEMPTS, generator=generator, dtype=torch.float64)
        area = height * width * (self.scale[0] + unit[0] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        shape = (low + unit[1] * (high - low)).exp()
        w, h = (area * shape).sqrt().round(), (area / shape).sqrt().round()  # (count, ATTEMPTS)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.int().argmax(1, keepdim=True)
        top = (unit[2] * (height - h + 1)).floor()
        left = (unit[3] * (width - w + 1)).floor()
        drawn = torch.stack([t.gather(1, first).squeeze(1) for t in (top, left, h, w)], 1)
        return torch.where(fits.any(1, keepdim=True), drawn, self.fallback(height, width))

    def fallback(self, height: int, width: int) -> Tensor:
        """Return the (4,) central crop that is used when no attempt fits."""
        h, w = height, width
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return torch.tensor([(height - h) // 2, (width - w) // 2, h, w], dtype=torch.float64)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and resize each of the uint8 (B, 3, H, W) by its own box."""
        boxes = draws.long().tolist()
        size = [self.size, self.size]
        return torch.stack([F.resized_crop(x, *box, size, antialias=True) for x, box in zip(images, boxes, strict=True)])
