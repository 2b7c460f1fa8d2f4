"""Conversion of floating-point levels to bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(levels: Tensor) -> Tensor:
    """Return levels, 0 <= x < 256 in any shape, rounded down to uint8.

    The conversion goes through int16: on a CPU, torch converts float32 to uint8 one number at a time, which takes four times
    as long.
    """
    return levels.to(torch.int16).to(torch.uint8)
