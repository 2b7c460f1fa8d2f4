"""Random crop after padding, as torchvision's RandomCrop, on pixel coordinates: no padded copy is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError
from utils.schema import setting

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    size: int = setting(32, "side of the crop in pixels", low=1)
    padding: int = setting(0, "pixels added on every side first", low=0)
    padding_mode: str = setting("constant", "what the padding shows", options=("constant", "edge", "reflect", "symmetric"))

    @property
    def pads_black(self) -> bool:
        """Whether the crop may show black from outside the image."""
        return self.padding > 0 and self.padding_mode == "constant"

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 2): the crop's top and left corner in the padded image."""
        spare = [side + 2 * self.padding - self.size for side in (height, width)]
        if min(spare) < 0:
            raise UserError(f"random_crop.size: {self.size}: larger than the padded image: lower it or raise padding")
        if self.padding_mode == "reflect" and self.padding >= min(height, width):
            raise UserError(f"random_crop.padding: {self.padding}: reflection needs less than the image's side")
        corners = [torch.randint(0, room + 1, (count,), generator=generator) for room in spare]
        return torch.stack(corners, 1).double()

    def remap(self, rows: Tensor, cols: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source rows (B, size) and columns (B, size) of the crop; -1 where padding shows black."""
        corner = draws.long()
        return self.side(rows, corner[:, :1]), self.side(cols, corner[:, 1:2])

    def side(self, source: Tensor, corner: Tensor) -> Tensor:
        """Follow one side of the crop through the padding into `source` (B, n)."""
        n = source.shape[1]
        at = corner + torch.arange(self.size, device=source.device) - self.padding  # (B, size)
        outside = (at < 0) | (at >= n)
        if self.padding_mode == "reflect":
            at = at.abs()
            at = n - 1 - (n - 1 - at).abs()
        elif self.padding_mode == "symmetric":
            at = at % (2 * n)  # the padding may be wider than the image: it mirrors again and again
            at = torch.where(at >= n, 2 * n - 1 - at, at)
        picked = source.gather(1, at.clamp(0, n - 1))
        return picked.masked_fill(outside, -1) if self.padding_mode == "constant" else picked
