"""Exchange left and right with probability p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.config.schema import setting

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    p: float = setting(0.5, "probability", low=0, high=1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 1): 1 where the image is mirrored."""
        return (torch.rand(count, 1, generator=generator, dtype=torch.float64) < self.p).double()

    def remap(self, rows: Tensor, cols: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows, and the columns in reverse order for the drawn images."""
        return rows, torch.where(draws > 0, cols.flip(1), cols)
