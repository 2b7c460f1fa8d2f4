"""Brightness, contrast, saturation and hue, each by a factor of its own, in a random order, with probability p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.schema import setting


@dataclass(frozen=True)
class Settings:
    brightness: float = setting(0.0, "factor from [1 - b, 1 + b]", low=0)
    contrast: float = setting(0.0, "factor from [1 - c, 1 + c]", low=0)
    saturation: float = setting(0.0, "factor from [1 - s, 1 + s]", low=0)
    hue: float = setting(0.0, "shift from [-h, h] of the colour circle", low=0, high=0.5)
    p: float = setting(1.0, "probability", low=0, high=1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 9): whether to act, the order of the four changes, their four amounts."""
        act = (torch.rand(count, 1, generator=generator, dtype=torch.float64) < self.p).double()
        order = torch.rand(count, 4, generator=generator, dtype=torch.float64).argsort(1).double()
        unit = torch.rand(count, 4, generator=generator, dtype=torch.float64)
        amounts = []
        for i, spread in enumerate((self.brightness, self.contrast, self.saturation)):
            low = max(0.0, 1 - spread)
            amounts.append(low + unit[:, i] * (1 + spread - low))
        amounts.append((2 * unit[:, 3] - 1) * self.hue)
        return torch.cat([act, order, torch.stack(amounts, 1)], 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change the colours of each of the uint8 (B, 3, H, W) by its own amounts."""
        return torch.stack([self.one(x, row) for x, row in zip(images, draws.tolist(), strict=True)])

    def one(self, image: Tensor, row: list[float]) -> Tensor:
        """Apply one row of the table to one image (3, H, W)."""
        act, order, amounts = row[0], row[1:5], row[5:]
        change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        spread = (self.brightness, self.contrast, self.saturation, self.hue)
        for i in (int(o) for o in order):
            if act and spread[i] > 0:
                image = change[i](image, amounts[i])
        return image
