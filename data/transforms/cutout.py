"""Cutout: black squares at random places (DeVries and Taylor, arXiv 1708.04552)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.config.schema import setting

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    holes: int = setting(1, "squares per image", low=1)
    length: int = setting(16, "side of a square in pixels; the next lower even number is used, as in its authors' code", low=2)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 2 * holes): row and column of the center of each square, a pixel of the image."""
        centers = [torch.randint(0, side, (count,), generator=generator) for _ in range(self.holes) for side in (height, width)]
        return torch.stack(centers, 1).double()

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Blacken the squares in uint8 (B, 3, H, W), as far as they lie in the image.

        Around the center c a square covers the pixels from c - length // 2 to c + length // 2 - 1.
        """
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
        for center in draws.long().split(2, dim=1):
            inside = self.covers(rows, center[:, :1])[:, :, None] & self.covers(columns, center[:, 1:])[:, None, :]
            images = images.masked_fill(inside[:, None], 0)
        return images

    def covers(self, at: Tensor, center: Tensor) -> Tensor:
        """Return whether a square with its center (B, 1) covers the places (n,): (B, n) bool."""
        half = self.length // 2
        return (at >= center - half) & (at < center + half)
