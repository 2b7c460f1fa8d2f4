"""Optimizers and learning-rate schedules by their names in the YAML."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from utils.config.schema import Named

ROUNDING = 1e-9  # epochs: 0.29 * 100 is 28.999... as a float


def build_optimizer(chosen: Named, parameters: Iterable[nn.Parameter], capturable: bool = False) -> torch.optim.Optimizer:
    """Return torch's Adam or SGD over the parameters.

    Args:
        capturable: usable in a CUDA graph: fused kernels, step counter and learning rate on the device.
    """
    kind: Any = getattr(torch.optim, chosen.name)
    weights, settings = list(parameters), dataclasses.asdict(chosen.settings)
    if capturable:
        settings |= {"fused": True, "lr": torch.tensor(settings["lr"], device=weights[0].device)}
        settings |= {"capturable": True} if chosen.name == "Adam" else {}
        # Steps before the capture, and the smaller last batch, run outside of the graph on purpose.
        warnings.filterwarnings("ignore", message=".*running without CUDA graph capture")
    optimizer: torch.optim.Optimizer = kind(weights, **settings)
    if capturable and settings.get("momentum"):
        # The fused SGD cannot start some weights later than others, as those of a layer that was trained alone at first. A
        # momentum of 0 is what it begins with anyway.
        for weight in weights:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight, requires_grad=False)
    return optimizer


@torch.no_grad()
def restart(optimizer: torch.optim.Optimizer) -> None:
    """Reset an optimizer in place: with all moments and step counters 0 it behaves like a new one."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def build_scheduler(
    chosen: Named | None, optimizer: torch.optim.Optimizer, num_epochs: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the learning rate schedule, to be stepped once an epoch; None for a constant rate."""
    if chosen is None:
        return None
    s = chosen.settings
    if chosen.name == "multi_step":
        # At least 1: a fraction of few epochs must not lower the rate of the first one.
        epochs = [max(1, int(m * num_epochs + ROUNDING)) if m < 1 else int(m) for m in s.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, epochs, s.gamma)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.T_max or num_epochs, s.eta_min)
