"""SimCLR's loss (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loss.supervised import full_precision


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the loss of each image: its two views against all other views of the batch.

    `-log(exp(z z' / T) / sum_k exp(z z_k / T))`, where k goes over the other 2B - 1 views. Only first views are anchors z.

    Args:
        first, second: (B, D) projections of the two views, of any length.
    Returns:
        (B,).
    """
    first, second = (F.normalize(full_precision(z), dim=1) for z in (first, second))
    positive = (first * second).sum(1) / temperature  # (B,)
    others = first @ torch.cat([first, second]).T / temperature  # (B, 2B)
    itself = torch.eye(len(first), 2 * len(first), dtype=torch.bool, device=first.device)
    return others.masked_fill(itself, -torch.inf).logsumexp(1) - positive
