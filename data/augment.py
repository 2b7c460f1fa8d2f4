"""Augmentation as batched tensor code: random draws in, a normalized float batch out.

The distribution is that of the torchvision transforms that the YAML names. For equal draws, crop and flip give the same
pixels as torchvision on PIL images (tests/test_augment.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.config.schema import Named
from utils.errors import UserError, kind_of

# How many float32 numbers a transform works on at a time. This bounds the memory, and on a CPU the numbers stay in the cache,
# which is 1.2 to 2.5 times faster than 32 images of 224 px at once. A GPU needs few and large kernels.
CHUNK_CPU, CHUNK = 2**20, 2**23


class Pipeline:
    """The transforms of one line of the YAML (`transform.train` or `transform.test`).

    Consecutive transforms that only move pixels are fused: they are applied to row and column numbers and cost one gather.
    """

    def __init__(self, primary: Sequence[Named], remaining: Sequence[Named], height: int, width: int) -> None:
        self.steps: list[Any] = [item.settings for item in primary]
        normalize = [item.settings for item in remaining if hasattr(item.settings, "mean")]
        self.mean: tuple[float, ...] = normalize[0].mean if normalize else (0.0, 0.0, 0.0)
        self.std: tuple[float, ...] = normalize[0].std if normalize else (1.0, 1.0, 1.0)
        self.sizes: list[tuple[int, int]] = []  # height and width of the images that reach each step
        self.columns: list[int] = []  # how many random numbers each step needs per image
        self.constants: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.area = height * width  # of the largest intermediate image
        probe = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        for name, step in zip((item.name for item in primary), self.steps, strict=True):
            self.sizes.append((probe.shape[2], probe.shape[3]))
            draws = step.draw(1, *self.sizes[-1], torch.Generator())
            self.columns.append(draws.shape[1])
            try:
                probe = self.move(probe, [(step, draws)])
            except ValueError as error:
                raise UserError(f"transform: images of {error}") from None
            if not isinstance(probe, Tensor) or probe.dtype != torch.uint8 or probe.ndim != 4 or probe.shape[:2] != (1, 3):
                raise UserError(
                    f"data/transforms/{name}.py: apply: returned {kind_of(probe)}: must be torch.uint8 (B, 3, H, W)"
                )
            self.area = max(self.area, probe.shape[2] * probe.shape[3])
        self.output_size = (probe.shape[2], probe.shape[3])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the random numbers of `count` views: a (count, k) float64 table on the CPU."""
        tables = [step.draw(count, *size, generator) for step, size in zip(self.steps, self.sizes, strict=True)]
        return torch.cat(tables, 1) if tables else torch.zeros(count, 0, dtype=torch.float64)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the views that the draws describe.

        Args:
            images: (B, 3, H, W) uint8.
            draws: (B, k), rows of `draw`'s table, on the same device.
        Returns:
            (B, 3, H', W') float32, normalized.
        """
        parts = draws.split(self.columns, 1) if self.steps else ()
        return self.normalize(self.move(images, list(zip(self.steps, parts, strict=True))))

    def move(self, images: Tensor, work: list[tuple[Any, Tensor]]) -> Tensor:
        """Apply (transform, draws) pairs to uint8 images; consecutive pixel moves are one gather."""
        while work:
            moves = 0
            while moves < len(work) and hasattr(work[moves][0], "remap"):
                moves += 1
            images = gather_pixels(images, work[:moves]) if moves else self.change(images, *work[0])
            work = work[max(moves, 1) :]
        return images

    def change(self, images: Tensor, step: Any, draws: Tensor) -> Tensor:
        """Apply one transform to uint8 images, a part of the batch at a time."""
        values = CHUNK_CPU if images.device.type == "cpu" else CHUNK
        part = max(1, values // (3 * self.area))
        pairs = zip(images.split(part), draws.split(part), strict=True)
        return torch.cat([step.apply(*pair) for pair in pairs])

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to float32: scale to [0, 1], subtract the mean, divide by the standard deviation."""
        if images.device not in self.constants:
            pair = (torch.tensor(self.mean), torch.tensor(self.std))
            self.constants[images.device] = tuple(c.view(3, 1, 1).to(images.device) for c in pair)  # type: ignore[assignment]
        mean, std = self.constants[images.device]
        return images.float().div_(255).sub_(mean).div_(std)


def gather_pixels(images: Tensor, moves: list[tuple[Any, Tensor]]) -> Tensor:
    """Apply several pixel moves to row and column numbers, then fetch every pixel once.

    Args:
        images: (B, 3, H, W) uint8.
        moves: (transform with `remap`, its (B, k) draws).
    Returns:
        (B, 3, H', W') uint8; pixels that come from outside the image are 0.
    """
    b, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(b, height)
    cols = torch.arange(width, device=images.device).expand(b, width)
    for transform, draws in moves:
        rows, cols = transform.remap(rows, cols, draws)
    h, w = rows.shape[1], cols.shape[1]
    at = (rows.clamp(min=0)[:, :, None] * width + cols.clamp(min=0)[:, None, :]).view(b, 1, h * w)
    out = images.reshape(b, channels, height * width).gather(2, at.expand(b, channels, h * w)).view(b, channels, h, w)
    if any(getattr(transform, "pads_black", False) for transform, _ in moves):
        inside = (rows >= 0)[:, :, None] & (cols >= 0)[:, None, :]  # (B, h, w)
        out = out * inside[:, None]
    return out
