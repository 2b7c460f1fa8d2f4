"""Logits of many images in eval mode, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils.device import Precision


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Tensor], precision: Precision) -> Tensor:
    """Return the logits (N, C) float32 of all images, in order; the model's mode is put back afterwards.

    Args:
        batches: normalized images, (B, 3, H, W) float32 each.
    """
    was_training = model.training
    model.eval()
    logits = []
    for images in batches:
        with precision.autocast():
            logits.append(model(precision.lay_out(images)).float())
    model.train(was_training)
    return torch.cat(logits)
