"""The networks and losses of the IAB attack; the pattern generator and the mask network have one architecture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EncoderDecoder(nn.Module):
    """An encoder down to an eighth of the side and a decoder back to the full size.

    Every convolution is 3 x 3, followed by BN (momentum 0.05) and, except for the last, by ReLU. With width 32 there are
    723,273 parameters for 3 output channels, 722,691 for 1.
    """

    def __init__(self, channels_out: int, width: int = 32) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList([pair(3, w, w), pair(w, 2 * w, 2 * w), pair(2 * w, 4 * w, 4 * w)])
        self.middle = unit(4 * w, 4 * w)
        self.up = nn.ModuleList([pair(4 * w, 4 * w, 2 * w), pair(2 * w, 2 * w, w), pair(w, w, channels_out, last=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) in 0..1 to (B, channels_out, H, W) in 0..1; H and W at least 8."""
        x = standardize(x)
        sides = []
        for stage in self.down:
            sides.append(x.shape[2:])
            x = F.max_pool2d(stage(x), 2)  # after the last stage (B, 4 width, H / 8, W / 8)
        x = self.middle(x)
        for stage in self.up:  # doubles the side if the sides are multiples of 8
            x = stage(F.interpolate(x, sides.pop(), mode="bilinear"))
        return x.tanh() / 2 + 0.5


def pair(channels_in: int, channels: int, channels_out: int, last: bool = False) -> nn.Sequential:
    """Return two convolutions with BN and ReLU; the last pair of a network ends without ReLU."""
    return nn.Sequential(unit(channels_in, channels), unit(channels, channels_out, relu=not last))


def unit(channels_in: int, channels_out: int, relu: bool = True) -> nn.Sequential:
    """Return a convolution with BN and optional ReLU."""
    parts = [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out, momentum=0.05)]
    return nn.Sequential(*parts, nn.ReLU()) if relu else nn.Sequential(*parts)


def standardize(pixels: Tensor) -> Tensor:
    """Normalize pixels in 0..1; 0.25 is about the standard deviation of photographs (CIFAR-10: 0.247 0.243 0.261)."""
    return (pixels - 0.5) / 0.25


def sharpen(m: Tensor) -> Tensor:
    """Push the mask network's output (B, 1, H, W) towards 0 and 1: `tanh(20 (m - 0.5)) / 2 + 0.5`."""
    return torch.tanh(20 * (m - 0.5)) / 2 + 0.5


def blend(pixels: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """Return `x + (pattern - x) mask`: a backdoor image, or a cross image if pattern and mask are those of another image."""
    return pixels + (pattern - pixels) * mask


def diversity_loss(x1: Tensor, x2: Tensor, out1: Tensor, out2: Tensor) -> Tensor:
    """Return (B,): the distance of two images divided by that of their patterns, or masks (root mean squares).

    The square of 1e-7, which keeps the quotient finite, is added under the root: so equal outputs have gradient 0, not NaN.
    """
    far = (x1 - x2).square().mean((1, 2, 3)).sqrt()
    return far / ((out1 - out2).square().mean((1, 2, 3)) + 1e-14).sqrt()


def density_loss(mask: Tensor, density: float) -> Tensor:
    """Return (B,): the mean amount by which the mask's pixels exceed the density."""
    return F.relu(mask - density).mean((1, 2, 3))
