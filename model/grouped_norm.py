"""Batch normalization by groups of rows: one forward pass over several batches equals one pass for each batch.

MixMatch guesses labels in two forward passes of B images and trains on three (`ASD.mixmatch_step`), each with its own BN
statistics. With statistics by groups of B rows, the two passes become one of 2B rows and the three become one of 3B rows,
with the same results. Statistics over all 2B or 3B rows would be another method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that, in train mode inside `rows_per_group`, normalizes every group of rows by its own statistics."""

    rows = 0  # rows per group; 0: one group, as BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (G * rows, C, H, W); update the running statistics as G forward passes would."""
        if not self.training or self.rows == 0 or x.shape[0] == self.rows:
            return super().forward(x)
        if x.shape[0] % self.rows:
            raise ValueError(f"{x.shape[0]} rows cannot be divided into groups of {self.rows}")
        groups, pixels = x.shape[0] // self.rows, self.rows * x.shape[2] * x.shape[3]
        out, mean, variance = normalize_groups(x, self.weight, self.bias, self.eps, groups)
        with torch.no_grad():
            self.update_running(mean, variance * (pixels / (pixels - 1)))
        return out

    def update_running(self, means: Tensor, variances: Tensor) -> None:
        """Do G updates of the running statistics at once: r <- (1-m)^G r + sum_g m (1-m)^(G-1-g) s_g.

        Args:
            means, variances: (G, C), unbiased, in the order of the groups.
        """
        if self.running_mean is None or self.running_var is None:
            return
        groups = means.shape[0]
        if self.num_batches_tracked is not None:  # None: turned off by `model/batch_counters.py`
            self.num_batches_tracked += groups
        for running, new in ((self.running_mean, means), (self.running_var, variances)):
            new = new.to(running.dtype)
            if self.momentum is None:  # the mean of all batches so far
                assert self.num_batches_tracked is not None
                running += (new - running).sum(0) / self.num_batches_tracked
            else:
                keep = 1 - self.momentum
                share = [self.momentum * keep ** (groups - 1 - g) for g in range(groups)]
                running *= keep**groups
                for g in range(groups):
                    running += share[g] * new[g]


def normalize_groups(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (G * B, C, H, W) normalized by groups, and the groups' means and biased variances, (G, C), detached."""
    grouped = x.view(groups, -1, *x.shape[1:])  # (G, B, C, H, W)
    values = grouped.float() if x.dtype in (torch.bfloat16, torch.float16) else grouped
    variance, mean = torch.var_mean(values, (1, 3, 4), correction=0)  # (G, C) each
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    out = (values * scale[:, None, :, None, None] + shift[:, None, :, None, None]).to(x.dtype)
    return out.flatten(0, 1), mean.detach(), variance.detach()


def group(model: nn.Module) -> nn.Module:
    """Turn every BatchNorm2d of the model into a grouped one, in place: same parameters, buffers and state_dict keys.

    The modules keep their tensors, so existing optimizers stay valid. Outside `rows_per_group` nothing changes.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupedBatchNorm2d
    return model


def is_grouped(model: nn.Module) -> bool:
    """Return whether the model has grouped BN."""
    return any(isinstance(module, GroupedBatchNorm2d) for module in model.modules())


@contextlib.contextmanager
def rows_per_group(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside the block, every grouped BN layer of the model treats each `rows` rows as one batch."""
    norms = [module for module in model.modules() if isinstance(module, GroupedBatchNorm2d)]
    for norm in norms:
        norm.rows = rows
    try:
        yield
    finally:
        for norm in norms:
            norm.rows = 0
