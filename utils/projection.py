"""Principal components: many dimensions as two, for a plot."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def principal_components(features: Tensor) -> tuple[Tensor, Tensor]:
    """Project features onto their first two principal components.

    Args:
        features: (N, D).
    Returns:
        coordinates (N, 2) float32, each axis with the sign that makes its farthest point positive, and the shares (2,) of the
        variance that the axes hold; features of one dimension, or that are all equal, have zeros.
    """
    centered = (features - features.mean(0)).double()  # (N, D)
    values, vectors = torch.linalg.eigh(centered.T @ centered)  # ascending
    plane = centered @ vectors.flip(1)[:, :2]  # (N, min(D, 2))
    farthest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    plane = plane * torch.where(farthest < 0, -1.0, 1.0)
    shares = values.flip(0)[:2].clamp(min=0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    missing = 2 - plane.shape[1]
    return nn.functional.pad(plane, (0, missing)).float(), nn.functional.pad(shares, (0, missing)).float()
