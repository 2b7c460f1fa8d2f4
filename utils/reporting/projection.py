"""Principal components: projection of features to two dimensions, for a plot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def principal_components(features: Tensor) -> tuple[Tensor, Tensor]:
    """Project features onto their first two principal components.

    Args:
        features: (N, D) float32.
    Returns:
        coordinates (N, 2) float32, each axis with the sign that makes its farthest point positive, and the shares (2,) of the
        variance along the axes; zeros where features have one dimension or are all equal.
    """
    centered = features - features.mean(0)  # (N, D)
    basis = torch.randn(features.shape[1], min(8, features.shape[1]), generator=torch.Generator().manual_seed(0))
    for _ in range(20):  # subspace iteration: a D x D eigenproblem takes minutes for D = 4096
        basis = torch.linalg.qr(centered.T @ (centered @ basis)).Q
    _, values, rows = torch.linalg.svd(centered @ basis, full_matrices=False)
    plane = (centered @ basis) @ rows[:2].T  # (N, at most 2)
    farthest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    plane = plane * torch.where(farthest < 0, -1.0, 1.0)
    shares = values[:2] ** 2 / centered.square().sum().clamp(min=torch.finfo(centered.dtype).tiny)
    missing = 2 - plane.shape[1]
    return F.pad(plane, (0, missing)), F.pad(shares, (0, missing))
