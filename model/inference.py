"""Logits of many images in eval mode, batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from utils.runtime.machine import Machine


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Tensor], machine: Machine) -> Tensor:
    """Return the logits (N, C) float32 of all images, in order; the mode of the model is restored.

    Args:
        batches: normalized images, (B, 3, H, W) float32 each.
    """
    logits = []
    with eval_mode(model):
        for images in batches:
            with machine.autocast():
                logits.append(model(machine.to_memory_format(images)).float())
    return torch.cat(logits)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the block; afterwards restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
