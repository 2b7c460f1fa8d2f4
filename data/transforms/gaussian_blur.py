"""Gaussian blur of a random width with probability p (SimCLR's augmentation)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.transforms._levels import to_uint8
from utils.config.schema import setting

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    sigma: tuple[float, ...] = setting((0.1, 2.0), "minimum and maximum width in pixels", above=0, count=2, ascending=True)
    p: float = setting(0.5, "probability", low=0, high=1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 2): 1 if the image is blurred, and sigma in pixels."""
        unit = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        sigma = self.sigma[0] + unit[:, 1] * (self.sigma[-1] - self.sigma[0])
        return torch.stack([(unit[:, 0] < self.p).double(), sigma], 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Blur the drawn images of uint8 (B, 3, H, W), each with a kernel of at most 2 ceil(3 sigma) + 1 pixels.

        The image is mirrored at its border, so the kernel cannot be wider than the image.
        """
        reach = min(math.ceil(3 * self.sigma[-1]), (min(images.shape[2:]) - 1) // 2)  # of the widest kernel
        act, sigma = draws[:, :, None].unbind(1)  # (B, 1) each
        distance = torch.arange(reach + 1, dtype=torch.float64, device=images.device)
        weights = torch.exp(-0.5 * (distance / sigma).square()) * (distance <= (3 * sigma).ceil())  # (B, reach + 1)
        weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
        # The kernel of an image that is not blurred is a single 1.
        kernel = torch.where(act > 0, weights, (distance == 0).double()).float()[:, :, None, None, None]
        x = F.pad(images.float(), [reach] * 4, mode="reflect")
        return to_uint8(smooth(smooth(x, kernel, 3), kernel, 2).round_())


def smooth(x: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Return weighted sums of neighbors along one dimension, which becomes shorter by twice the kernel's reach.

    Args:
        x: (B, 3, H, W) float32.
        kernel: (B, reach + 1, 1, 1, 1), the weights of each image at distances 0, 1, ...
    """
    reach = kernel.shape[1] - 1
    n = x.shape[dim] - 2 * reach
    total = x.narrow(dim, reach, n) * kernel[:, 0]
    for d in range(1, reach + 1):
        for start in (reach - d, reach + d):  # adding the two first would need a temporary, which costs more than it saves
            total.addcmul_(x.narrow(dim, start, n), kernel[:, d])
    return total
