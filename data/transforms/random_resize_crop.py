"""A crop of random area and aspect ratio, resized, as torchvision's RandomResizedCrop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms._levels import to_uint8
from utils.config.schema import setting

ATTEMPTS = 10  # then a central crop is taken, as in torchvision

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    size: int = setting(224, "side of the result in pixels", low=1)
    scale: tuple[float, ...] = setting(
        (0.08, 1.0), "minimum and maximum share of the area", above=0, high=1, count=2, ascending=True
    )
    ratio: tuple[float, ...] = setting((0.75, 4 / 3), "minimum and maximum width / height", above=0, count=2, ascending=True)

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
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return torch.tensor([(height - h) // 2, (width - w) // 2, h, w], dtype=torch.float64)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop each image of uint8 (B, 3, H, W) to its own box and resize it: (B, 3, size, size).

        Bilinear with antialiasing, as in torchvision on uint8: first along the rows, then along the columns, each rounded.
        """
        b, channels, height, width = images.shape
        top, left, h, w = draws[:, :, None].unbind(1)  # (B, 1) each
        x = images.float()
        at, weights = taps(left, w, width, self.size)  # (K, B, size)
        parts = [x.gather(3, i[:, None, None].expand(b, channels, height, self.size)) for i in at]
        x = weighted_sum(parts, weights[:, :, None, None]).add_(0.5).floor_()  # (B, 3, H, size)
        at, weights = taps(top, h, height, self.size)
        first = torch.arange(b * channels, device=x.device).view(b, channels, 1) * height
        rows = x.view(-1, self.size)  # copying whole rows is 5 times faster than gathering their pixels
        parts = [rows.index_select(0, (first + i[:, None]).flatten()).view(b, channels, self.size, -1) for i in at]
        return to_uint8(weighted_sum(parts, weights[:, :, None, :, None]).add_(0.5))


def taps(start: Tensor, length: Tensor, side: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the source pixels, with weights, of each pixel of the resized boxes along one axis.

    The weights form a triangle around the new pixel's position in the box. It extends by 1 source pixel to both sides, or by 1
    new pixel if the box shrinks. Pixels outside of the box have weight 0.

    Args:
        start, length: (B, 1) float64, the boxes in whole pixels.
        side, size: pixels of the image and of the resized box.
    Returns:
        Positions (K, B, size) int64 and weights (K, B, size) float32. K is large enough for a box of the whole side.
    """
    scale = length / size
    reach = scale.clamp(min=1)  # (B, 1)
    center = start + (torch.arange(size, dtype=torch.float64, device=start.device) + 0.5) * scale  # (B, size)
    k = torch.arange(math.ceil(2 * max(side / size, 1)), device=start.device)[:, None, None]
    at = (center - reach + 0.5).floor() + k  # (K, B, size)
    weights = (1 - (at + 0.5 - center).abs() / reach).clamp_(min=0)
    weights = weights * ((at >= start) & (at < start + length))
    return at.clamp_(0, side - 1).long(), (weights / weights.sum(0)).float()


def weighted_sum(parts: list[Tensor], weights: Tensor) -> Tensor:
    """Return the sum of the parts, each multiplied by its weights; the first part is overwritten."""
    total = parts[0].mul_(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(part, weight)
    return total
