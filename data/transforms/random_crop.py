"""Random crop after padding, as torchvision's RandomCrop, computed on pixel coordinates without a padded copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.config.schema import setting
from utils.errors import UserError

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    size: int = setting(32, "side of the crop in pixels", low=1)
    padding: int = setting(0, "pixels added on every side before the crop", low=0)
    padding_mode: str = setting(
        "constant", "contents of the padding, as in torchvision", options=("constant", "edge", "reflect", "symmetric")
    )

    @property
    def pads_black(self) -> bool:
        """Whether the crop may show black from outside the image."""
        return self.padding > 0 and self.padding_mode == "constant"

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 2): the crop's top and left corner in the padded image."""
        spare = [side + 2 * self.padding - self.size for side in (height, width)]
        if min(spare) < 0:
            raise UserError(f"random_crop.size: {self.size}: larger than the padded image: lower it, or raise padding")
        if self.padding_mode == "reflect" and self.padding >= min(height, width):
            raise UserError(f"random_crop.padding: {self.padding}: must be less than the image's side for reflection")
        corners = [torch.randint(0, room + 1, (count,), generator=generator) for room in spare]
        return torch.stack(corners, 1).double()

    def remap(self, rows: Tensor, cols: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source rows (B, size) and columns (B, size) of the crop; -1 in black padding."""
        corner = draws.long()
        return self.side(rows, corner[:, :1]), self.side(cols, corner[:, 1:2])

    def side(self, source: Tensor, corner: Tensor) -> Tensor:
        """Return the source pixels (B, size) of one side of the crop, taken from `source` (B, n) through the padding."""
        n = source.shape[1]
        at = corner + torch.arange(self.size, device=source.device) - self.padding  # (B, size)
        outside = (at < 0) | (at >= n)
        if self.padding_mode == "reflect":
            at = at.abs()
            at = n - 1 - (n - 1 - at).abs()
        elif self.padding_mode == "symmetric":
            at = at % (2 * n)  # padding wider than the image repeats the reflection
            at = torch.where(at >= n, 2 * n - 1 - at, at)
        picked = source.gather(1, at.clamp(0, n - 1))
        return picked.masked_fill(outside, -1) if self.padding_mode == "constant" else picked
